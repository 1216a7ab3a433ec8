#!/usr/bin/env python
"""Download a model of the Hugging Face hub for `python -m open_lm.hf.convert import`.

    python scripts/download.py --repo_id meta-llama/Llama-2-7b-hf --access_token TOKEN
    python scripts/download.py --repo_id meta-llama/Llama-2-7b-hf --local-mirror /mirror

The token may also come from the environment (HF_TOKEN) or from `hf auth login`; it is never printed. Repeat the command
to continue an interrupted download: complete files are kept.
"""

from __future__ import annotations

import argparse
import sys

from open_lm import storage
from open_lm.config.command_line import FlagParser
from open_lm.errors import ConfigError, StorageError, run_cli
from open_lm.hf.folders import download_model
from open_lm.system.names import user_path


def build_parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(prog="download.py", description=description, epilog=epilog, formatter_class=style)
    parser.add_argument(
        "--repo_id", "--repo-id", required=True, help="name on the hub, such as meta-llama/Llama-2-7b-hf"
    )
    parser.add_argument(
        "--access_token", "--access-token", help="token of an account with permission (default: HF_TOKEN)"
    )
    parser.add_argument(
        "--output", type=user_path, metavar="FOLDER", help="folder to write (default: checkpoints/REPO_ID)"
    )
    parser.add_argument(
        "--local-mirror",
        "--local_mirror",
        type=user_path,
        metavar="FOLDER",
        help="copy from FOLDER/REPO_ID, local or a URL, without a network",
    )
    return parser


def copy_from_mirror(mirror: str, target: str) -> int:
    """Copy the files that `target` lacks or has in another size; return their number.

    Raises:
        ConfigError: an empty or missing folder.
    """
    infos = storage.list_infos(mirror)
    if not infos:
        raise ConfigError(f"--local-mirror: found no files in {mirror}")
    copied = 0
    for info in infos:
        path = storage.join(target, info.url.rpartition("/")[2])
        existing = storage.info(path)
        if existing is None or existing.size != info.size:
            storage.copy(info.url, path)
            copied += 1
    return copied


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: a model that does not exist or needs another token.
    """
    args = build_parser().parse_args(argv)
    target = args.output or storage.join("checkpoints", args.repo_id)
    if storage.is_remote(target):
        raise StorageError(
            f"--output {target}: expected a local folder; `convert import` reads URLs and writes to them"
        )
    if args.local_mirror is not None:
        copied = copy_from_mirror(storage.join(args.local_mirror, args.repo_id), target)
        print(f"{target}: complete, {copied} files copied")
        return
    download_model(args.repo_id, folder=target, token=args.access_token)
    print(f"{target}: complete")


if __name__ == "__main__":
    sys.exit(run_cli(main))
