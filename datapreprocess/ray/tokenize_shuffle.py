"""Tokenize and globally shuffle folders of raw text on a Ray cluster; the command of existing cluster users.

    python -m open_lm.datapreprocess.ray.tokenize_shuffle --input s3://bucket/raw/,more_raw --output s3://bucket/tokenized

writes {output}/00000001.tar, … (json.gz members) and {output}/manifest.jsonl. Same engine as make_2048.py.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # as a script: find the package wherever it lies, and no other folder's module names
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[0] = str(_ROOT if (_ROOT / "open_lm").is_dir() else _ROOT.parent)

from open_lm.datapreprocess.commands import (
    DEFAULT_TOKENIZER,
    Parser,
    Request,
    add_common_options,
    execute,
    warn_without_effect,
    start_logging,
)

if TYPE_CHECKING:
    import argparse

    from open_lm.datapreprocess.inputs import InputFile

SUFFIXES = [".json", ".jsonl", ".zst", ".zstd", ".tar", ".gz"]
DEFAULT_SAMPLING = Path(__file__).resolve().parents[1] / "metadata" / "rpj_lm_data.yaml"
_WITHOUT_EFFECT = ("num_writers_per_node", "presort", "allow_imbalanced_write")
_FIXED_ORDER = "the output is the same for any number of workers and writers"


def make_parser() -> Parser:
    parser = Parser(prog="tokenize_shuffle.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--input", default="", help="comma-separated folders, globs or files, local or s3://…")
    add("--output", required=True, help="folder or s3:// prefix of the shards")
    add("--content_key", default="text", help="key of the text; for tars text, txt, npy (ids) or json:KEY")
    add("--no_shuffle", action="store_true", help="keep the order of the input")
    add("--seqlen", type=int, default=2048, help="tokens a model sees; a member holds one id more")
    add("--tokenizer", help=f"hub name, folder, .json or .model file (default: {DEFAULT_TOKENIZER})")
    add("--vocab_size", type=int, help="size of the vocabulary; alone (without --tokenizer) for inputs that are ids")
    add("--wds_chunk_size", type=int, default=8192, help="sequences in a shard (default: 8192)")
    add("--seed", type=int, default=42, help="of the shuffle, of --subset and of sampling (default: 42)")
    add("--subset", type=int, help="use this many of the input files, chosen by --seed")
    add("--subfraction", type=float, help="use this part (0 to 1) of the input files, chosen by --seed")
    add("--suffixes", nargs="+", default=SUFFIXES, help="which files of the input folders to read")
    add("--do_sample", action="store_true", help="repeat or leave out documents by source")
    add("--default_dataset_yaml", default=str(DEFAULT_SAMPLING), help="sources and their factors, for --do_sample")
    add("--format", default="json.gz", choices=["npy", "json.gz", "json", "txt"], help="kind of members")
    add("--ray_address", help="a running Ray cluster; by default a local Ray is started")
    add("--ray_spill_location", help="folder for intermediate files, as --work-dir")
    add("--ray_dashboard_host", help="have the local Ray show its dashboard there")
    add("--force_parallelism", type=int, help="tasks at a time (default: one for each processor)")
    add("--force_num_cores", type=int, help="processors of this machine to use")
    add("--num_writers_per_node", type=int, help="without effect: every processor writes")
    add("--presort", action="store_true", help="without effect: the order is fixed by --seed")
    add("--allow_imbalanced_write", action="store_true", help="without effect: shards are even anyway")
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; errors of the user come as open_lm.errors.UserError."""
    args = make_parser().parse_args(argv)
    from open_lm.datapreprocess.job import Layout
    from open_lm.datapreprocess.mixtures import load_mixture

    start_logging()
    warn_without_effect([f"--{name}" for name in _WITHOUT_EFFECT if getattr(args, name)], _FIXED_ORDER)
    if args.default_dataset_yaml != str(DEFAULT_SAMPLING) and not args.do_sample:
        warn_without_effect(["--default_dataset_yaml"], "which --do_sample asks for")
    if args.work_dir and args.ray_spill_location:
        warn_without_effect(["--ray_spill_location"], "--work-dir is given")
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
            [part.strip() for part in args.input.split(",") if part.strip()],
            Layout(args.output, template="{:08d}", first=1, shard_sequences=args.wds_chunk_size),
            args.tokenizer or (None if _holds_ids(args) else DEFAULT_TOKENIZER),
            args.vocab_size,
            running,
            mixture=load_mixture(args.default_dataset_yaml) if args.do_sample else None,
            suffixes=args.suffixes,
            choose=lambda inputs: choose(inputs, args.seed, args.subset, args.subfraction),
        )
    )


def _holds_ids(args: argparse.Namespace) -> bool:
    """Whether documents come as ids, so that no tokenizer is needed: the end-of-text id is 0 then."""
    return args.content_key == "npy" and args.vocab_size is not None


def _ray_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.ray_dashboard_host is None:
        return {}
    return {"include_dashboard": True, "dashboard_host": args.ray_dashboard_host}


def choose(inputs: Sequence[InputFile], seed: int, subset: int | None, subfraction: float | None) -> list[InputFile]:
    """The input files that --subset and --subfraction leave, in the order of their names."""
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
            raise ConfigError(f"--subfraction {subfraction} of {len(chosen)} input files is not even one file")
        chosen = chosen[:count]
    return sorted(chosen, key=lambda item: item.url)


if __name__ == "__main__":
    from open_lm.errors import run_cli

    raise SystemExit(run_cli(main))
