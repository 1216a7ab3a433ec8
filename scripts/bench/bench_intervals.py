"""Measure the bootstrap intervals of a validation next to a bootstrap that draws every token.

    python scripts/bench/bench_intervals.py --tokens 1000000 10000000 100000000 --ranks 2

The losses are random. The first table is of --val-tok-ci as a validation computes it, on 1 and on --ranks processes of
this machine: the time to collect the losses during the validation (of the slowest rank), the time of the interval
afterwards, and the peak memory of rank 0. The second is of the former method, one process that draws every token of
every resample, on the first --former-tokens of the same losses, next to the interval of the first method on them.
"""

from __future__ import annotations

import argparse
import math
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from open_lm.distributed.processes import Runtime, gather_objects
from open_lm.evaluate.intervals import LossHistogram, bootstrap_interval
from open_lm.monitor.metrics import peak_memory_bytes

_BATCH = 1 << 16


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 100_000_000], help="numbers of losses")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the shared computation (default: 2)")
    parser.add_argument("--iterations", type=int, default=10_000, help="number of resamples (default: 10000)")
    parser.add_argument("--former-tokens", type=int, default=1_000_000, help="losses of the former method; 0: omit it")
    return parser


def losses_of(batch: int, count: int) -> torch.Tensor:
    """Return the random losses (count,) float32 of a batch: half of them small, as of tokens that are easy."""
    generator = torch.Generator().manual_seed(batch)
    return -4 * torch.rand(count, generator=generator).clamp_(min=1e-7).log_() * torch.rand(count, generator=generator)


def collect(tokens: int, rank: int = 0, ranks: int = 1) -> tuple[LossHistogram, float]:
    """Return the histogram of this rank's batches, and the seconds without the generation of the losses."""
    histogram, spent_s = LossHistogram(torch.device("cpu")), 0.0
    for batch in range(rank, -(-tokens // _BATCH), ranks):
        losses = losses_of(batch, min(_BATCH, tokens - batch * _BATCH))
        start = time.perf_counter()
        histogram.add(losses, torch.ones_like(losses, dtype=torch.bool))
        spent_s += time.perf_counter() - start
    return histogram, spent_s


def measure(rank: int, ranks: int, tokens: int, iterations: int, port: int) -> None:
    """Print a row of the first table on rank 0."""
    torch.set_num_threads(1)
    timeout = timedelta(minutes=30)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=ranks, rank=rank, timeout=timeout)
    histogram, spent_s = collect(tokens, rank, ranks)
    spent = gather_objects(spent_s)
    dist.barrier()
    start = time.perf_counter()
    interval = bootstrap_interval(histogram, iterations, runtime=Runtime(rank=rank, world_size=ranks))
    interval_s = time.perf_counter() - start
    if rank == 0 and interval is not None:
        memory = peak_memory_bytes(torch.device("cpu")) / 1e6
        lower, upper = interval
        print(
            f"{tokens:>13,} {ranks:>5} {max(spent):>9.2f} {interval_s:>10.2f} {memory:>7.0f}  {lower:.6f} {upper:.6f}"
        )
    dist.destroy_process_group()


def former_interval(losses: np.ndarray, iterations: int) -> tuple[float, float]:
    """Return the interval of the mean of losses (n,), from resamples that are drawn loss by loss."""
    losses = losses.astype(np.float64)
    generator, chunk = np.random.default_rng(0), max(1, 2**22 // len(losses))
    means = [
        losses[generator.integers(len(losses), size=(min(chunk, iterations - done), len(losses)))].mean(axis=1)
        for done in range(0, iterations, chunk)
    ]
    lower, upper = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(lower), float(upper)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    print(f"{args.iterations:,} resamples\n{'tokens':>13} ranks collect s interval s peak MB  95 % interval")
    for tokens in args.tokens:
        for ranks in sorted({1, args.ranks}):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            mp.spawn(measure, (ranks, tokens, args.iterations, port), nprocs=ranks)
    if args.former_tokens:
        losses = torch.cat([losses_of(batch, _BATCH) for batch in range(-(-args.former_tokens // _BATCH))])
        losses = losses[: args.former_tokens]
        histogram = LossHistogram(torch.device("cpu"))
        histogram.add(losses, torch.ones_like(losses, dtype=torch.bool))
        methods = {"former": lambda: former_interval(losses.numpy(), args.iterations),
                   "current": lambda: bootstrap_interval(histogram, args.iterations)}  # fmt: skip
        print(f"\n{args.former_tokens:,} tokens, one process\n{'method':<8} interval s  95 % interval")
        for name, method in methods.items():
            start = time.perf_counter()
            lower, upper = method() or (math.nan, math.nan)
            print(f"{name:<8} {time.perf_counter() - start:>10.2f}  {lower:.6f} {upper:.6f}", flush=True)


if __name__ == "__main__":
    main()
