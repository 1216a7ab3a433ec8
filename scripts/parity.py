"""Do all layouts of ranks train alike? Compares each with one process, step by step, on CPU in float32.

    python scripts/parity.py                    20 steps, each layout with two sets of options
    python scripts/parity.py --sets 8 --layout tensor_fsdp

A small model is trained with AdamW, by each layout with several sets of options, and the largest difference of losses
and gradient norms from those of a single process is printed for each layout, with that of the logits afterwards. Ends
with 1 if one is above 1e-4 of the value (of 1, if that is less).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from open_lm.config import ModelConfig, OptimConfig, ParallelConfig
from open_lm.distributed import build_layout, init_runtime, shutdown
from open_lm.errors import end_process
from open_lm.initialization import init_weights
from open_lm.losses import IGNORE_INDEX
from open_lm.model import Params, Transformer
from open_lm.optim import build_optimizer
from open_lm.parallelize import parallelize, without_training
from open_lm.precision import get_autocast
from open_lm.train import StepOptions, train_step

ROWS, END_OF_TEXT, TOLERANCE = 16, 3, 1e-4

# Ranks, and the settings of the layout.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    "static_graph": (2, {"ddp_static_graph": True}),
    "fsdp": (2, {"fsdp": True}),
    "prefetch": (2, {"fsdp": True, "fsdp_backward_prefetch": True}),
    "zero2": (2, {"fsdp": True, "fsdp_zero2": True}),
    "tensor": (2, {"tensor_parallel": 2}),
    "context": (2, {"context_parallel": 2}),
    "hybrid": (4, {"fsdp": True, "mesh_dim": "2,2,1"}),
    "hybrid_zero2": (4, {"fsdp": True, "mesh_dim": "-1,2,1", "fsdp_zero2": True}),
    "tensor_data": (4, {"tensor_parallel": 2}),
    "tensor_fsdp": (4, {"fsdp": True, "tensor_parallel": 2}),
    "tensor_zero2": (4, {"fsdp": True, "mesh_dim": "1,-1,2", "fsdp_zero2": True, "fsdp_backward_prefetch": True}),
    "tensor_4": (4, {"tensor_parallel": 4}),
    "context_fsdp": (4, {"fsdp": True, "context_parallel": 2}),
    "context_tensor": (4, {"context_parallel": 2, "tensor_parallel": 2}),
    "ddp_8": (8, {}),
    "tensor_hybrid": (8, {"fsdp": True, "mesh_dim": "2,2,2"}),
    "tensor_4_fsdp": (8, {"fsdp": True, "tensor_parallel": 4, "fsdp_zero2": True}),
    "context_tensor_fsdp": (8, {"fsdp": True, "context_parallel": 2, "tensor_parallel": 2}),
}

# What a set of options chooses from. Odd shapes: 12 heads that are narrower than the model, as in open_lm_87m, a
# vocabulary and sequences that divide by nothing.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "accum_freq": (1, 2),
    "masked": (False, True),
    "documents": (False, True),
    "z_loss": (0.0, 1e-3),
    "clip": (None, 0.5),
    "checkpointing": ("none", "full", "op", "2"),
    "odd": (False, True),
    "qk_norm": (False, True),
    "tied": (False, True),
    "ffn_type": ("swiglu", "gelu", "gemma_geglu"),
    "model_norm": ("default_layer_norm", "rms_norm", "gain_only_lp_layer_norm"),
    "positions": ("rotary", "head_rotary", "llama_rotary", "none"),
}


def cases(per_layout: int) -> list[dict[str, Any]]:
    """`per_layout` sets of options for each layout, in pairs of which the second has the other value wherever there are
    two: all values of all options meet each layout, and, over all layouts, each other."""
    found = []
    for layout in LAYOUTS:
        rng = random.Random(layout)
        for _ in range(per_layout // 2):
            first = {name: rng.randrange(len(values)) for name, values in OPTIONS.items()}
            for turn in (0, 1):
                chosen = {n: values[(first[n] + turn) % len(values)] for n, values in OPTIONS.items()}
                found.append({"layout": layout, **chosen})
    return found


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
    even = {"dim": 32, "n_heads": 4, "vocab_size": 40, "seq_len": 16}
    odd = {"dim": 76, "n_heads": 12, "vocab_size": 31, "seq_len": 12 if "context" in case["layout"] else 11}
    return {
        **(odd if case["odd"] else even),
        "n_layers": 2,
        "apply_qk_norm": case["qk_norm"],
        "weight_tying": case["tied"],
        "post_embed_norm": case["tied"],
        "ffn_type": case["ffn_type"],
        "model_norm": case["model_norm"],
        "positional_embedding_type": case["positions"],
    }


def train(case: dict[str, Any], steps: int, alone: bool = False) -> list[list[float]]:
    """[loss, gradient norm] of each step, and in the end [mean, mean square] of an evaluation's logits; with `alone` of
    the same training without any layout."""
    cfg = ParallelConfig(**({} if alone else LAYOUTS[case["layout"]][1]))
    runtime = init_runtime(cfg)
    layout = build_layout(runtime, cfg)
    with torch.device("meta"):
        model = Transformer(Params(**shape(case)))
    trained = parallelize(
        model,
        layout,
        cfg,
        device=runtime.device,
        model_cfg=ModelConfig(activation_checkpointing="none" if alone else case["checkpointing"]),
        initialise=lambda made: init_weights(made, seed=5),
    )
    optimizer = build_optimizer(trained, OptimConfig(lr=1e-3, wd=0.1))
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
        result = train_step(trained, inputs[own], targets[own], optimizer, options)
        numbers.append([result.values["loss"].item(), result.grad_norm.item()])
    with without_training(trained):
        logits = trained(batch(0, case)[0])[0]
    numbers.append([logits.mean().item(), logits.square().mean().item()])
    shutdown(runtime)
    return numbers


def difference(found: list[list[float]], expected: list[list[float]]) -> float:
    """The largest difference, relative to values above 1."""
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def run(chosen: list[dict[str, Any]], steps: int, say: Any = lambda text: None) -> list[float]:
    """The differences of all cases from a single process: one process group for each number of ranks."""
    found: dict[int, list[list[float]]] = {}
    for ranks in sorted({LAYOUTS[case["layout"]][0] for case in chosen}):
        numbers = [number for number, case in enumerate(chosen) if LAYOUTS[case["layout"]][0] == ranks]
        start = time.perf_counter()
        found.update(zip(numbers, _on_ranks(ranks, [chosen[number] for number in numbers], steps), strict=True))
        say(f"{len(numbers)} cases on {ranks} ranks: {time.perf_counter() - start:.0f} s")
    return [difference(found[number], train(case, steps, alone=True)) for number, case in enumerate(chosen)]


def _on_ranks(ranks: int, chosen: list[dict[str, Any]], steps: int) -> list[list[list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        jobs = Path(folder) / "jobs.json"
        jobs.write_text(json.dumps({"steps": steps, "cases": chosen}))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__, "--worker", str(jobs)]
        result = subprocess.run(
            command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} exited {result.returncode}\n{result.stdout}\n{result.stderr}")
        return json.loads(jobs.with_suffix(".out").read_text())


def work(jobs: Path) -> None:
    """One of the ranks: train all cases in one process group."""
    todo = json.loads(jobs.read_text())
    dist.init_process_group("gloo")
    results = [train(case, todo["steps"]) for case in todo["cases"]]
    if dist.get_rank() == 0:
        jobs.with_suffix(".out").write_text(json.dumps(results))
    dist.destroy_process_group()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--sets", type=int, default=2, help="of options for each layout, an even number")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="only this layout; may be repeated")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        end_process(0)
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
