"""Merge low-rank adapters into the weights of their base, or undo that.

python -m open_lm.finetune.merge logs/NAME merged
python -m open_lm.finetune.merge ADAPTER_FOLDER merged --base EXPORTED_FOLDER
python -m open_lm.finetune.merge --undo merged base

The source is a run with --lora (its newest checkpoint) or one of its checkpoints, or a folder in the format of PEFT
with the transformers model that its adapters belong to. The result has the format of the base: a folder with
epoch_N.pt and model.json, which training (--pretrained), evaluation and generation accept, or a folder that
transformers loads. The sum of weight and update is computed in float32 and rounded to the dtype of the base.

--undo writes the weights of the base. It copies them if the base is still in its place (or at --base), which it
verifies with the recorded hash. Otherwise it subtracts the updates in float32, and reports whether the result has that
hash: rounding may change the last bit of a weight.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from open_lm.config.command_line import FlagParser
from open_lm.errors import ConfigError, run_cli
from open_lm.system.names import user_path


def build_parser() -> argparse.ArgumentParser:
    parser = FlagParser.of_program("open_lm.finetune.merge", __doc__)
    parser.add_argument(
        "source", type=user_path, metavar="SOURCE", help="run or checkpoint with adapters, or a folder of PEFT"
    )
    parser.add_argument("target", type=user_path, metavar="DEST", help="folder to write, which must not exist")
    parser.add_argument(
        "--base",
        type=user_path,
        help="checkpoint or transformers folder with the base (default: where it was in training); must have the same "
        "weights",
    )
    parser.add_argument("--undo", action="store_true", help="SOURCE is a merged folder: write the weights of its base")
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: a target that exists already, or a base that is missing.
        CheckpointError: another base, or files that are missing or damaged.
    """
    args = build_parser().parse_args(list(argv))
    from open_lm.finetune import merging
    from open_lm.hf.peft_adapters import is_peft_folder

    if args.undo:
        is_exact = merging.undo(args.source, args.target, args.base)
        print(f"{args.target}: complete, {'bit-equal to the base' if is_exact else 'equal to the base up to rounding'}")
        return
    if is_peft_folder(args.source):
        base = args.base or merging.recorded_base(args.source)
        if base is None:
            raise ConfigError(
                f"--base is missing: {args.source} does not record the transformers model of its adapters; give the "
                "exported base (python -m open_lm.hf.convert export BASE FOLDER)"
            )
        merging.merge_transformers(args.source, args.target, base)
    else:
        merging.merge_native(args.source, args.target, args.base)
    print(f"{args.target}: complete")


if __name__ == "__main__":
    sys.exit(run_cli(main))
