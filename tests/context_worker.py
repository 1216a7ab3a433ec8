"""Losses, gradients and single tokens' losses under context parallelism; runs under torchrun and inside pytest.

`python -m context_worker OUT` trains every case in one process group; rank 0 writes {case: numbers} as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trainer_worker

from open_lm.config import ModelConfig, OptimConfig, ParallelConfig
from open_lm.distributed import build_layout, init_runtime, shutdown
from open_lm.errors import end_process
from open_lm.initialization import init_weights
from open_lm.losses import TokenLoss
from open_lm.model import Params, Transformer
from open_lm.objective import batch_loss
from open_lm.optim import build_optimizer
from open_lm.parallelize import parallelize
from open_lm.precision import get_autocast
from open_lm.train import StepOptions, train_step

END = 3  # ends a document; one token in 31 is it, so that rows hold several
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "documents": {"documents": True},
    "recomputed": {"fsdp": True, "documents": True, "checkpointing": True, "accum_freq": 2},
}


def train(
    context: int, fsdp: bool = False, documents: bool = False, checkpointing: bool = False, accum_freq: int = 1
) -> list[list[float]]:
    """[loss, gradient norm] of each step, and then the losses of single tokens."""
    cfg = ParallelConfig(context_parallel=context, fsdp=fsdp)
    runtime = init_runtime(cfg)
    try:
        layout = build_layout(runtime, cfg)
        with torch.device("meta"):
            model = Transformer(Params(**trainer_worker.SHAPE))
        trained = parallelize(
            model,
            layout,
            cfg,
            device=runtime.device,
            model_cfg=ModelConfig(grad_checkpointing=checkpointing),
            initialise=lambda made: init_weights(made, seed=5),
        )
        optimizer = build_optimizer(trained, OptimConfig(lr=1e-3, wd=0.1))
        options = StepOptions(
            runtime,
            layout,
            get_autocast("fp32"),
            accum_freq=accum_freq,
            z_loss_coefficient=1e-3,
            grad_clip_norm=0.5,
            end_of_text_id=END if documents else None,
        )
        rows = trainer_worker.ROWS // layout.data_size
        own = slice(layout.data_rank * rows, (layout.data_rank + 1) * rows)
        numbers = []
        for step in range(trainer_worker.STEPS):
            inputs, targets = (whole[own] for whole in trainer_worker.batch(step))
            result = train_step(trained, inputs, targets, optimizer, options)
            numbers.append([result.values["loss"].item(), result.grad_norm.item()])
            assert result.samples.item() == trainer_worker.ROWS
        with torch.no_grad():
            losses = batch_loss(trained, inputs, TokenLoss(targets, per_token=True), options)
        return [*numbers, losses.flatten().tolist()]
    finally:
        shutdown(runtime)


def main(argv: list[str]) -> None:
    dist.init_process_group("gloo")
    results = {name: train(context=dist.get_world_size(), **case) for name, case in CASES.items()}
    if dist.get_rank() == 0:
        Path(argv[0]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process(0)
