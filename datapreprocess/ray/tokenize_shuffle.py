"""Tokenize and globally shuffle raw text on a Ray cluster, with the flags and file names of OpenLM's cluster command.

    python -m open_lm.datapreprocess.ray.tokenize_shuffle --input s3://bucket/raw/,more_raw --output s3://bucket/tokenized

writes {output}/00000001.tar, … (json.gz members) and {output}/manifest.jsonl. It uses the same engine as make_2048.py.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # as a script: import this copy of the package, and no modules from this folder
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[0] = str(_ROOT if (_ROOT / "open_lm").is_dir() else _ROOT.parent)

from open_lm.datapreprocess.commands import (
    Parser,
    Request,
    add_common_options,
    execute,
    start_logging,
    warn_without_effect,
)
from open_lm.system.names import input_list, user_path
from open_lm.system.program import program_name
from open_lm.tokenizer import DEFAULT_TOKENIZER

if TYPE_CHECKING:
    import argparse

    from open_lm.datapreprocess.inputs import InputFile

SUFFIXES = [".json", ".jsonl", ".zst", ".zstd", ".tar", ".gz"]
DEFAULT_SAMPLING = Path(__file__).resolve().parents[1] / "metadata" / "rpj_lm_data.yaml"
_WITHOUT_EFFECT = ("num_writers_per_node", "presort", "allow_imbalanced_write")
_FIXED_OUTPUT = "the output does not depend on the number of workers and writers"


def make_parser() -> Parser:
    """Return the parser of the command."""
    from open_lm.datapreprocess.readers import describe_suffixes

    description = (__doc__ or "").partition("\n")[0]
    parser = Parser(prog=program_name("tokenize_shuffle.py"), description=description)
    add = parser.add_argument
    add(
        "--input",
        type=input_list,
        default="",
        help="comma-separated folders, globs or files, local or s3://…; supported suffixes: " + describe_suffixes(),
    )
    add("--output", type=user_path, required=True, help="local folder or s3:// prefix of the shards")
    add("--content_key", default="text", help="key or column of the text; for tar files text, txt, npy or json:KEY")
    add("--no_shuffle", action="store_true", help="keep the order of the input")
    add(
        "--seqlen",
        type=int,
        default=2048,
        help="sequence length of the model; each stored sequence has one more token id",
    )
    add("--tokenizer", type=user_path, help=f"hub name, folder, .json or .model file (default: {DEFAULT_TOKENIZER})")
    add("--vocab_size", type=int, help="vocabulary size; required if the documents are token ids (no --tokenizer)")
    add("--wds_chunk_size", type=int, default=8192, help="sequences per shard (default: 8192)")
    add("--seed", type=int, default=42, help="seed of the shuffle, of --subset and of sampling (default: 42)")
    add("--subset", type=int, help="use this number of input files, selected by --seed")
    add("--subfraction", type=float, help="use this fraction (0 to 1) of the input files, selected by --seed")
    add(
        "--suffixes",
        nargs="+",
        default=SUFFIXES,
        help=f"read only files with these suffixes from input folders (default: {' '.join(SUFFIXES)})",
    )
    add("--do_sample", action="store_true", help="repeat or drop documents by source")
    add(
        "--default_dataset_yaml",
        type=user_path,
        default=str(DEFAULT_SAMPLING),
        help="sources and sampling factors for --do_sample",
    )
    add("--format", default="json.gz", choices=["npy", "json.gz", "json", "txt"], help="format of the shard members")
    add("--ray_address", help="address of a running Ray cluster, or `local` to start Ray")
    add("--ray_spill_location", type=user_path, help="folder for intermediate files; same as --work-dir")
    add("--ray_dashboard_host", help="host on which a locally started Ray serves its dashboard")
    add("--force_parallelism", type=int, help="number of parallel tasks (default: one per CPU core)")
    add("--force_num_cores", type=int, help="number of CPU cores of this machine to use")
    add("--num_writers_per_node", type=int, help="no effect: every worker writes shards")
    add("--presort", action="store_true", help="no effect: --seed determines the order")
    add("--allow_imbalanced_write", action="store_true", help="no effect: shards are always balanced")
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises open_lm.errors.UserError for invalid arguments or inputs."""
    args = make_parser().parse_args(argv)
    from open_lm.datapreprocess.job import Layout
    from open_lm.datapreprocess.mixtures import load_mixture

    start_logging()
    warn_without_effect([f"--{name}" for name in _WITHOUT_EFFECT if getattr(args, name)], _FIXED_OUTPUT)
    if args.default_dataset_yaml != str(DEFAULT_SAMPLING) and not args.do_sample:
        warn_without_effect(["--default_dataset_yaml"], "it needs --do_sample")
    if args.work_dir and args.ray_spill_location:
        warn_without_effect(["--ray_spill_location"], "--work-dir takes precedence")
    limits = [count for count in (args.force_parallelism, args.force_num_cores) if count is not None]
    running = {
        "workers": min(limits) if limits else None,
        "ray_options": _ray_options(args),
        "work_dir": args.work_dir or args.ray_spill_location,
    }
    execute(
        Request(
            args,
            "--input",
            args.input,
            Layout(args.output, template="{:08d}", first=1, shard_sequences=args.wds_chunk_size),
            args.tokenizer or (None if _inputs_are_ids(args) else DEFAULT_TOKENIZER),
            args.vocab_size,
            running,
            mixture=load_mixture(args.default_dataset_yaml) if args.do_sample else None,
            suffixes=args.suffixes,
            choose=lambda inputs: choose(inputs, args.seed, args.subset, args.subfraction),
        )
    )


def _inputs_are_ids(args: argparse.Namespace) -> bool:
    """Return whether the documents are token ids. They need no tokenizer, and their end-of-text id is 0."""
    return args.content_key == "npy" and args.vocab_size is not None


def _ray_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.ray_dashboard_host is None:
        return {}
    return {"include_dashboard": True, "dashboard_host": args.ray_dashboard_host}


def choose(inputs: Sequence[InputFile], seed: int, subset: int | None, subfraction: float | None) -> list[InputFile]:
    """Return the input files that --subset and --subfraction select, sorted by name."""
    from open_lm.errors import ConfigError

    if subset is not None and subset < 1:
        raise ConfigError(f"--subset must be at least 1, found {subset}")
    if subfraction is not None and not 0 < subfraction <= 1:
        raise ConfigError(f"--subfraction must be above 0 and at most 1, found {subfraction}")
    chosen = list(inputs)
    random.Random(seed).shuffle(chosen)
    chosen = chosen[:subset]
    if subfraction is not None:
        count = int(subfraction * len(chosen))
        if not count:
            raise ConfigError(
                f"--subfraction {subfraction} of {len(chosen)} input files selects no file; use a larger fraction"
            )
        chosen = chosen[:count]
    return sorted(chosen, key=lambda item: item.url)


if __name__ == "__main__":
    from open_lm.errors import run_cli

    raise SystemExit(run_cli(main))
