"""Compare how fast the loader reads npy shards from S3 with a plain client that only downloads the same objects.

    python scripts/bench_s3.py                         # from this script's server; --server moto or s3://bucket/folder
    python scripts/bench_s3.py --sequences-in-shard 8192 --shards 16

The server `lean` is part of this script and runs in a separate process. It serves objects or ranges of them from the
page cache without copying, so it needs little CPU time. `moto` implements all of S3 and copies every object
several times, so the result is mostly its speed. With s3://… the shards are uploaded to that folder and not deleted.
The plain client is boto3 with as many connections as the loader has parallel downloads in one process; it neither
stores nor verifies the data. The loader makes one pass over shards that were never read before, as in training: it
verifies them and fetches every batch from the worker. It reads them in ranges with the checksums of blocks that the
preprocessor and make_wds_manifest write, and whole as from a manifest without them. Every measurement runs in a
separate process, and rounds alternate. The time runs from the first request to the last batch and includes the start
of the workers. CPU time is that of the client and its workers, without the server.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from open_lm.system.cpus import available_cpus
from open_lm.system.names import user_file, user_path

LENGTH, VOCAB_SIZE, BATCH_SIZE = 2049, 50432, 32
CONNECTIONS = 4
CHUNK_BYTES = 1 << 20
_SEND_BYTES = 256 << 10


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server", type=user_path, default="lean", help="lean, moto or a folder s3://bucket/folder (default: lean)"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes of the loader (default: 0 1 2)"
    )
    parser.add_argument("--shards", type=int, default=192, help="number of shards (default: 192)")
    parser.add_argument(
        "--sequences-in-shard", type=int, default=512, help=f"sequences of {LENGTH} tokens per shard (default: 512)"
    )
    parser.add_argument("--line-mb", type=float, default=math.inf, help="limit the lean server to this many MB/s")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each client (default: 5)")
    parser.add_argument("--work-dir", type=user_file, help="folder for the shards (default: a temporary one)")
    parser.add_argument("--part", choices=["serve", "raw", "ours"], help=argparse.SUPPRESS)  # in a separate process
    parser.add_argument("--data", type=user_path, help=argparse.SUPPRESS)
    return parser


# --- the lean server ------------------------------------------------------------------------------------------------
class _Bandwidth:
    """The bandwidth that all connections share; may be infinite."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s, self._free_at_s, self._lock = bytes_per_s, 0.0, threading.Lock()

    def wait_for(self, num_bytes: int) -> None:
        with self._lock:
            now = time.perf_counter()
            self._free_at_s = max(self._free_at_s, now) + num_bytes / self._bytes_per_s
            pause_s = self._free_at_s - now
        time.sleep(pause_s)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    root: Path
    bandwidth: _Bandwidth

    def do_GET(self) -> None:
        path = (self.root / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
        if self.root not in path.parents or not path.is_file():
            self._answer(404, {"Content-Length": "0"})
            return
        status = path.stat()
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (0, status.st_size)
        if byte_range:
            start, stop = int(byte_range[1]), min(int(byte_range[2]) + 1, status.st_size)
        headers = {"Content-Length": str(stop - start), "ETag": f'"{status.st_mtime_ns}-{status.st_size}"'}
        headers["Last-Modified"] = formatdate(status.st_mtime, usegmt=True)
        if byte_range:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{status.st_size}"
        self._answer(206 if byte_range else 200, headers)
        if self.command == "GET" and stop > start:
            with open(path, "rb") as file:
                for offset in range(start, stop, _SEND_BYTES):
                    count = min(_SEND_BYTES, stop - offset)
                    self.bandwidth.wait_for(count)
                    self.connection.sendfile(file, offset, count)

    do_HEAD = do_GET

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Disable logging, which costs CPU time."""


def serve(folder: Path, line_mb: float) -> None:
    """Serve the files folder/bucket/key until standard input is closed. Prints the port."""
    _Handler.root, _Handler.bandwidth = folder.resolve(), _Bandwidth(line_mb * 1e6)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        print(server.server_port, flush=True)
        sys.stdin.read()
        server.shutdown()


@contextlib.contextmanager
def _lean(folder: Path, line_mb: float) -> Iterator[int]:
    command = [sys.executable, __file__, "--part", "serve", "--data", str(folder), "--line-mb", str(line_mb)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


@contextlib.contextmanager
def _moto() -> Iterator[int]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


# --- the shards -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def stored_shards(args: argparse.Namespace, local: Path) -> Iterator[str]:
    """Upload the shards to the server of --server and yield the URL of their manifest."""
    if args.server == "lean":
        put_shards(args, local, str(local / "bench"))
        with _lean(local, args.line_mb) as port:
            _use_endpoint(port)
            yield "s3://bench/manifest.jsonl"
    elif args.server == "moto":
        import boto3

        with _moto() as port:
            _use_endpoint(port)
            boto3.client("s3").create_bucket(Bucket="bench")
            put_shards(args, local, "s3://bench")
            yield "s3://bench/manifest.jsonl"
    else:
        put_shards(args, local, args.server.rstrip("/"))
        yield f"{args.server.rstrip('/')}/manifest.jsonl"


def _use_endpoint(port: int) -> None:
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


def put_shards(args: argparse.Namespace, local: Path, target: str) -> None:
    """Store many copies of one shard of random ids, and their manifest; whole.jsonl lacks the checksums of blocks."""
    from open_lm import storage
    from open_lm.data.manifest import ManifestEntry, write_manifest
    from open_lm.data.shard_format import ShardWriter

    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (args.sequences_in_shard, LENGTH), dtype=np.uint16)
    with ShardWriter(local / "shard.tar", "npy") as writer:
        writer.write_numbered(0, ids)
    data = (local / "shard.tar").read_bytes()
    whole = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    stems = [f"{number:05d}" for number in range(args.shards)]
    storage.makedirs(target)
    for stem in stems:
        storage.copy(local / "shard.tar", f"{target}/{stem}.tar")
    for name, properties in (("manifest", whole | writer.info.block_sums), ("whole", whole)):
        entries = [ManifestEntry(stem, args.sequences_in_shard, properties) for stem in stems]
        write_manifest(f"{target}/{name}.jsonl", entries)


# --- measurements, each in a separate process -----------------------------------------------------------------------
def ours(args: argparse.Namespace) -> None:
    """Read one pass with the loader, up to the last full batch."""
    from open_lm.config.sections import DataConfig
    from open_lm.data.loader import build_train_loader

    (workers,) = args.workers
    data = DataConfig(dataset_manifest=[args.data], data_key="npy", workers=workers)
    loader = build_train_loader(data, seq_len=LENGTH - 1, vocab_size=VOCAB_SIZE, batch_size=BATCH_SIZE)
    (sequences,) = (source.num_sequences or 0 for source in loader.sources)
    with _measurement(sum(filter(None, loader.sources[0].num_bytes))):
        for batch, _ in loader.batches(sequences // BATCH_SIZE):
            assert batch.num_samples == BATCH_SIZE
        loader.close()


def raw(args: argparse.Namespace) -> None:
    """Download every shard and discard the data."""
    import boto3
    from botocore.config import Config

    from open_lm.data.manifest import read_manifest

    bucket, _, folder = args.data.removeprefix("s3://").rpartition("/")[0].partition("/")
    entries = read_manifest(args.data)
    client = boto3.client("s3", config=Config(max_pool_connections=CONNECTIONS))

    def download(name: str) -> None:
        body = client.get_object(Bucket=bucket, Key=f"{folder}/{name}.tar".lstrip("/"))["Body"]
        while body.read(CHUNK_BYTES):
            pass

    with _measurement(sum(entry.num_bytes or 0 for entry in entries)), ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(download, [entry.shard for entry in entries]))


@contextlib.contextmanager
def _measurement(num_bytes: int) -> Iterator[None]:
    """Print bytes, seconds and CPU seconds of the block, including child processes that ended in it."""
    started, processor_s = time.perf_counter(), _processor_s()
    yield
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {"bytes": num_bytes, "seconds": seconds, "processor_s": _processor_s() - processor_s}, allow_nan=False
        ),
        flush=True,
    )


def _processor_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --- comparison -----------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace, local: Path) -> None:
    this_script = [sys.executable, __file__, "--data"]
    with stored_shards(args, local) as manifest:
        commands = {"download only": [*this_script, manifest, "--part", "raw"]}
        for kind, name in (("in ranges", "manifest"), ("whole shards", "whole")):
            data = manifest.replace("manifest.jsonl", f"{name}.jsonl")
            for workers in args.workers:
                command = [*this_script, data, "--part", "ours", "--workers", str(workers)]
                commands[f"{kind}, {workers} workers"] = command
        results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
                results[name].append(json.loads(done.stdout.strip().rpartition("\n")[2]))
    size = results["download only"][0]["bytes"]
    print(
        f"{args.shards} shards of {size / args.shards / 1e6:.1f} MB from the server {args.server} (limit "
        f"{args.line_mb:g} MB/s), {CONNECTIONS} connections, {available_cpus()} CPU cores, medians of "
        f"{args.rounds} rounds"
    )
    print(table(results))


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return a line per client: MB/s, the ratio to the plain client's speed, and CPU seconds per GB."""
    lines = [f"{'':26}{'MB/s':>8}{'min':>8}{'max':>10}{'ratio':>8}{'CPU s/GB':>16}"]
    baseline = 0.0
    for name, rounds in results.items():
        speeds = [result["bytes"] / result["seconds"] / 1e6 for result in rounds]
        median = statistics.median(speeds)
        baseline = baseline or median
        cost = statistics.median(result["processor_s"] / result["bytes"] * 1e9 for result in rounds)
        lines.append(f"{name:26}{median:8.0f}{min(speeds):8.0f}{max(speeds):10.0f}{median / baseline:8.2f}{cost:16.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.part:
        {"serve": lambda args: serve(Path(args.data), args.line_mb), "raw": raw, "ours": ours}[args.part](args)
        return
    with tempfile.TemporaryDirectory(prefix="bench-s3-") as temporary:
        run(args, args.work_dir or Path(temporary))


if __name__ == "__main__":
    main()
