"""Loss and gradient norm of packed sequences in several layouts; runs under torchrun and inside pytest.

`python -m document_worker OUT` writes {layout: [loss, gradient norm]} over the sequences of all ranks as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from model_helpers import random_ids

from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.data.masking import document_ids
from open_lm.distributed.processes import build_layout, init_runtime, shutdown, sum_over_ranks
from open_lm.errors import end_process
from open_lm.model.initialization import init_weights
from open_lm.model.losses import token_loss
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.build import gradient_norm
from open_lm.parallel.parallelize import parallelize

ROWS, LENGTH, END = 4, 24, 0
LAYOUTS = {"ddp": ParallelConfig(), "fsdp": ParallelConfig(fsdp=True)}


def loss_and_norm(layout: str, masked: bool = True) -> list[float]:
    """Return the mean loss of all sequences and its gradient norm, with activation checkpointing."""
    cfg = LAYOUTS[layout]
    runtime = init_runtime(cfg)
    try:
        with torch.device("meta"):
            model = Transformer(Params(dim=24, n_layers=2, n_heads=2, vocab_size=7, seq_len=LENGTH, weight_tying=True))
        trained = parallelize(
            model,
            build_layout(runtime, cfg),
            cfg,
            device=runtime.device,
            model_cfg=ModelConfig(grad_checkpointing=True),
            initialise=lambda sharded: init_weights(sharded, seed=5),
        )
        tokens = random_ids(ROWS, LENGTH + 1, vocab_size=7).chunk(runtime.world_size)[runtime.rank]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = trained(inputs, document_ids=document_ids(inputs, END) if masked else None)[0]
        loss = token_loss(logits, targets)[0] / (ROWS * LENGTH)
        (loss * runtime.world_size).backward()
        norm = gradient_norm(trained.parameters())
        return [sum_over_ranks(loss.detach().clone()).item(), norm.item()]
    finally:
        shutdown(runtime)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {layout: loss_and_norm(layout) for layout in LAYOUTS}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()
    end_process(0)
