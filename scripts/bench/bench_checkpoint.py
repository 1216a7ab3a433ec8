"""Measure the cost of a checkpoint: how long a step waits, time until it is written, loading time, and memory.

    python scripts/bench_checkpoint.py                                      # open_lm_11m on one process, seconds
    python scripts/bench_checkpoint.py --model open_lm_411m --ranks 2       # FSDP over two processes on the CPU
    python scripts/bench_checkpoint.py --model open_lm_411m --ranks 2 --layout tensor --format sharded

Every method saves the same state: float32 weights and both moments of AdamW. A simulated training runs during
background saves: matrix products on one core, in steps of a few milliseconds. A synchronous save pauses training until
everything is written. The peak is the largest increase of resident memory during the save, on the rank where it is
largest.
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
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from resident_memory import peak_resident_bytes, reset_peak, resident_bytes
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from open_lm.checkpoint.sharded import ShardedWriter, TrainingState, load
from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.distributed.processes import build_layout, gather_objects, init_runtime
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import create_model
from open_lm.parallel.parallelize import parallelize, unwrap
from open_lm.system.names import user_path

_IDLE_STEPS = 300  # steps that are timed without a save in the background


@dataclass
class Timing:
    """The times of one save on one rank.

    pause_s: how long training waits.
    total_s: time until everything is written.
    slowdown: median step time during the save, divided by the median before it; None for synchronous saves.
    """

    pause_s: float
    total_s: float
    slowdown: float | None = None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=user_path, default="open_lm_11m", help="name of a model configuration (default: open_lm_11m)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes that the model is sharded over (default: 1)")
    parser.add_argument(
        "--layout", choices=["fsdp", "tensor"], default="fsdp", help="how the model is sharded (default: fsdp)"
    )
    parser.add_argument(
        "--format", choices=["all", "sharded", "torch"], default="all", help="which methods to measure (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="saves per method (default: 2)")
    parser.add_argument("--work-dir", type=user_path, help="folder for the files (default: a temporary one)")
    return parser


# ---------------------------------------------------------------------------------------------- the training state
def make_state(model_name: str, layout: str) -> TrainingState:
    """Return a model and AdamW with moments, on the CPU; sharded if there are several ranks."""
    ranks = dist.get_world_size()
    cfg = ParallelConfig(tensor_parallel=ranks) if layout == "tensor" else ParallelConfig(fsdp=ranks > 1)
    runtime = init_runtime(cfg)
    with torch.device("meta"):
        meta_model = create_model(ModelConfig(model=model_name))
    mesh = build_layout(runtime, cfg)
    model = unwrap(parallelize(meta_model, mesh, cfg, device=runtime.device, initialise=lambda m: init_weights(m, 0)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for param in model.parameters():
        zeros = torch.zeros_like(param, requires_grad=False)
        optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return TrainingState(model, optimizer)


def num_bytes(model: nn.Module) -> int:
    """Return the size of weights and moments, summed over all ranks."""
    return 3 * sum(param.numel() * param.element_size() for param in model.parameters())


def median_step_s(is_done: Callable[[], bool], min_steps: int = 1) -> float:
    """Run steps of the simulated training, at least `min_steps` and until `is_done`; return their median seconds."""
    matrix = torch.randn(256, 256)
    times: list[float] = []
    while len(times) < min_steps or not is_done():
        started = time.perf_counter()
        for _ in range(8):
            matrix = torch.tanh(matrix @ matrix.T / 16)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------- methods of saving
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
    return synchronous_timing(started)


def save_torch(state: TrainingState, folder: str) -> Timing:
    started = time.perf_counter()
    dcp.save(torch_state(state), storage_writer=dcp.FileSystemWriter(folder))
    return synchronous_timing(started)


def save_torch_async(state: TrainingState, group: dist.ProcessGroup, folder: str) -> Timing:
    idle_step_s = median_step_s(lambda: True, min_steps=_IDLE_STEPS)
    started = time.perf_counter()
    future: Any = dcp.async_save(torch_state(state), storage_writer=dcp.FileSystemWriter(folder), process_group=group)
    pause = time.perf_counter() - started
    step_s = median_step_s(future.done)
    future.result()
    return Timing(pause, time.perf_counter() - started, step_s / idle_step_s)


def save_ours(state: TrainingState, writer: ShardedWriter, folder: str) -> Timing:
    started = time.perf_counter()
    writer.save(state, folder, 1, wait=True)
    return synchronous_timing(started)


def save_ours_async(state: TrainingState, writer: ShardedWriter, folder: str) -> Timing:
    idle_step_s = median_step_s(lambda: True, min_steps=_IDLE_STEPS)
    started = time.perf_counter()
    writer.save(state, folder, 1)
    pause = time.perf_counter() - started
    step_s = median_step_s(lambda: not writer.busy)
    writer.wait()
    return Timing(pause, time.perf_counter() - started, step_s / idle_step_s)


def synchronous_timing(started: float) -> Timing:
    seconds = time.perf_counter() - started
    return Timing(seconds, seconds)


# ---------------------------------------------------------------------------------------------- measurement
def measure(rank: int, args: argparse.Namespace, folder: str, port: int) -> None:
    """Measure every method on one rank of a process group. Rank 0 prints the results."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=args.ranks)
    group, writer = dist.new_group(backend="gloo"), ShardedWriter()
    state = make_state(args.model, args.layout)
    size = num_bytes(state.model)
    log = print if rank == 0 else lambda *_: None
    ranks = f"{args.ranks} rank(s)" + (f" ({args.layout})" if args.ranks > 1 else "")
    log(f"{args.model}: {size / 1e9:.2f} GB of weights and moments on {ranks}, torch {torch.__version__}")
    methods: dict[str, Callable[[str], Timing]] = {}
    if args.format != "sharded":
        methods["torch.save, gathered"] = lambda to: save_gathered(state, to)
        methods["torch dcp.save"] = lambda to: save_torch(state, to)
        methods["torch dcp.async_save"] = lambda to: save_torch_async(state, group, to)
    if args.format != "torch":  # last, because the writer keeps its host buffers
        methods["ours, synchronous"] = lambda to: save_ours(state, writer, to)
        methods["ours, in the background"] = lambda to: save_ours_async(state, writer, to)
    for name, save in methods.items():
        for number in range(args.rounds):
            before, target = resident_bytes(), os.path.join(folder, f"{name}, {number}")
            reset_peak()
            dist.barrier()
            timing = save(target)
            peaks = gather_objects(max(0, peak_resident_bytes() - before))
            log(format_timing(f"{name}, save {number + 1}", timing, size, peaks))
            if name.startswith("ours") and number == args.rounds - 1:
                before = resident_bytes()
                reset_peak()
                started = time.perf_counter()
                load(state, target)
                seconds = time.perf_counter() - started
                peaks = gather_objects(max(0, peak_resident_bytes() - before))
                rate = size / seconds / 1e6
                log(f"{'  load':34} {seconds:.2f} s ({rate:.0f} MB/s), peak +{max(peaks, default=0) / 1e9:.2f} GB")
            dist.barrier()
            if rank == 0:
                shutil.rmtree(target)
    dist.destroy_process_group()


def format_timing(name: str, timing: Timing, size: int, peaks: list[int]) -> str:
    if not peaks:
        return ""  # not rank 0
    step = "" if timing.slowdown is None else f", step time x {timing.slowdown:.2f}"
    return (
        f"{name:34} pause {timing.pause_s:7.3f} s, written after {timing.total_s:7.2f} s "
        f"({size / timing.total_s / 1e6:5.0f} MB/s), peak +{max(peaks) / 1e9:.2f} GB{step}"
    )


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.work_dir) as folder:
        mp.spawn(measure, args=(args, folder, port), nprocs=args.ranks)


if __name__ == "__main__":
    main()
