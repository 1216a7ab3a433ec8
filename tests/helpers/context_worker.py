"""Losses and gradients under context parallelism; runs under torchrun and inside pytest.

`python -m context_worker OUT` uses all ranks as one context group; rank 0 writes the results of `losses_and_gradients`
for each case as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import trainer_worker

from open_lm.config.sections import ParallelConfig
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import build_layout, init_runtime, sum_over_ranks
from open_lm.errors import end_process
from open_lm.model.initialization import init_weights
from open_lm.model.losses import TokenLoss, batch_loss
from open_lm.model.transformer import Params, Transformer

END = 3  # ends a document; one token in 31 has this id, so a sequence contains several documents
CASES = {"causal": None, "documents": END}


def losses_and_gradients(context: int, end_of_text_id: int | None) -> dict[str, list[float]]:
    """Return the summed loss of a batch of full sequences, the gradient norms and the loss of each token."""
    cfg = ParallelConfig(context_parallel=context)
    layout = build_layout(init_runtime(cfg), cfg)
    model = Transformer(Params(**trainer_worker.SHAPE))
    init_weights(model, seed=5)
    inputs, targets = trainer_worker.batch(step=0)
    options = SimpleNamespace(layout=layout, autocast=get_autocast("fp32"), end_of_text_id=end_of_text_id)
    loss = batch_loss(model, inputs, TokenLoss(targets, z_loss_coefficient=1e-3), options)
    loss.backward()
    gradients = [sum_over_ranks(parameter.grad) for parameter in model.parameters()]
    with torch.no_grad():
        tokens = batch_loss(model, inputs, TokenLoss(targets, per_token=True), options)
    return {
        "loss": [sum_over_ranks(loss.detach().clone()).item()],
        "norms": [gradient.norm().item() for gradient in gradients],
        "tokens": tokens.flatten().tolist(),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {name: losses_and_gradients(dist.get_world_size(), end) for name, end in CASES.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()
    end_process(0)
