"""Measure speed and memory of the training step on many devices: LLaMA-2 7B, 16 sequences of 4096 tokens per rank.

    bash fsdp.sh                                      on the hosts of hosts.txt, or on the GPUs of this machine
    python ../launch.py --nproc-per-node 8 benchmark.py --fsdp --fsdp-amp --fsdp-zero2
    NPROC=2 bash tensor.sh --shrink                   a small model, on a CPU

All other flags are the trainer's, and the step consists of its session, optimizer and train_step. All steps train on
the same batch of random tokens, so a loss that does not fall reveals an error.

The output is a table and a line of JSON. Step times are those of the slowest rank. FLOPs are the model's, without
recomputation. MFU is their share of the devices' peak: from the data sheet, or on a CPU from a matrix product that all
ranks measure at the same time. Memory is the peak of a rank: of the allocator on CUDA, of the process on a CPU.
"""

from __future__ import annotations

import argparse
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

from bench_train_worker import time_steps, trainer_flags
from our_step import OurStep

from open_lm.config.architecture import read_architecture
from open_lm.config.command_line import parse_args
from open_lm.config.layout import MeshLayout, resolve_layout
from open_lm.config.sections import ParallelConfig
from open_lm.distributed.processes import Runtime, gather_objects, init_runtime, shutdown
from open_lm.errors import ConfigError, end_process, run_cli
from open_lm.monitor.metrics import peak_memory_bytes
from open_lm.storage import write_text
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path

SMALL = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 512}
FULL_SIZES = {"seq_length": 4096, "batch_size": 16, "steps": 10, "warmup_steps": 3}
SMALL_SIZES = {"seq_length": 64, "batch_size": 2, "steps": 4, "warmup_steps": 1}
RECIPE = ["--precision", "amp_bfloat16", "--activation-checkpointing", "full"]  # later flags win


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        type=user_path,
        default="llama2_7b",
        help="name of a model configuration, or a .json file (default: llama2_7b)",
    )
    add("--seq-length", type=int, metavar="N", help="tokens per sequence (default: 4096)")
    add("--batch-size", type=int, metavar="N", help="sequences per micro-batch and rank (default: 16)")
    add("--steps", type=int, metavar="N", help="measured steps (default: 10)")
    add("--warmup-steps", type=int, metavar="N", help="steps before the measured ones, at least 1 (default: 3)")
    add("--layers", type=int, metavar="N", help="number of layers (default: the model's)")
    add("--shrink", action="store_true", help="for a test: use a small model, short sequences and few steps")
    return parser


@dataclass(frozen=True)
class Sizes:
    seq_length: int
    batch_size: int
    steps: int
    warmup_steps: int


def resolve_sizes(args: argparse.Namespace) -> Sizes:
    """Return the sizes of the measurement. Raise ConfigError if one is below 1."""
    defaults = SMALL_SIZES if args.shrink else FULL_SIZES
    sizes = {
        name: default if getattr(args, name) is None else getattr(args, name) for name, default in defaults.items()
    }
    if min(*sizes.values(), args.layers or 1) < 1:
        raise ConfigError("--seq-length, --batch-size, --steps, --warmup-steps, --layers: expected at least 1")
    return Sizes(**sizes)


def model_shape(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """Return the model's configuration with the sizes of the measurement."""
    layers = {} if args.layers is None else {"n_layers": args.layers}
    return {**read_architecture(args.model), **(SMALL if args.shrink else {}), "seq_len": sizes.seq_length, **layers}


# --- measurement ----------------------------------------------------------------------------------------------------
def random_batch(
    layout: MeshLayout, batch_size: int, sizes: Sizes, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B,T), the same on ranks with the same data-parallel rank."""
    generator = torch.Generator().manual_seed(layout.data_rank)
    ids = torch.randint(vocab_size, (batch_size, sizes.seq_length + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def measure(args: argparse.Namespace, flags: Sequence[str], runtime: Runtime) -> dict[str, Any] | None:
    """Measure on all ranks. Collective.

    Return the results on rank 0 and None on all other ranks.
    """
    sizes = resolve_sizes(args)
    shape = model_shape(args, sizes)
    settings = parse_args([*RECIPE, *flags])
    parallel = ParallelConfig.from_object(settings)
    layout = resolve_layout(parallel, runtime.world_size, runtime.local_world_size, runtime.rank)
    local_batch = sizes.batch_size * settings.accum_freq
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        model = Path(folder) / f"{Path(args.model).stem}.json"
        write_text(model, to_json(shape))
        step = OurStep(trainer_flags(str(model), local_batch * layout.data_size, [*RECIPE, *flags]))
    batch = random_batch(layout, local_batch, sizes, shape["vocab_size"], runtime.device)
    _, first_loss = time_steps(step, [batch])
    time_steps(step, [batch] * sizes.warmup_steps)
    seconds, last_loss = time_steps(step, [batch] * sizes.steps)
    trainer = step.trainer
    ranks = gather_objects((seconds, peak_memory_bytes(runtime.device), trainer.peak_flops))
    if not runtime.is_master:
        return None
    step_s = [max(times) for times in zip(*(rank[0] for rank in ranks), strict=True)]
    memory = [rank[1] for rank in ranks]
    peaks = [rank[2] for rank in ranks if rank[2] is not None]
    assert trainer.flops_per_token is not None
    speed = local_batch * layout.data_size * sizes.seq_length / statistics.median(step_s)
    flops = speed * trainer.flops_per_token / runtime.world_size
    peak = statistics.mean(peaks) if len(peaks) == len(ranks) else None
    return {
        "model": Path(args.model).stem + (" (shrunk)" if args.shrink else ""),
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "strategy": describe_strategy(parallel, layout),
        "ranks": runtime.world_size,
        "mesh": {name: getattr(layout, name) for name in ("replicate", "shard", "context", "tensor")},
        "sequence_tokens": sizes.seq_length,
        "sequences_per_step": local_batch * layout.data_size,
        "tokens_per_second": speed,
        "tokens_per_second_per_device": speed / runtime.world_size,
        "tflops_per_device": flops / 1e12,
        "mfu": None if peak is None else flops / peak,
        "peak_tflops": None if peak is None else peak / 1e12,
        "step_s": {"median": statistics.median(step_s), "min": min(step_s), "max": max(step_s), "steps": len(step_s)},
        "memory_bytes": {"max": max(memory), "min": min(memory)},
        "loss": {"first": first_loss, "last": last_loss},
        "flags": [*RECIPE, *flags],
        **device_versions(runtime.device),
    }  # fmt: skip


def describe_strategy(parallel: ParallelConfig, layout: MeshLayout) -> str:
    """Return the usual name of the strategy, such as "ZeRO-3, hybrid"."""
    keeps_parameters = parallel.fsdp_zero2 or parallel.fsdp_hybrid_o2
    words = [("ZeRO-2" if keeps_parameters else "ZeRO-3") if parallel.fsdp else "replicated"]
    words += ["hybrid"] if parallel.fsdp_hybrid or parallel.fsdp_hybrid_o2 else []
    words += ["offload"] if parallel.fsdp_cpu_offload else []
    words += [f"{name} {n}" for name, n in (("context", layout.context), ("tensor", layout.tensor)) if n > 1]
    return ", ".join(words)


def device_versions(device: torch.device) -> dict[str, Any]:
    versions: dict[str, Any] = {"torch": torch.__version__, "device": "CPU", "threads": torch.get_num_threads()}
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "nccl": nccl}
    return versions


# --- report ---------------------------------------------------------------------------------------------------------
def format_table(result: dict[str, Any]) -> str:
    step, memory, loss, mesh = result["step_s"], result["memory_bytes"], result["loss"], result["mesh"]
    peak = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%} of {result['peak_tflops']:.4g} TFLOP/s"
    lines = {
        "model": f"{result['model']}, {result['parameters'] / 1e6:,.1f} million parameters",
        "strategy": f"{result['strategy']}: " + " x ".join(f"{name} {size}" for name, size in mesh.items()),
        "devices": f"{result['ranks']} x {result['device']}, torch {result['torch']}",
        "batch": f"{result['sequences_per_step']} sequences of {result['sequence_tokens']} tokens per step",
        "step": f"{step['median']:.3f} s ({step['min']:.3f} to {step['max']:.3f}, {step['steps']} steps)",
        "tokens/s": f"{result['tokens_per_second']:,.0f}, {result['tokens_per_second_per_device']:,.0f} per device",
        "TFLOP/s": f"{result['tflops_per_device']:.4g} per device{peak}",
        "memory": f"{memory['min'] / 2**30:.2f} to {memory['max'] / 2**30:.2f} GiB per rank",
        "loss": f"{loss['first']:.3f} at the first step, {loss['last']:.3f} at the last, on the same batch",
    }
    return "\n".join(f"{name:10}{value}" for name, value in lines.items())


def main(argv: Sequence[str]) -> None:
    args, flags = make_parser().parse_known_args(argv)
    resolve_sizes(args)
    runtime = init_runtime(ParallelConfig.from_object(parse_args([*RECIPE, *flags])))
    try:
        result = measure(args, flags, runtime)
    finally:
        shutdown(runtime)
    if result is not None:
        print(f"{format_table(result)}\n{to_json(result)}", flush=True)


if __name__ == "__main__":
    end_process(run_cli(main))
