"""Store a teacher's distributions next to the shards of a data set, for training with --distill-cache.

python -m open_lm.finetune.cache_teacher --pretrained logs/teacher --data data/manifest.jsonl --draws 50

Method `sample` stores the ids that --draws random draws from the teacher's distribution give for each token: a few
bytes, and training on them is unbiased. Method `top-k` stores the most likely ids, which is biased. The same command
continues after an interruption, with the first shard that has no file. Under torchrun, the ranks share the shards; each
has the complete teacher.
"""

from __future__ import annotations

import argparse
import sys

from open_lm.config.command_line import FlagParser
from open_lm.config.distill_section import TEACHER_PRECISIONS
from open_lm.errors import ConfigError, join_problems, run_cli
from open_lm.system.names import shard_pattern, user_path, weights_path

METHODS = ("sample", "top-k")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = FlagParser.of_program("open_lm.finetune.cache_teacher", __doc__)
    add = parser.add_argument
    add("--model", type=user_path, metavar="NAME", help="architecture of the teacher, as --distill-model")
    add("--pretrained", type=weights_path, metavar="PATH", help="weights of the teacher, as --distill-pretrained")
    add(
        "--data",
        type=shard_pattern,
        required=True,
        metavar="PATTERN",
        help="shards, as --train-data, or a manifest.jsonl",
    )
    add("--data-key", default="txt", help="format of the samples in a shard (default: %(default)s)")
    add("--output", type=user_path, metavar="FOLDER", help="cache to write (default: teacher/ next to the shards)")
    add("--method", choices=METHODS, default="sample", help="ids to store (default: %(default)s)")
    add("--draws", type=int, default=50, help="with sample, draws of each token, at most 65535 (default: %(default)s)")
    add("--top-k", type=int, default=64, help="with top-k, ids of each token (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="as --distill-temperature (default: %(default)s)")
    add("--num-ids", type=int, help="ids that the distributions cover (default: all of the teacher)")
    add("--seed", type=int, default=0, help="with sample, seed of the draws (default: %(default)s)")
    add("--document-mask", action="store_true", help="as the trainer's flag, which must have the same value")
    add("--end-of-text-id", type=int, help="as the trainer's flag (default: that of the shards' dataset.json)")
    add("--batch-size", type=int, default=8, help="sequences at a time (default: %(default)s)")
    add("--precision", choices=TEACHER_PRECISIONS, default="bf16", help="of the teacher (default: %(default)s)")
    add("--device", help="cuda, cuda:N or cpu (default: cuda if there is one); cuda is a separate device for each rank")
    add("--allow-other-tokenizer", action="store_true", help="accept a teacher with another tokenizer than the data's")
    return parser


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: flags or a teacher that do not fit the data, or a folder with another cache.
        DataError: shards that cannot be read, or have sequences of several lengths.
    """
    args = build_parser().parse_args(argv)
    _check_values(args)
    from open_lm.distributed.processes import world_info_from_env
    from open_lm.finetune.cache_writer import open_job, run

    job = open_job(args)
    _, rank, world_size = world_info_from_env()
    run(job, range(len(job.source.shards))[rank::world_size])


def _check_values(args: argparse.Namespace) -> None:
    limits = {"draws": 65535, "top_k": 65535, "batch_size": None, "num_ids": None}
    problems = [
        f"--{name.replace('_', '-')}: found {value}, expected 1 or more{f', at most {limit}' if limit else ''}"
        for name, limit in limits.items()
        if (value := getattr(args, name)) is not None and not 1 <= value <= (limit or value)
    ]
    if not 0 < args.temperature < float("inf"):
        problems.append(f"--temperature: found {args.temperature}, expected a number above 0")
    if args.end_of_text_id is not None and not args.document_mask:
        problems.append("--end-of-text-id has no effect without --document-mask: set it, or remove the id")
    if not (args.model or args.pretrained):
        problems.append("no teacher: set --pretrained to its checkpoint, or --model to a folder of transformers")
    if problems:
        raise ConfigError(join_problems(problems))


if __name__ == "__main__":
    sys.exit(run_cli(main))
