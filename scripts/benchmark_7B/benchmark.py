"""Speed and memory of the training step on many devices: LLaMA-2 7B, sequences of 4096 tokens, 16 of them on each rank.

    bash fsdp.sh                                      on the hosts of hosts.txt, or the GPUs of this machine
    python ../launch.py --nproc-per-node 8 benchmark.py --fsdp --fsdp-amp --fsdp-zero2
    NPROC=2 bash tensor.sh --shrink                   a small model, on a CPU

Flags that are not named here are the trainer's own, and so is the step: its session, optimizer and train_step. All
steps train on one batch of random tokens, so that a loss that does not fall shows that something is wrong.

Printed are a table and a line of JSON. Times are those of the slowest rank. FLOPs are the model's, without
recomputation; MFU is their share of the devices' peak, that of the makers' data sheets, and on a CPU
of a matrix product measured on all ranks at once. Memory is the most of a rank: on CUDA of the allocator, on a CPU of
the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from bench_train_worker import timed, trainer_flags
from our_step import OurStep

from open_lm.config.architecture import read_architecture
from open_lm.config.command_line import parse_args
from open_lm.config.layout import MeshLayout, resolve_layout
from open_lm.config.sections import ParallelConfig
from open_lm.distributed.processes import Runtime, gather_objects, init_runtime, shutdown
from open_lm.errors import ConfigError, end_process, run_cli
from open_lm.monitor.metrics import peak_memory_bytes
from open_lm.storage import write_text

SMALL = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 512}
FULL_SIZES = {"seq_length": 4096, "batch_size": 16, "steps": 10, "warmup_steps": 3}
SMALL_SIZES = {"seq_length": 64, "batch_size": 2, "steps": 4, "warmup_steps": 1}
RECIPE = ["--precision", "amp_bfloat16", "--activation-checkpointing", "full"]  # later flags win


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="llama2_7b", help="name of a configuration, or a .json file (default: llama2_7b)")
    add("--seq-length", type=int, metavar="N", help="tokens of a sequence (default: 4096)")
    add("--batch-size", type=int, metavar="N", help="sequences of a micro-batch on each rank (default: 16)")
    add("--steps", type=int, metavar="N", help="that count (default: 10)")
    add("--warmup-steps", type=int, metavar="N", help="before them, 1 at least (default: 3)")
    add("--layers", type=int, metavar="N", help="of the model, in place of all")
    add("--shrink", action="store_true", help="a small model, short sequences and few steps, to try it out")
    return parser


@dataclass(frozen=True)
class Sizes:
    seq_length: int
    batch_size: int
    steps: int
    warmup_steps: int


def sizes_of(args: argparse.Namespace) -> Sizes:
    """ConfigError where one is below 1."""
    defaults = SMALL_SIZES if args.shrink else FULL_SIZES
    sizes = {
        name: default if getattr(args, name) is None else getattr(args, name) for name, default in defaults.items()
    }
    if min(*sizes.values(), args.layers or 1) < 1:
        raise ConfigError("--seq-length, --batch-size, --steps, --warmup-steps, --layers: expected 1 at least")
    return Sizes(**sizes)


def shape_of(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """The model's configuration with what is changed of it."""
    layers = {} if args.layers is None else {"n_layers": args.layers}
    return {**read_architecture(args.model), **(SMALL if args.shrink else {}), "seq_len": sizes.seq_length, **layers}


# --- measuring ------------------------------------------------------------------------------------------------------
def random_batch(
    layout: MeshLayout, rows: int, sizes: Sizes, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B,T): ranks that share rows have the same."""
    generator = torch.Generator().manual_seed(layout.data_rank)
    ids = torch.randint(vocab_size, (rows, sizes.seq_length + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def measure(args: argparse.Namespace, flags: Sequence[str], runtime: Runtime) -> dict[str, Any] | None:
    """All figures on rank 0, None elsewhere. Collective."""
    sizes = sizes_of(args)
    shape = shape_of(args, sizes)
    settings = parse_args([*RECIPE, *flags])
    parallel = ParallelConfig.from_object(settings)
    layout = resolve_layout(parallel, runtime.world_size, runtime.local_world_size, runtime.rank)
    rows = sizes.batch_size * settings.accum_freq
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        model = Path(folder) / f"{Path(args.model).stem}.json"
        write_text(model, json.dumps(shape))
        step = OurStep(trainer_flags(str(model), rows * layout.data_size, [*RECIPE, *flags]))
    batch = random_batch(layout, rows, sizes, shape["vocab_size"], runtime.device)
    _, first_loss = timed(step, [batch])
    timed(step, [batch] * sizes.warmup_steps)
    seconds, last_loss = timed(step, [batch] * sizes.steps)
    trainer = step.trainer
    ranks = gather_objects((seconds, peak_memory_bytes(runtime.device), trainer.peak_flops))
    if not runtime.is_master:
        return None
    step_s = [max(times) for times in zip(*(rank[0] for rank in ranks), strict=True)]
    memory = [rank[1] for rank in ranks]
    peaks = [rank[2] for rank in ranks if rank[2] is not None]
    assert trainer.flops_per_token is not None
    speed = rows * layout.data_size * sizes.seq_length / statistics.median(step_s)
    flops = speed * trainer.flops_per_token / runtime.world_size
    peak = statistics.mean(peaks) if len(peaks) == len(ranks) else None
    return {
        "model": Path(args.model).stem + (" (shrunk)" if args.shrink else ""),
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "strategy": strategy(parallel, layout),
        "ranks": runtime.world_size,
        "mesh": {name: getattr(layout, name) for name in ("replicate", "shard", "context", "tensor")},
        "sequence_tokens": sizes.seq_length,
        "sequences_per_step": rows * layout.data_size,
        "tokens_per_second": speed,
        "tokens_per_second_per_device": speed / runtime.world_size,
        "tflops_per_device": flops / 1e12,
        "mfu": None if peak is None else flops / peak,
        "peak_tflops": None if peak is None else peak / 1e12,
        "step_s": {"median": statistics.median(step_s), "min": min(step_s), "max": max(step_s), "steps": len(step_s)},
        "memory_bytes": {"max": max(memory), "min": min(memory)},
        "loss": {"first": first_loss, "last": last_loss},
        "flags": [*RECIPE, *flags],
        **versions(runtime.device),
    }  # fmt: skip


def strategy(parallel: ParallelConfig, layout: MeshLayout) -> str:
    """In the usual words."""
    gathered = parallel.fsdp_zero2 or parallel.fsdp_hybrid_o2
    words = [("ZeRO-2" if gathered else "ZeRO-3") if parallel.fsdp else "replicated"]
    words += ["hybrid"] if parallel.fsdp_hybrid or parallel.fsdp_hybrid_o2 else []
    words += ["offload"] if parallel.fsdp_cpu_offload else []
    words += [f"{name} {n}" for name, n in (("context", layout.context), ("tensor", layout.tensor)) if n > 1]
    return ", ".join(words)


def versions(device: torch.device) -> dict[str, Any]:
    said: dict[str, Any] = {"torch": torch.__version__, "device": "CPU", "threads": torch.get_num_threads()}
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        said |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "nccl": nccl}
    return said


# --- what is said ---------------------------------------------------------------------------------------------------
def table(found: dict[str, Any]) -> str:
    step, memory, loss, mesh = found["step_s"], found["memory_bytes"], found["loss"], found["mesh"]
    peak = "" if found["mfu"] is None else f", {found['mfu']:.1%} (MFU) of {found['peak_tflops']:.4g} TFLOP/s"
    rows = {
        "model": f"{found['model']}, {found['parameters'] / 1e6:,.1f} million parameters",
        "strategy": f"{found['strategy']}: " + " x ".join(f"{name} {size}" for name, size in mesh.items()),
        "devices": f"{found['ranks']} x {found['device']}, torch {found['torch']}",
        "batch": f"{found['sequences_per_step']} sequences of {found['sequence_tokens']} tokens a step",
        "step": f"{step['median']:.3f} s ({step['min']:.3f} to {step['max']:.3f}, {step['steps']} steps)",
        "tokens/s": f"{found['tokens_per_second']:,.0f}, a device {found['tokens_per_second_per_device']:,.0f}",
        "TFLOP/s": f"{found['tflops_per_device']:.4g} a device{peak}",
        "memory": f"{memory['max'] / 2**30:.2f} GiB a rank at most, {memory['min'] / 2**30:.2f} at least",
        "loss": f"{loss['first']:.3f} at first, {loss['last']:.3f} at last, of the same batch",
    }
    return "\n".join(f"{name:10}{value}" for name, value in rows.items())


def main(argv: Sequence[str]) -> None:
    args, flags = make_parser().parse_known_args(argv)
    sizes_of(args)
    runtime = init_runtime(ParallelConfig.from_object(parse_args([*RECIPE, *flags])))
    try:
        found = measure(args, flags, runtime)
    finally:
        shutdown(runtime)
    if found is not None:
        print(f"{table(found)}\n{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    end_process(run_cli(main))
