"""Make the manifest.jsonl of a folder of shards that has none: counts the sequences of every shard.

python -m open_lm.utils.make_wds_manifest --data-dir s3://bucket/tokenized/
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from open_lm import storage
from open_lm.data.shard_format import ManifestEntry, index_shard, shard_stem, write_manifest
from open_lm.errors import ConfigError, DataError, UserError, join_problems, run_cli


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="make_wds_manifest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder of shards, local or s3://…")
    parser.add_argument("--manifest-filename", default="manifest.jsonl", help="name of the file made in that folder")
    parser.add_argument("--num-workers", type=int, default=2, help="shards looked through at a time (default: 2)")
    parser.add_argument("--tmp-dir", help="folder for a copy of each remote shard (default: the system's)")
    return parser


def count_sequences(url: str, tmp_dir: str | None = None) -> int:
    """The sequences in one shard; DataError for a shard that is broken or cut short.

    A remote shard is copied to `tmp_dir` first: its headers lie spread over the whole file.
    """
    if not storage.is_remote(url):
        return _count(storage.local_path(url), url)
    with tempfile.TemporaryDirectory(dir=tmp_dir) as folder:
        path = os.path.join(folder, "shard.tar")
        storage.download(url, path)
        return _count(path, url)


def _count(path: str, name: str) -> int:
    with open(path, "rb") as file:
        members = index_shard(file, name)
    kinds = {member.kind for member in members}
    keys = {member.key for member in members}
    if len(kinds) > 1 and len(keys) < len(members):  # one sample stored in several kinds is still one sample
        return len(keys)
    return len(members)


def make_manifest(data_dir: str, filename: str = "manifest.jsonl", workers: int = 2, tmp_dir: str | None = None) -> int:
    """Write the manifest of a folder; returns the number of sequences. DataError lists every broken shard."""
    urls = [url for url in storage.list_files(data_dir) if url.endswith(".tar")]
    if not urls:
        raise DataError(f"--data-dir {data_dir}: no .tar file in this folder")
    if workers < 1:
        raise ConfigError(f"--num-workers must be at least 1, found {workers}")
    if tmp_dir is not None:
        storage.makedirs(tmp_dir)
    entries: list[ManifestEntry] = []
    problems: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(partial(count_sequences, url, tmp_dir)) for url in urls]
        for number, (url, future) in enumerate(zip(urls, futures, strict=True), start=1):
            try:
                entries.append(ManifestEntry(shard_stem(url), future.result()))
            except UserError as error:
                problems.append(str(error))
            if number % 100 == 0:
                print(f"{number} of {len(urls)} shards", file=sys.stderr, flush=True)
    if problems:
        raise DataError(join_problems(problems, "No manifest was written: some shards cannot be used"))
    write_manifest(storage.join(data_dir, filename), entries)
    return sum(entry.num_sequences for entry in entries)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    total = make_manifest(args.data_dir, args.manifest_filename, args.num_workers, args.tmp_dir)
    print(f"{storage.join(args.data_dir, args.manifest_filename)}: {total:,} sequences")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
