"""Measure what a checkpoint costs training: the pause of a step, writing in the background, loading, memory.

    python scripts/bench_checkpoint.py                                      # open_lm_11m on one process, seconds
    python scripts/bench_checkpoint.py --model open_lm_411m --ranks 2       # FSDP over two processes on the CPU
    python scripts/bench_checkpoint.py --model open_lm_411m --ranks 2 --layout tensor --format sharded

Every way saves the same: float32 weights and both moments of AdamW. A stand-in for training goes on meanwhile: matrix
products on one core, in steps of a few milliseconds. Ways that write synchronously pause for the whole of their time.
The peak of a way is the most memory that the rank with the most held at once during it, beyond what it held before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from open_lm.checkpoint.sharded import ShardedWriter, TrainingState, load
from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.distributed.processes import build_layout, gather_objects, init_runtime
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import create_model
from open_lm.parallel.parallelize import parallelize, unwrap

_QUIET_STEPS = 300


@dataclass
class Timing:
    """One rank's view of one save: the step's pause, the time until all was written, and how many times as long the
    median step was meanwhile as just before."""

    pause_s: float
    total_s: float
    slower: float | None = None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_lm_11m", help="name of a model configuration (default: open_lm_11m)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the model (default: 1)")
    parser.add_argument(
        "--layout", choices=["fsdp", "tensor"], default="fsdp", help="how they share it (default: fsdp)"
    )
    parser.add_argument(
        "--format", choices=["all", "sharded", "torch"], default="all", help="whose ways (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="saves of each way; the last is shown (default: 2)")
    parser.add_argument("--work-dir", help="folder for the files (default: a temporary one)")
    return parser


# ---------------------------------------------------------------------------------------------- what is saved
def make_state(model_name: str, layout: str) -> TrainingState:
    """A model and AdamW with moments, on the CPU; divided where there are several ranks."""
    ranks = dist.get_world_size()
    cfg = ParallelConfig(tensor_parallel=ranks) if layout == "tensor" else ParallelConfig(fsdp=ranks > 1)
    runtime = init_runtime(cfg)
    with torch.device("meta"):
        bare = create_model(ModelConfig(model=model_name))
    made = build_layout(runtime, cfg)
    model = unwrap(parallelize(bare, made, cfg, device=runtime.device, initialise=lambda new: init_weights(new, 0)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for param in model.parameters():
        zeros = torch.zeros_like(param, requires_grad=False)
        optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return TrainingState(model, optimizer)


def num_bytes(model: nn.Module) -> int:
    """Of weights and moments, over all ranks."""
    return 3 * sum(param.numel() * param.element_size() for param in model.parameters())


def steps(until: Callable[[], bool], least: int = 1) -> float:
    """Median seconds of a step of the stand-in for training, at least so many and until it is said to be enough."""
    left = torch.randn(256, 256)
    times: list[float] = []
    while len(times) < least or not until():
        started = time.perf_counter()
        for _ in range(8):
            left = torch.tanh(left @ left.T / 16)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------- ways to save it
def torch_state(state: TrainingState, full: bool = False) -> dict[str, Any]:
    assert state.optimizer is not None
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    model, optimizer = get_state_dict(state.model, state.optimizer, options=options)
    return {"model": model, "optimizer": optimizer}


def save_gathered(state: TrainingState, folder: str) -> Timing:
    started = time.perf_counter()
    content = torch_state(state, full=True)
    if dist.get_rank() == 0:
        os.makedirs(folder)
        with open(os.path.join(folder, "all.pt"), "wb") as file:
            torch.save(content, file)
            os.fsync(file.fileno())
    dist.barrier()
    return synchronous(started)


def save_torch(state: TrainingState, folder: str) -> Timing:
    started = time.perf_counter()
    dcp.save(torch_state(state), storage_writer=dcp.FileSystemWriter(folder))
    return synchronous(started)


def save_torch_async(state: TrainingState, group: dist.ProcessGroup, folder: str) -> Timing:
    quiet_s = steps(lambda: True, least=_QUIET_STEPS)
    started = time.perf_counter()
    future: Any = dcp.async_save(torch_state(state), storage_writer=dcp.FileSystemWriter(folder), process_group=group)
    pause = time.perf_counter() - started
    step_s = steps(future.done)
    future.result()
    return Timing(pause, time.perf_counter() - started, step_s / quiet_s)


def save_ours(state: TrainingState, writer: ShardedWriter, folder: str) -> Timing:
    started = time.perf_counter()
    writer.save(state, folder, 1, wait=True)
    return synchronous(started)


def save_ours_async(state: TrainingState, writer: ShardedWriter, folder: str) -> Timing:
    quiet_s = steps(lambda: True, least=_QUIET_STEPS)
    started = time.perf_counter()
    writer.save(state, folder, 1)
    pause = time.perf_counter() - started
    step_s = steps(lambda: not writer.busy)
    writer.wait()
    return Timing(pause, time.perf_counter() - started, step_s / quiet_s)


def synchronous(started: float) -> Timing:
    seconds = time.perf_counter() - started
    return Timing(seconds, seconds)


# ---------------------------------------------------------------------------------------------- measuring
def measure(rank: int, args: argparse.Namespace, folder: str, port: int) -> None:
    """One rank's part of the measurement; rank 0 prints."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=args.ranks)
    group, writer = dist.new_group(backend="gloo"), ShardedWriter()
    state = make_state(args.model, args.layout)
    size = num_bytes(state.model)
    say = print if rank == 0 else lambda *_: None
    ranks = f"{args.ranks} rank(s)" + (f" ({args.layout})" if args.ranks > 1 else "")
    say(f"{args.model}: {size / 1e9:.2f} GB of weights and moments on {ranks}, torch {torch.__version__}")
    ways: dict[str, Callable[[str], Timing]] = {}
    if args.format != "sharded":
        ways["torch.save, gathered"] = lambda to: save_gathered(state, to)
        ways["torch dcp.save"] = lambda to: save_torch(state, to)
        ways["torch dcp.async_save"] = lambda to: save_torch_async(state, group, to)
    if args.format != "torch":  # last, because its memory stays
        ways["ours, synchronous"] = lambda to: save_ours(state, writer, to)
        ways["ours, in the background"] = lambda to: save_ours_async(state, writer, to)
    for name, save in ways.items():
        for number in range(args.rounds):
            before, target = memory_gb("VmRSS"), os.path.join(folder, f"{name}, {number}")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            dist.barrier()
            timing = save(target)
            peaks = gather_objects(max(0.0, memory_gb("VmHWM") - before))
            say(described(f"{name}, save {number + 1}", timing, size, peaks))
            if name.startswith("ours") and number == args.rounds - 1:
                before = memory_gb("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")
                started = time.perf_counter()
                load(state, target)
                seconds = time.perf_counter() - started
                peaks = gather_objects(max(0.0, memory_gb("VmHWM") - before))
                rate = size / seconds / 1e6
                say(f"{'  and loaded':34} {seconds:.2f} s ({rate:.0f} MB/s), peak +{max(peaks, default=0.0):.2f} GB")
            dist.barrier()
            if rank == 0:
                shutil.rmtree(target)
    dist.destroy_process_group()


def described(name: str, timing: Timing, size: int, peaks: list[float]) -> str:
    if not peaks:
        return ""  # not rank 0
    step = "" if timing.slower is None else f", steps {timing.slower:.2f} times as long"
    return (
        f"{name:34} pause {timing.pause_s:7.3f} s, written after {timing.total_s:7.2f} s "
        f"({size / timing.total_s / 1e6:5.0f} MB/s), peak +{max(peaks):.2f} GB{step}"
    )


def memory_gb(kind: str) -> float:
    """This process's resident memory now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(kind))
    return int(found.split()[1]) * 1024 / 1e9


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.work_dir) as folder:
        mp.spawn(measure, args=(args, folder, port), nprocs=args.ranks)


if __name__ == "__main__":
    main()
