"""Measure the start of the data loader: bytes and seconds before the first batch, peak disk and memory of each rank.

    python scripts/bench/bench_data_start.py                       # local shards and the S3 server of bench_s3.py
    python scripts/bench/bench_data_start.py --lanes 512 --shards 1024 --ranks 1 2 4

The shards hold random ids, in npy members of one size, and the manifest has checksums of their blocks. Every rank is a
process that reads its batches and drops them; all ranks run on this machine, as one node. "start" is the time from the
call of `build_train_loader` to the first batch, and "start MB" is what the server had sent by then (local shards: the
bytes of blocks verified are not counted). "disk MB" is the largest size of the temporary folder during the run, "RSS
MB" the largest peak memory of a rank, without its workers. "whole" disables the checksums of blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path

import bench_s3
import numpy as np

from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_file

LENGTH, VOCAB_SIZE = 2049, 50432


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=64, help="sequences of a global batch (default: 64)")
    parser.add_argument("--shards", type=int, default=128, help="number of shards (default: 128)")
    parser.add_argument("--sequences", type=int, default=1024, help=f"sequences of {LENGTH} ids per shard")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=64, help="global batches that are read (default: 64)")
    parser.add_argument("--line-mb", type=float, default=100, help="limit of the S3 server in MB/s (default: 100)")
    parser.add_argument("--work-dir", type=user_file, help="folder for the shards (default: a temporary one)")
    parser.add_argument("--read", help=argparse.SUPPRESS)  # in a separate process
    return parser


def make_data(folder: Path, shards: int, sequences: int) -> None:
    """Write the shards and two manifests: manifest.jsonl, and whole.jsonl without the checksums of blocks."""
    from open_lm.data.shard_format import ManifestEntry, ShardWriter, write_manifest

    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (sequences, LENGTH), dtype=np.uint16)
    entries = []
    for number in range(shards):
        with ShardWriter(folder / f"{number:05d}.tar", "npy") as writer:
            writer.write_numbered(number * sequences, np.roll(ids, number, axis=0))
        known = {"num_bytes": writer.info.num_bytes, "sha256": writer.info.sha256}
        entries.append((f"{number:05d}", known, writer.info.block_sums))
    for name, has_blocks in (("manifest.jsonl", True), ("whole.jsonl", False)):
        lines = [ManifestEntry(stem, sequences, known | (sums if has_blocks else {})) for stem, known, sums in entries]
        write_manifest(folder / name, lines)


def read(manifest: str, batch: int, steps: int) -> None:
    """Read this rank's batches; print the seconds to the first one, wait for a line of input, then read the others."""
    from open_lm.config.sections import DataConfig
    from open_lm.data.loader import build_train_loader

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    print(flush=True)
    input()
    started = time.perf_counter()
    data = DataConfig(dataset_manifest=[manifest], data_key="npy", workers=0)
    loader = build_train_loader(
        data,
        seq_len=LENGTH - 1,
        vocab_size=VOCAB_SIZE,
        batch_size=batch // world_size,
        rank=rank,
        world_size=world_size,
    )
    batches = loader.batches(steps)
    next(batches)
    print(time.perf_counter() - started, flush=True)
    input()
    for _ in batches:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(to_json({"seconds": time.perf_counter() - started, "peak_bytes": peak}), flush=True)


class _Handler(bench_s3._Handler):
    """Counts the bytes of shards that are sent."""

    sent = 0
    lock = threading.Lock()

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        if self.command == "GET" and self.path.endswith(".tar"):
            with _Handler.lock:
                _Handler.sent += int(headers["Content-Length"])
        super()._answer(status, headers)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Do not print a traceback when a client closes its connection."""


@contextlib.contextmanager
def serving(root: Path, line_mb: float) -> Iterator[str]:
    """Serve the files below `root` at the yielded URL."""
    _Handler.root, _Handler.bandwidth = root, bench_s3._Bandwidth(line_mb * 1e6)
    server = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def folder_bytes(folder: Path) -> int:
    """Return the bytes that files below a folder occupy on the disk."""
    total = 0
    for parent, _, names in os.walk(folder):  # a rank may remove files meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total


def measure(args: argparse.Namespace, manifest: str, world_size: int, endpoint: str) -> str:
    """Run the ranks on a manifest; return the columns of the table."""
    with tempfile.TemporaryDirectory(prefix="bench-start-") as temporary:
        env = os.environ | {
            "TMPDIR": temporary, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        command = [sys.executable, __file__, "--read", manifest, "--lanes", str(args.lanes), "--steps", str(args.steps)]
        pipe = subprocess.PIPE
        ranks = [
            subprocess.Popen(command, env={**env, "RANK": str(rank)}, stdin=pipe, stdout=pipe, text=True)
            for rank in range(world_size)
        ]

        def exchange() -> list[str]:
            """Read a line of each rank, and let them continue."""
            lines = [rank.stdout.readline() for rank in ranks if rank.stdout]
            first_sent.append(_Handler.sent)
            for rank in ranks:
                assert rank.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    rank.stdin.write("\n")
                    rank.stdin.flush()
            return lines

        first_sent: list[int] = []
        exchange()
        start_s = max(map(float, exchange()))
        peak_disk = 0
        while any(rank.poll() is None for rank in ranks):
            peak_disk = max(peak_disk, folder_bytes(Path(temporary)))
            time.sleep(0.02)
        results = [json.loads(rank.stdout.read()) for rank in ranks if rank.stdout]
    start_bytes, all_bytes = first_sent[1] - first_sent[0], _Handler.sent - first_sent[0]
    peak = max(result["peak_bytes"] for result in results)
    seconds = max(result["seconds"] for result in results)
    numbers = (start_s, start_bytes / 1e6, all_bytes / 1e6, seconds, peak_disk / 1e6, peak / 1e6)
    return "".join(f"{number:10.1f}" for number in numbers)


def run(args: argparse.Namespace, root: Path) -> None:
    make_data(root / "bucket" / "d", args.shards, args.sequences)
    size = sum(path.stat().st_size for path in (root / "bucket" / "d").glob("*.tar"))
    print(f"{args.shards} shards of {size / args.shards / 1e6:.1f} MB, {args.lanes} lanes, {args.steps} batches; S3 at "
          f"{args.line_mb:g} MB/s")  # fmt: skip
    heads = ("start s", "start MB", "MB", "s", "disk MB", "RSS MB")
    print(f"{'':16}{'ranks':>6}" + "".join(f"{head:>10}" for head in heads), flush=True)
    with serving(root, args.line_mb) as endpoint:
        for place, folder in (("local", root / "bucket" / "d"), ("S3", "s3://bucket/d")):
            for kind, name in (("ranges", "manifest.jsonl"), ("whole", "whole.jsonl")):
                for world_size in args.ranks:
                    columns = measure(args, f"{folder}/{name}", world_size, endpoint)
                    print(f"{place + ', ' + kind:16}{world_size:6}{columns}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.read:
        read(args.read, args.lanes, args.steps)
        return
    with tempfile.TemporaryDirectory(prefix="bench-start-data-") as temporary:
        run(args, (args.work_dir or Path(temporary)) / "store")


if __name__ == "__main__":
    main()
