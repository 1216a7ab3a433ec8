"""Training of tiny models, and reads of imported weights, on several ranks; results can be serialized as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from open_lm.checkpoint import load_weights
from open_lm.config.sections import ModelConfig, OptimConfig, ParallelConfig
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import build_layout, init_runtime, shutdown
from open_lm.distributed.sharded_tensor import full_tensor, fused_weight_parts
from open_lm.model.initialization import init_weights
from open_lm.model.params import create_params
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.build import build_optimizer
from open_lm.parallel.parallelize import evaluation_mode, parallelize
from open_lm.training.step import StepOptions, train_step

STEPS, SEQUENCES, LENGTH, END_OF_TEXT = 5, 4, 24, 3


def train(keys: dict[str, Any], settings: dict[str, Any], documents: bool) -> list[list[float]]:
    """Train a model for STEPS steps in a layout.

    Return [loss, gradient norm] of each step, two sums of each trained parameter, which depend on the order of its
    rows, and without context parallelism two moments of the logits.

    keys: arguments of Params. settings: arguments of ParallelConfig; {} for a single process.
    """
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    layout = build_layout(runtime, cfg)
    with torch.device("meta"):
        model = Transformer(Params(**keys))
    trained = parallelize(
        model, layout, cfg, device=runtime.device, initialise=lambda sharded: init_weights(sharded, seed=5)
    )
    optimizer = build_optimizer(trained, OptimConfig(lr=1e-2, eps=1e-4, wd=0.1))
    options = StepOptions(
        runtime,
        layout,
        get_autocast("fp32"),
        accum_freq=1,
        z_loss_coefficient=1e-3,
        grad_clip_norm=1.0,
        end_of_text_id=END_OF_TEXT if documents else None,
    )
    ids = torch.randint(61, (STEPS, SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    size = SEQUENCES // layout.data_size
    local = slice(layout.data_rank * size, (layout.data_rank + 1) * size)
    numbers = []
    for batch in ids[:, local]:
        result = train_step(trained, batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), optimizer, options)
        numbers.append([result.values["loss"].item(), result.grad_norm.item()])
    parts = fused_weight_parts(trained)
    for name, parameter in sorted(trained.named_parameters()):
        values = full_tensor(parameter, parts.get(name, 1)).double().flatten()
        numbers.append([values.mean().item(), (values * torch.linspace(0, 1, len(values))).mean().item()])
    if layout.context == 1:  # a model receives only its shard of a sequence otherwise
        with evaluation_mode(trained):
            logits = trained(ids[0, :, :-1])[0][..., :61]
        numbers.append([logits.mean().item(), logits.square().mean().item()])
    shutdown(runtime)
    return numbers


def read_pretrained(model: str, pretrained: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Load imported weights into a model that is split over the ranks, as --pretrained does.

    Return the bytes that each rank has read from files, and a moment of each parameter. `settings` as for `train`.
    """
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    layout = build_layout(runtime, cfg)
    with torch.device("meta"):
        empty = Transformer(create_params(ModelConfig(model=model)))
    sharded = parallelize(empty, layout, cfg, device=runtime.device, initialise=lambda each: init_weights(each, seed=5))
    before = _bytes_read()
    load_weights(pretrained, sharded)
    num_bytes = [None] * runtime.world_size
    dist.all_gather_object(num_bytes, _bytes_read() - before)
    parts = fused_weight_parts(sharded)
    moments = {}
    for name, parameter in sharded.named_parameters():
        values = full_tensor(parameter, parts.get(name, 1)).double().flatten()
        moments[name] = (values * torch.linspace(0, 1, len(values), dtype=torch.float64)).sum().item()
    shutdown(runtime)
    return {"bytes": num_bytes, "moments": moments}


def _bytes_read() -> int:
    """Return the bytes that system calls of this process have read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])
