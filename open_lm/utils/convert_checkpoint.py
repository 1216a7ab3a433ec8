"""Convert a sharded checkpoint to interchange files: epoch_N.pt, optimizer_N.pt, stats_N.pt and averager files.

python -m open_lm.utils.convert_checkpoint logs/NAME/checkpoints/step_00001000 --output exported
python -m open_lm.utils.convert_checkpoint s3://bucket/NAME/checkpoints/step_00001000 --output s3://bucket/exported

Runs in one process, tensor by tensor: the model is never completely in memory, and neither a GPU nor a process group is
needed. N is the number of epochs completed at that step. The run's data.json and tokenizer/ are copied as well.
"""

from __future__ import annotations

import argparse
import sys

from open_lm.errors import CheckpointError, run_cli
from open_lm.system.names import user_path
from open_lm.system.program import program_name


def main(argv: list[str]) -> str:
    """Run the command and return the path of the written epoch_N.pt.

    Raises:
        CheckpointError: the folder is not a complete sharded checkpoint.
        StorageError: a folder cannot be read or written.
    """
    parser = argparse.ArgumentParser(
        prog=program_name("convert_checkpoint"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=user_path, metavar="STEP_FOLDER", help="step_N folder, local or s3://…")
    parser.add_argument(
        "--output", type=user_path, required=True, metavar="FOLDER", help="output folder, local or s3://…"
    )
    parser.add_argument("--weights-only", action="store_true", help="do not write optimizer_N.pt, the largest file")
    args = parser.parse_args(argv)

    from open_lm.checkpoint.folders import step_number
    from open_lm.checkpoint.interchange import write_interchange
    from open_lm.checkpoint.tensor_index import StoredTensors, incomplete_reason
    from open_lm.data.tokenizers import copy_record

    if step_number(args.checkpoint) is None:
        raise CheckpointError(f"{args.checkpoint}: expected the step_N folder of a sharded checkpoint")
    if problem := incomplete_reason(args.checkpoint):
        raise CheckpointError(f"{args.checkpoint} cannot be converted: {problem}")
    stored = StoredTensors(args.checkpoint)
    path = write_interchange(stored, args.output, str(stored.extra.get("name", "")), not args.weights_only)
    copy_record(args.checkpoint, args.output)
    print(f"{path}: the model after {stored.step} steps")
    return path


if __name__ == "__main__":
    sys.exit(run_cli(main))
