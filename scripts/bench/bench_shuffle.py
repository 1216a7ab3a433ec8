"""Compare two places for the intermediate sequences of the shuffle: Ray's object store and files.

    python scripts/bench_shuffle.py --object-store 1024
    python scripts/bench_shuffle.py --object-store 128      # smaller than the data: Ray spills it

Units of sequences are split into partitions by key, and every partition is joined from all units. Both methods do the
same work; the time of only generating the sequences is shown for comparison. Files are synced and then renamed, as in
the preprocessor, so that a restart after a failure finds them; the object store's content is lost when Ray ends.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from open_lm.system.cpus import available_cpus
from open_lm.system.names import user_path

LENGTH = 2049


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--object-store", type=int, default=1024, help="size of Ray's object store in MiB (default: 1024)"
    )
    parser.add_argument("--units", type=int, default=64, help="units of 1,000 sequences of 4 kB (default: 64)")
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--workers", type=int, default=available_cpus())
    parser.add_argument("--work-dir", type=user_path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def partitions(unit: int, count: int) -> list[np.ndarray]:
    """Return the sequences of a unit, uint16 (1000, LENGTH), split by key into `count` partitions."""
    random = np.random.default_rng(unit)
    keys = np.sort(random.random(1000))
    sequences = random.integers(0, 50_000, (1000, LENGTH), dtype=np.uint16)
    return np.split(sequences, np.searchsorted(keys, np.arange(1, count) / count))


def generate(unit: int, count: int) -> int:
    return sum(map(len, partitions(unit, count)))


def write_run(unit: int, count: int, folder: str) -> list[int]:
    """Write a unit's partitions consecutively to one file; return their sizes in sequences."""
    parts = partitions(unit, count)
    path = Path(folder) / f"{unit}.run"
    with path.with_suffix(".part").open("wb") as file:
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".part").rename(path)
    return [len(part) for part in parts]


def join_files(partition: int, sizes: list[list[int]], folder: str) -> int:
    parts = []
    for unit, counts in enumerate(sizes):
        with (Path(folder) / f"{unit}.run").open("rb") as file:
            file.seek(sum(counts[:partition]) * LENGTH * 2)
            parts.append(np.frombuffer(file.read(counts[partition] * LENGTH * 2), np.uint16).reshape(-1, LENGTH))
    return join(*parts)


def join(*parts: np.ndarray) -> int:
    """Concatenate the parts in random order; return the number of sequences."""
    sequences = np.concatenate(parts)
    return len(sequences[np.random.default_rng(0).permutation(len(sequences))])


def main() -> None:
    args = make_parser().parse_args()
    import ray

    ray.init(
        address="local", num_cpus=args.workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=args.object_store << 20,
    )  # fmt: skip
    units, parts = range(args.units), range(args.partitions)

    def remote(function: Callable[..., Any], results: int = 1) -> Any:
        return ray.remote(num_cpus=1, num_returns=results)(function)

    def generate_only() -> int:
        return sum(ray.get([remote(generate).remote(unit, args.partitions) for unit in units]))

    def object_store() -> int:
        references = [remote(partitions, args.partitions).remote(unit, args.partitions) for unit in units]
        return sum(ray.get([remote(join).remote(*(unit[part] for unit in references)) for part in parts]))

    def files() -> int:
        with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
            sizes = ray.get([remote(write_run).remote(unit, args.partitions, folder) for unit in units])
            return sum(ray.get([remote(join_files).remote(part, sizes, folder) for part in parts]))

    print(f"{args.units * 1000 * LENGTH * 2 / 1e6:,.0f} MB, {args.workers} workers, store of {args.object_store} MiB")
    generate_only()  # start the workers
    for _ in range(args.rounds):
        seconds = {}
        for method in (generate_only, object_store, files):
            started = time.perf_counter()
            assert method() == args.units * 1000
            seconds[method.__name__] = time.perf_counter() - started
        print("  ".join(f"{name.replace('_', ' ')} {value:5.2f} s" for name, value in seconds.items()), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
