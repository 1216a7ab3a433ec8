"""Tokenize raw text into shards of fixed-length, globally shuffled sequences.

    python datapreprocess/make_2048.py --input-files raw_data/*.jsonl.zst --output-dir preproc_data

writes preproc_data/2048-v1/0/shard-0000000.tar, … with manifest.jsonl and dataset.json beside them. The same inputs,
seed and settings give the same bytes for any number of workers; started again after an interruption, it goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a script: find the package wherever it lies, and no other folder's module names
    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[0] = str(_ROOT if (_ROOT / "open_lm").is_dir() else _ROOT.parent)

from open_lm.datapreprocess.commands import (
    DEFAULT_TOKENIZER,
    Parser,
    Request,
    add_common_options,
    execute,
    start_logging,
)


def make_parser() -> Parser:
    parser = Parser(prog="make_2048.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--input-files", nargs="+", default=[], metavar="PATH",
        help="files, globs, folders or @lists of them, local or s3://…: .jsonl, .jsonl.zst, .parquet, .txt, .tar, …",
    )  # fmt: skip
    parser.add_argument("--output-dir", required=True, help="local folder or s3:// prefix to write {seqlen}-v1/… in")
    parser.add_argument(
        "--tokenizer", default=DEFAULT_TOKENIZER,
        help="hub name, folder, tokenizer .json or sentencepiece .model file (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens a model sees; a member holds one id more")
    parser.add_argument("--num-workers", type=int, help="worker processes (default and most: one for each processor)")
    parser.add_argument("--num-consumers", type=int, default=1, help="folders to spread the shards over (default: 1)")
    parser.add_argument(
        "--upload-to-s3", action="store_true",
        help="write to S3 under the environment variable S3_BASE (s3://bucket/prefix or bucket/prefix); --output-dir "
        "is then only the work folder",
    )  # fmt: skip
    parser.add_argument(
        "--format", default="npy", choices=["npy", "json.gz", "json", "txt"], help="kind of the members"
    )
    parser.add_argument("--shard-size", type=int, help="sequences in a shard (default: 8192, fewer for small data)")
    parser.add_argument("--content-key", default="text", help="key of the text; for tars text, txt, npy or json:KEY")
    parser.add_argument("--vocab-size", type=int, help="size of the vocabulary (default: the tokenizer's)")
    parser.add_argument("--seed", type=int, default=0, help="of the global shuffle (default: 0)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order of the input")
    parser.add_argument("--ray-address", help="a running Ray cluster; by default a local Ray is started")
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; errors of the user come as open_lm.errors.UserError."""
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
    """The s3:// address that S3_BASE names: s3://bucket/prefix, or bucket/prefix."""
    from open_lm.errors import ConfigError

    name = (value or "").strip().removeprefix("s3://").strip("/")
    if not name or "://" in name:
        raise ConfigError(
            "--upload-to-s3 needs the environment variable S3_BASE, as s3://bucket/prefix or bucket/prefix; "
            f"it is {value!r}"
        )
    return f"s3://{name}"


if __name__ == "__main__":
    from open_lm.errors import run_cli

    raise SystemExit(run_cli(main))
