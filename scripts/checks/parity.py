"""Compare the training of every parallel layout with a single process, on CPU in float32.

    python scripts/parity.py                    20 steps, two sets of options per layout
    python scripts/parity.py --sets 8 --layout tensor_fsdp

Trains a small model in each layout with several sets of options. For each layout, prints the largest difference of the
losses and gradient norms of all steps, and of the final logits, from those of a single process. The exit code is 1 if a
difference exceeds 1e-4, relative to values above 1.

Mixtures of experts are compared only with settings whose result does not depend on the layout. Each rank applies the
expert capacity and the balancing loss to its own micro-batch. Therefore a limiting capacity and the balancing loss are
used only in layouts where all ranks process the same tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import Optimizer

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import ModelConfig, OptimConfig, ParallelConfig
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime, build_layout, init_runtime, shutdown
from open_lm.errors import end_process
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.build import build_optimizer
from open_lm.optim.muon import Muon
from open_lm.optim.schedules import build_scheduler
from open_lm.parallel.parallelize import evaluation_mode, parallelize
from open_lm.storage.strict_json import to_json
from open_lm.training.step import StepOptions, train_step

BATCH_SIZE, END_OF_TEXT, TOLERANCE = 16, 3, 1e-4
EXPERTS, TOP_K = 4, 2
NUM_CANDIDATES = 60  # random pairs of option sets; the pair with the most new combinations is used
# Modules that the fork server imports once for all ranks.
PRELOADED_MODULES = [
    "open_lm.training.run",
    "open_lm.training.build",
    "open_lm.training.trainer",
    "open_lm.checkpoint",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.attention.bias",
]

EVERY = {"accum_reduce": "every-micro-batch"}
# Layout name -> (number of ranks, settings). The words of a name are the kinds of the layout; see `kinds`.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    "static_graph": (2, {"ddp_static_graph": True}),
    "fsdp": (2, {"fsdp": True}),
    "prefetch": (2, {"fsdp": True, "fsdp_backward_prefetch": True}),
    "zero2": (2, {"fsdp": True, "fsdp_zero2": True}),
    "offload": (2, {"fsdp": True, "fsdp_cpu_offload": True}),
    "tensor": (2, {"tensor_parallel": 2}),
    "context": (2, {"context_parallel": 2}),
    "hybrid": (4, {"fsdp": True, "mesh_dim": "2,2,1"}),
    "hybrid_zero2": (4, {"fsdp": True, "mesh_dim": "-1,2,1", "fsdp_zero2": True}),
    "tensor_data": (4, {"tensor_parallel": 2}),
    "tensor_fsdp": (4, {"fsdp": True, "tensor_parallel": 2}),
    "tensor_zero2": (4, {"fsdp": True, "mesh_dim": "1,-1,2", "fsdp_zero2": True, "fsdp_backward_prefetch": True}),
    "tensor_offload": (4, {"fsdp": True, "tensor_parallel": 2, "fsdp_cpu_offload": True}),
    "tensor_4": (4, {"tensor_parallel": 4}),
    "context_data": (4, {"context_parallel": 2}),
    "context_fsdp": (4, {"fsdp": True, "context_parallel": 2}),
    "context_tensor": (4, {"context_parallel": 2, "tensor_parallel": 2}),
    "context_4": (4, {"context_parallel": 4}),
    "ddp_8": (8, {}),
    "tensor_hybrid": (8, {"fsdp": True, "mesh_dim": "2,2,2"}),
    "tensor_4_fsdp": (8, {"fsdp": True, "tensor_parallel": 4, "fsdp_zero2": True}),
    "context_tensor_fsdp": (8, {"fsdp": True, "context_parallel": 2, "tensor_parallel": 2}),
    "context_hybrid": (8, {"fsdp": True, "mesh_dim": "2,2,1", "context_parallel": 2}),
    "context_tensor_hybrid": (8, {"fsdp": True, "mesh_dim": "2,1,2", "context_parallel": 2}),
    "fsdp_every": (2, {"fsdp": True, **EVERY}),
    "offload_every": (2, {"fsdp": True, "fsdp_cpu_offload": True, **EVERY}),
    "hybrid_every": (4, {"fsdp": True, "mesh_dim": "2,2,1", "fsdp_zero2": True, **EVERY}),
    "tensor_every": (4, {"fsdp": True, "tensor_parallel": 2, **EVERY}),
    "context_every": (4, {"fsdp": True, "context_parallel": 2, **EVERY}),
    "expert": (2, {"fsdp": True, "expert_parallel": 2}),
    "expert_fsdp": (4, {"fsdp": True, "expert_parallel": 2, "fsdp_zero2": True, "fsdp_backward_prefetch": True}),
    "expert_hybrid": (4, {"fsdp": True, "expert_parallel": 2, "mesh_dim": "2,2,1"}),
    "expert_context": (4, {"fsdp": True, "expert_parallel": 4, "context_parallel": 2}),
    "expert_every": (4, {"fsdp": True, "expert_parallel": 2, **EVERY}),
}

# Layouts that use the size "87m" instead of "odd". Its width is that of open_lm_87m, which is slow to train.
WIDE = ("tensor_data", "hybrid_zero2", "context_tensor_fsdp")

# The values of each option. A set of options has one value for each.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "accum_freq": (1, 2),
    "masked": (False, True),
    "documents": (False, True),
    "z_loss": (0.0, 1e-3),
    "clip": (None, 0.5),
    "optimizer": ("adamw", "muon"),
    "no_decay_norms": (False, True),
    "schedule": ("cosine", "wsd"),
    "checkpointing": ("none", "full", "op", "2"),
    "size": ("even", "odd"),
    "qk_norm": (False, True),
    "tied": (False, True),
    "ffn_type": ("swiglu", "gelu", "gemma_geglu"),
    "experts": ("none", "unbounded", "bounded"),
    "model_norm": ("default_layer_norm", "rms_norm", "gain_only_lp_layer_norm"),
    "positions": ("rotary", "head_rotary", "llama_rotary", "none"),
}

# The odd sizes have 12 heads whose total width is smaller than the model width, as in open_lm_87m, and a vocabulary
# size and sequence length that are prime.
SIZES: dict[str, dict[str, int]] = {
    "even": {"dim": 32, "n_heads": 4, "vocab_size": 40, "seq_len": 16},
    "odd": {"dim": 76, "n_heads": 12, "vocab_size": 31, "seq_len": 11},
    "87m": {"dim": 488, "n_heads": 12, "vocab_size": 31, "seq_len": 11},
}


def cases(per_layout: int) -> list[dict[str, Any]]:
    """Return `per_layout` option sets for each layout.

    The sets come in pairs: the second set has the next value of every option. So every layout is tested with both
    values of each two-valued option. The pairs are chosen to cover as many combinations of two option values as
    possible in each kind of layout.
    """
    rng = random.Random(0)
    chosen: list[dict[str, Any]] = []
    covered: set[tuple[Any, ...]] = set()
    for layout in LAYOUTS:
        for _ in range(per_layout // 2):
            candidates = [_random_pair(layout, rng) for _ in range(NUM_CANDIDATES)]
            best = max(candidates, key=lambda pair: len(combined_options(pair) - covered))
            covered |= combined_options(best)
            chosen += best
    return [{**case, "size": "87m"} if case["size"] == "odd" and case["layout"] in WIDE else case for case in chosen]


def _random_pair(layout: str, rng: random.Random) -> list[dict[str, Any]]:
    first = {name: rng.randrange(len(values)) for name, values in OPTIONS.items()}
    sets = [{name: values[(first[name] + shift) % len(values)] for name, values in OPTIONS.items()} for shift in (0, 1)]
    return [{"layout": layout, **options} for options in sets]


def combined_options(chosen: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """Return the combinations of two option values in these cases: (kind of layout, option, value, option, value)."""
    return {
        (kind, one, case[one], other, case[other])
        for case in chosen
        for kind in kinds(case["layout"])
        for one, other in combinations(OPTIONS, 2)
    }


def kinds(layout: str) -> list[str]:
    """Return the words of a layout's name and all pairs of them."""
    words = layout.split("_")
    return words + ["_".join(pair) for pair in combinations(words, 2)]


def batch(step: int, case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the global batch of a step: inputs and targets (B, T) int64."""
    params = shape(case)
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, params["vocab_size"], (BATCH_SIZE, params["seq_len"] + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    if case["masked"]:  # a different fraction of each sequence, and all of the first one
        kept = torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.95, BATCH_SIZE)[:, None]
        targets[~kept] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), targets


def shape(case: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of Params."""
    size = dict(SIZES[case["size"]])
    if "context" in case["layout"] and size["seq_len"] % 8:
        size["seq_len"] = 24  # must be divisible into two chunks per rank
    return {
        **size,
        **experts(case),
        "n_layers": 2,
        "apply_qk_norm": case["qk_norm"],
        "weight_tying": case["tied"],
        "post_embed_norm": case["tied"],
        "ffn_type": case["ffn_type"],
        "model_norm": case["model_norm"],
        "positional_embedding_type": case["positions"],
    }


def experts(case: dict[str, Any]) -> dict[str, Any]:
    """Return the mixture-of-experts settings of Params; the first of the two blocks has experts."""
    if case["experts"] == "none" and "expert" not in kinds(case["layout"]):
        return {}
    settings: dict[str, Any] = {"moe_freq": 2, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "moe_loss_weight": 0.0}
    if case["experts"] != "bounded":
        return {**settings, "moe_capacity_factor": 0.0}
    if case["layout"] in ("tensor", "tensor_4"):  # all ranks process all tokens
        return {**settings, "moe_capacity_factor": 1.0, "moe_loss_weight": 0.1}
    return {**settings, "moe_capacity_factor": EXPERTS / TOP_K}  # enough if all tokens choose the same expert


def train(case: dict[str, Any], steps: int, single_process: bool = False) -> list[list[float]]:
    """Return [loss, gradient norm] of each step, followed by [mean, mean square] of the logits in evaluation mode.

    With `single_process`, train without a parallel layout and without activation checkpointing.
    """
    cfg = ParallelConfig(**({} if single_process else LAYOUTS[case["layout"]][1]))
    runtime = init_runtime(cfg)
    layout = build_layout(runtime, cfg)
    model = build_model(case, cfg, runtime, layout, "none" if single_process else case["checkpointing"])
    optimizer, schedule = build_optimization(case, model, steps)
    options = StepOptions(
        runtime,
        layout,
        get_autocast("fp32"),
        accum_freq=case["accum_freq"],
        reduces_every_micro_batch=cfg.reduces_every_micro_batch,
        z_loss_coefficient=case["z_loss"],
        grad_clip_norm=case["clip"],
        end_of_text_id=END_OF_TEXT if case["documents"] else None,
    )
    local_size = BATCH_SIZE // layout.data_size
    local = slice(layout.data_rank * local_size, (layout.data_rank + 1) * local_size)
    numbers = []
    for step in range(steps):
        inputs, targets = batch(step, case)
        schedule(step)
        result = train_step(model, inputs[local], targets[local], optimizer, options)
        numbers.append([result.values["loss"].item(), result.grad_norm.item()])
    with evaluation_mode(model):
        logits = model(batch(0, case)[0])[0]
    numbers.append([logits.mean().item(), logits.square().mean().item()])
    shutdown(runtime)
    return numbers


def build_model(
    case: dict[str, Any], cfg: ParallelConfig, runtime: Runtime, layout: MeshLayout, checkpointing: str
) -> nn.Module:
    """Build a model and parallelize it in this layout."""
    with torch.device("meta"):
        model = Transformer(Params(**shape(case)))
    with offloading_from_cpu():
        return parallelize(
            model,
            layout,
            cfg,
            device=runtime.device,
            model_cfg=ModelConfig(activation_checkpointing=checkpointing),
            initialise=lambda sharded: init_weights(sharded, seed=5),
        )


@contextmanager
def offloading_from_cpu() -> Iterator[None]:
    """Enable --fsdp-cpu-offload on CPU as on CUDA, but without pinned memory.

    Otherwise the flag has no effect on CPU, because the parameters are already in host memory.
    """
    policy = partial(CPUOffloadPolicy, pin_memory=False)
    with (
        mock.patch("open_lm.parallel.parallelize._offloads", lambda cfg, device: cfg.fsdp and cfg.fsdp_cpu_offload),
        mock.patch("open_lm.parallel.parallelize.CPUOffloadPolicy", policy),
    ):
        yield


def build_optimization(case: dict[str, Any], model: nn.Module, steps: int) -> tuple[Optimizer, Callable[[int], float]]:
    """Return the optimizer and its learning-rate schedule."""
    cfg = OptimConfig(
        optimizer=case["optimizer"],
        lr=1e-3,
        wd=0.1,
        no_decay_norms=case["no_decay_norms"],
        lr_scheduler=case["schedule"],
        lr_decay_fraction=0.5,
        warmup=2,
    )
    optimizer = build_optimizer(model, cfg)
    if isinstance(optimizer, Muon):
        optimizer._dtype = torch.float32  # bfloat16 rounding errors would exceed TOLERANCE
    return optimizer, build_scheduler(cfg, optimizer, steps, None)


def difference(actual: list[list[float]], expected: list[list[float]]) -> float:
    """Return the largest difference, relative to values above 1."""
    pairs = [pair for rows in zip(actual, expected, strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def run(chosen: list[dict[str, Any]], steps: int, report: Callable[[str], object] = lambda text: None) -> list[float]:
    """Return the difference of each case from a single process. Cases with the same number of ranks share processes."""
    parallel: dict[int, list[list[float]]] = {}
    for ranks in sorted({LAYOUTS[case["layout"]][0] for case in chosen}):
        numbers = [number for number, case in enumerate(chosen) if LAYOUTS[case["layout"]][0] == ranks]
        start = time.perf_counter()
        results = on_ranks(ranks, [(train, chosen[number], steps) for number in numbers])
        parallel.update(zip(numbers, results, strict=True))
        report(f"{len(numbers)} cases on {ranks} ranks: {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    single = [train(case, steps, single_process=True) for case in chosen]
    report(f"{len(chosen)} cases in a single process: {time.perf_counter() - start:.0f} s")
    return [difference(parallel[number], expected) for number, expected in enumerate(single)]


def on_ranks(ranks: int, jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Run jobs sequentially in one gloo process group of `ranks` ranks, and return their results on rank 0.

    A job is a tuple of a function and its arguments. Results must be serializable as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(ranks, folder, jobs), nprocs=ranks, start_method="forkserver")
        return json.loads((Path(folder) / "results.json").read_text())


def _rank(rank: int, ranks: int, folder: str, jobs: list[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    results = [function(*arguments) for function, *arguments in jobs]
    if rank == 0:
        (Path(folder) / "results.json").write_text(to_json(results))
    dist.destroy_process_group()
    end_process(0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="training steps of each case (default: 20)")
    parser.add_argument("--sets", type=int, default=2, help="option sets per layout, an even number (default: 2)")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="test only this layout; repeatable")
    args = parser.parse_args(argv)
    multiprocessing.set_forkserver_preload(PRELOADED_MODULES)
    chosen = [case for case in cases(args.sets) if args.layout is None or case["layout"] in args.layout]
    results = run(chosen, args.steps, report=lambda text: print(text, flush=True))
    print(f"{'layout':22} {'ranks':>5} {'cases':>5}  largest difference")
    for layout in dict.fromkeys(case["layout"] for case in chosen):
        layout_results = [
            (result, case) for result, case in zip(results, chosen, strict=True) if case["layout"] == layout
        ]
        worst, case = max(layout_results, key=lambda item: item[0])
        details = "" if worst < TOLERANCE else f"  {to_json(case)}"
        print(f"{layout:22} {LAYOUTS[layout][0]:5} {len(layout_results):5}  {worst:.1e}{details}")
    return int(max(results) >= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
