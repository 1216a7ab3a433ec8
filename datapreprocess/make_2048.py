"""Tokenize raw text into shards of fixed-length, globally shuffled sequences.

    python datapreprocess/make_2048.py --input-files raw_data/*.jsonl.zst --output-dir preproc_data

writes preproc_data/2048-v1/0/shard-0000000.tar, … with manifest.jsonl and dataset.json in the same folder. The output
depends only on the inputs, the seed and the settings, not on the number of workers. The same command resumes an
interrupted run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a script: import this copy of the package, and no modules from this folder
    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[0] = str(_ROOT if (_ROOT / "open_lm").is_dir() else _ROOT.parent)

from open_lm.datapreprocess.commands import (
    Parser,
    Request,
    add_common_options,
    execute,
    start_logging,
)
from open_lm.system.names import input_pattern, user_path
from open_lm.system.program import program_name
from open_lm.tokenizer import DEFAULT_TOKENIZER


def make_parser() -> Parser:
    """Return the parser of the command."""
    from open_lm.datapreprocess.readers import describe_suffixes

    parser = Parser(prog=program_name("make_2048.py"), description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--input-files", type=input_pattern, nargs="+", default=[], metavar="PATH",
        help="files, globs, folders, or @lists of them, local or s3://…; supported suffixes: " + describe_suffixes(),
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=user_path, required=True, help="local folder or s3:// prefix; shards go to {seqlen}-v1/…"
    )
    parser.add_argument(
        "--tokenizer", type=user_path, default=DEFAULT_TOKENIZER,
        help="hub name, folder, tokenizer .json file or sentencepiece .model file (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seqlen", type=int, default=2048,
        help="sequence length of the model; each stored sequence has one more token id (default: 2048)",
    )  # fmt: skip
    parser.add_argument("--num-workers", type=int, help="worker processes (default and maximum: one per CPU core)")
    parser.add_argument("--num-consumers", type=int, default=1, help="number of output folders (default: 1)")
    parser.add_argument(
        "--upload-to-s3", action="store_true",
        help="write to the S3 prefix in the environment variable S3_BASE (s3://bucket/prefix or bucket/prefix); "
        "--output-dir then holds only intermediate files",
    )  # fmt: skip
    parser.add_argument(
        "--format", default="npy", choices=["npy", "json.gz", "json", "txt"],
        help="format of the shard members (default: npy)",
    )  # fmt: skip
    parser.add_argument("--shard-size", type=int, help="sequences per shard (default: 8192, fewer for small data)")
    parser.add_argument(
        "--content-key", default="text",
        help="JSON key or column with the text (default: text); for tar files text, txt, npy or json:KEY",
    )  # fmt: skip
    parser.add_argument("--vocab-size", type=int, help="vocabulary size (default: the tokenizer's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the global shuffle (default: 0)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order of the input")
    parser.add_argument("--ray-address", help="address of a running Ray cluster, or `local` to start Ray")
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises open_lm.errors.UserError for invalid arguments or inputs."""
    args = make_parser().parse_args(argv)
    from open_lm import storage
    from open_lm.datapreprocess.job import Layout
    from open_lm.errors import ConfigError

    start_logging()
    if args.num_consumers < 1:
        raise ConfigError(f"--num-consumers must be at least 1, found {args.num_consumers}")
    base = s3_base(os.environ.get("S3_BASE")) if args.upload_to_s3 else args.output_dir
    folders = tuple(str(number) for number in range(args.num_consumers))
    work_dir = args.work_dir or (args.output_dir if args.upload_to_s3 else None)
    running = {"workers": args.num_workers, "work_dir": work_dir}
    layout = Layout(storage.join(base, f"{args.seqlen}-v1"), folders, shard_sequences=args.shard_size)
    execute(Request(args, "--input-files", args.input_files, layout, args.tokenizer, args.vocab_size, running))


def s3_base(value: str | None) -> str:
    """Return the value of S3_BASE (s3://bucket/prefix or bucket/prefix) as an s3:// address."""
    from open_lm.errors import ConfigError

    name = (value or "").strip().removeprefix("s3://").strip("/")
    if not name or "://" in name:
        raise ConfigError(
            f"--upload-to-s3: the environment variable S3_BASE is {value!r}, expected s3://bucket/prefix or "
            "bucket/prefix"
        )
    return f"s3://{name}"


if __name__ == "__main__":
    from open_lm.errors import run_cli

    raise SystemExit(run_cli(main))
