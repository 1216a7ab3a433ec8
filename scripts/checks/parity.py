"""Do all layouts of ranks train alike? Compares each with one process, step by step, on CPU in float32.

    python scripts/parity.py                    20 steps, each layout with two sets of options
    python scripts/parity.py --sets 8 --layout tensor_fsdp

A small model is trained, by each layout with several sets of options, and the largest difference of losses and gradient
norms from those of a single process is printed for each layout, with that of the logits afterwards. Ends with 1 if one
is above 1e-4 of the value (of 1, if that is less).

Mixtures of experts are compared where they can be the same: a rank bounds and balances the tokens of its own
micro-batch, so with the balancing loss and less than the places of all only where all ranks see the same tokens.
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
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime, build_layout, init_runtime, shutdown
from open_lm.errors import end_process
from open_lm.model.initialization import init_weights
from open_lm.model.losses import IGNORE_INDEX
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.build import build_optimizer
from open_lm.optim.muon import Muon
from open_lm.optim.schedules import build_scheduler
from open_lm.parallel.parallelize import evaluation_mode, parallelize
from open_lm.training.step import StepOptions, train_step

ROWS, END_OF_TEXT, TOLERANCE = 16, 3, 1e-4
EXPERTS, TOP_K = 4, 2
DRAWS = 60  # of which the pair of options that is worth most is taken
# What ranks import, once for all of them.
IMPORTS = ["open_lm.model.transformer", "open_lm.training.trainer", "torch._dynamo", "torch.nn.attention.bias"]

# Ranks, and the settings of the layout, by its name, whose words say of what kinds it is.
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
}

# In these layouts a model of odd sizes has the width of open_lm_87m, which takes long.
WIDE = ("tensor_data", "hybrid_zero2", "context_tensor_fsdp")

# What a set of options chooses from.
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

# Odd ones have 12 heads that are together narrower than the model, as in open_lm_87m, and a vocabulary and sequences
# that divide by nothing.
SIZES: dict[str, dict[str, int]] = {
    "even": {"dim": 32, "n_heads": 4, "vocab_size": 40, "seq_len": 16},
    "odd": {"dim": 76, "n_heads": 12, "vocab_size": 31, "seq_len": 11},
    "87m": {"dim": 488, "n_heads": 12, "vocab_size": 31, "seq_len": 11},
}


def cases(per_layout: int) -> list[dict[str, Any]]:
    """`per_layout` sets of options for each layout, in pairs of which the second has the other value wherever there are
    two: all values of such options meet each layout and, as far as possible, each other in layouts of each kind."""
    rng = random.Random(0)
    found: list[dict[str, Any]] = []
    met: set[tuple[Any, ...]] = set()
    for layout in LAYOUTS:
        for _ in range(per_layout // 2):
            drawn = [_pair(layout, rng) for _ in range(DRAWS)]
            best = max(drawn, key=lambda pair: len(meetings(pair) - met))
            met |= meetings(best)
            found += best
    return [{**case, "size": "87m"} if case["size"] == "odd" and case["layout"] in WIDE else case for case in found]


def _pair(layout: str, rng: random.Random) -> list[dict[str, Any]]:
    first = {name: rng.randrange(len(values)) for name, values in OPTIONS.items()}
    turns = [{name: values[(first[name] + turn) % len(values)] for name, values in OPTIONS.items()} for turn in (0, 1)]
    return [{"layout": layout, **options} for options in turns]


def meetings(chosen: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """Which values of two options occur together: (kind of layout, option, value, option, value)."""
    return {
        (kind, one, case[one], other, case[other])
        for case in chosen
        for kind in kinds(case["layout"])
        for one, other in combinations(OPTIONS, 2)
    }


def kinds(layout: str) -> list[str]:
    """Of a layout: the words of its name, and each two of them."""
    words = layout.split("_")
    return words + ["_".join(pair) for pair in combinations(words, 2)]


def batch(step: int, case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The global batch of a step: inputs and targets (ROWS,T) int64."""
    params = shape(case)
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, params["vocab_size"], (ROWS, params["seq_len"] + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    if case["masked"]:  # unevenly, and of one row all
        kept = torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.95, ROWS)[:, None]
        targets[~kept] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), targets


def shape(case: dict[str, Any]) -> dict[str, Any]:
    """The model's Params."""
    size = dict(SIZES[case["size"]])
    if "context" in case["layout"] and size["seq_len"] % 8:
        size["seq_len"] = 24  # has to divide into two chunks for each rank
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
    """The part of Params that tells of experts, in the first of two blocks."""
    if case["experts"] == "none":
        return {}
    found = {"moe_freq": 2, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "moe_loss_weight": 0.0}
    if case["experts"] == "unbounded":
        return {**found, "moe_capacity_factor": 0.0}
    if case["layout"] in ("tensor", "tensor_4"):  # all ranks see all tokens
        return {**found, "moe_capacity_factor": 1.0, "moe_loss_weight": 0.1}
    return {**found, "moe_capacity_factor": EXPERTS / TOP_K}  # room for the case that all tokens choose one


def train(case: dict[str, Any], steps: int, alone: bool = False) -> list[list[float]]:
    """[loss, gradient norm] of each step, and in the end [mean, mean square] of an evaluation's logits; with `alone` of
    the same training without any layout."""
    cfg = ParallelConfig(**({} if alone else LAYOUTS[case["layout"]][1]))
    runtime = init_runtime(cfg)
    layout = build_layout(runtime, cfg)
    model = spread(case, cfg, runtime, layout, checkpointing="none" if alone else case["checkpointing"])
    optimizer, schedule = optimization(case, model, steps)
    options = StepOptions(
        runtime,
        layout,
        get_autocast("fp32"),
        accum_freq=case["accum_freq"],
        z_loss_coefficient=case["z_loss"],
        grad_clip_norm=case["clip"],
        end_of_text_id=END_OF_TEXT if case["documents"] else None,
    )
    share = ROWS // layout.data_size
    own = slice(layout.data_rank * share, (layout.data_rank + 1) * share)
    numbers = []
    for step in range(steps):
        inputs, targets = batch(step, case)
        schedule(step)
        result = train_step(model, inputs[own], targets[own], optimizer, options)
        numbers.append([result.values["loss"].item(), result.grad_norm.item()])
    with evaluation_mode(model):
        logits = model(batch(0, case)[0])[0]
    numbers.append([logits.mean().item(), logits.square().mean().item()])
    shutdown(runtime)
    return numbers


def spread(
    case: dict[str, Any], cfg: ParallelConfig, runtime: Runtime, layout: MeshLayout, *, checkpointing: str
) -> nn.Module:
    """A new model in this layout."""
    with torch.device("meta"):
        model = Transformer(Params(**shape(case)))
    with offloading_from_cpu():
        return parallelize(
            model,
            layout,
            cfg,
            device=runtime.device,
            model_cfg=ModelConfig(activation_checkpointing=checkpointing),
            initialise=lambda made: init_weights(made, seed=5),
        )


@contextmanager
def offloading_from_cpu() -> Iterator[None]:
    """Here --fsdp-cpu-offload does what it does on CUDA, but for the pinning of memory; else it does nothing on CPU,
    where parameters are in host memory already."""
    policy = partial(CPUOffloadPolicy, pin_memory=False)
    with (
        mock.patch("open_lm.parallel.parallelize._offloads", lambda cfg, device: cfg.fsdp and cfg.fsdp_cpu_offload),
        mock.patch("open_lm.parallel.parallelize.CPUOffloadPolicy", policy),
    ):
        yield


def optimization(case: dict[str, Any], model: nn.Module, steps: int) -> tuple[Optimizer, Callable[[int], float]]:
    """The optimizer, and the schedule that sets its learning rate."""
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
        optimizer._dtype = torch.float32  # what bfloat16 rounds differs by more than layouts may
    return optimizer, build_scheduler(cfg, optimizer, steps, None)


def difference(found: list[list[float]], expected: list[list[float]]) -> float:
    """The largest difference, relative to values above 1."""
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def run(chosen: list[dict[str, Any]], steps: int, say: Callable[[str], object] = lambda text: None) -> list[float]:
    """The differences of all cases from a single process: one process group for each number of ranks."""
    found: dict[int, list[list[float]]] = {}
    for ranks in sorted({LAYOUTS[case["layout"]][0] for case in chosen}):
        numbers = [number for number, case in enumerate(chosen) if LAYOUTS[case["layout"]][0] == ranks]
        start = time.perf_counter()
        results = on_ranks(ranks, [(train, chosen[number], steps) for number in numbers])
        found.update(zip(numbers, results, strict=True))
        say(f"{len(numbers)} cases on {ranks} ranks: {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    alone = [train(case, steps, alone=True) for case in chosen]
    say(f"{len(chosen)} cases alone: {time.perf_counter() - start:.0f} s")
    return [difference(found[number], expected) for number, expected in enumerate(alone)]


def on_ranks(ranks: int, jobs: list[tuple[Any, ...]]) -> list[Any]:
    """What jobs, each a function and its arguments, give on the first of so many ranks, one job after the other in one
    process group of gloo; results are what JSON can hold."""
    multiprocessing.set_forkserver_preload(IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(ranks, folder, jobs), nprocs=ranks, start_method="forkserver")
        return json.loads((Path(folder) / "results.json").read_text())


def _rank(rank: int, ranks: int, folder: str, jobs: list[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    results = [function(*arguments) for function, *arguments in jobs]
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    end_process(0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--sets", type=int, default=2, help="of options for each layout, an even number")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="only this layout; may be repeated")
    args = parser.parse_args(argv)
    chosen = [case for case in cases(args.sets) if args.layout is None or case["layout"] in args.layout]
    results = run(chosen, args.steps, say=lambda text: print(text, flush=True))
    print(f"{'layout':22} {'ranks':>5} {'cases':>5}  largest difference")
    for layout in dict.fromkeys(case["layout"] for case in chosen):
        of_layout = [(result, case) for result, case in zip(results, chosen, strict=True) if case["layout"] == layout]
        worst, case = max(of_layout, key=lambda item: item[0])
        where = "" if worst < TOLERANCE else f"  {json.dumps(case)}"
        print(f"{layout:22} {LAYOUTS[layout][0]:5} {len(of_layout):5}  {worst:.1e}{where}")
    return int(max(results) >= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
