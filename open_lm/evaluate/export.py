"""Write results of in-context learning in the formats of other programs.

    python -m open_lm.evaluate.export checkpoints/evals/epoch_2_core.json --dclm exp_data/evals/evaluation_NAME.json
    python -m open_lm.evaluate.export checkpoints/evals/epoch_2_core.json --model-card exported/README.md

The files are those of eval_openlm_ckpt.py, for one checkpoint; their tasks are combined. `open_lm.hf.convert export`
adds the results next to a checkpoint to the model card.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import PurePath

from open_lm import storage
from open_lm.config.command_line import FlagParser
from open_lm.errors import ConfigError, run_cli
from open_lm.system.names import user_path


def build_parser() -> argparse.ArgumentParser:
    parser = FlagParser.of_program("open_lm.evaluate.export", __doc__)
    parser.add_argument(
        "results", type=user_path, nargs="+", metavar="RESULT", help="JSON results of eval_openlm_ckpt.py"
    )
    parser.add_argument("--dclm", type=user_path, metavar="FILE", help="write the form of DCLM's exp_data/evals here")
    parser.add_argument(
        "--model-card", type=user_path, metavar="README", help="put the scores into the front matter of this model card"
    )
    parser.add_argument("--name", help="name of the evaluation or the model (default: that of the first result)")
    parser.add_argument("--model-uuid", help="with --dclm: uuid of the model in DCLM's records")
    return parser


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: no output is requested.
        DataError: results that cannot be used, or that are of different weights.
    """
    args = build_parser().parse_args(argv)
    if not (args.dclm or args.model_card):
        raise ConfigError("no output: pass --dclm FILE or --model-card README")
    if args.model_uuid and not args.dclm:
        raise ConfigError("--model-uuid has no effect without --dclm")
    from open_lm.evaluate.result_formats import dclm_form, model_index, with_model_index
    from open_lm.storage.strict_json import to_json

    name = args.name or PurePath(args.results[0]).stem
    if args.dclm:
        content, omitted = dclm_form(args.results, name, args.model_uuid)
        storage.write_text(args.dclm, to_json(content, indent=4) + "\n")
        print(f"{args.dclm}: {len(content['eval_metrics']['icl'])} tasks, {len(omitted)} left out")
        print("".join(f"  {reason}\n" for reason in omitted), end="")
    if args.model_card:
        index = model_index(args.results, name)
        card = storage.read_text(args.model_card)
        storage.write_text(args.model_card, with_model_index(card, index, args.model_card))
        print(f"{args.model_card}: {sum(len(entry['results']) for entry in index)} scores")


if __name__ == "__main__":
    sys.exit(run_cli(main))
