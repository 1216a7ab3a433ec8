"""One step of a transformers model with experts, under torchrun and inside pytest.

`python -m hf_experts_worker MODEL_FOLDER OUT JOB…` runs every job (JSON arguments of `step`) in one process group. Rank
0 saves {job: (values, gradients)}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from open_lm.config.sections import ModelConfig, OptimConfig, ParallelConfig
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import build_layout, init_runtime, shutdown
from open_lm.distributed.sharded_tensor import full_tensor
from open_lm.errors import end_process
from open_lm.hf.trainable import create_hf_model
from open_lm.optim.build import build_optimizer
from open_lm.parallel.parallelize import parallelize, unwrap
from open_lm.training.step import StepOptions, train_step

BATCH_SIZE, SEQ_LEN, VOCAB = 8, 12, 61


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets (BATCH_SIZE, SEQ_LEN); the last position and one sequence have no targets."""
    inputs = torch.randint(0, VOCAB, (BATCH_SIZE, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    targets = torch.cat((inputs[:, 1:], torch.full((BATCH_SIZE, 1), IGNORE_INDEX)), dim=1)
    targets[0] = IGNORE_INDEX
    return inputs, targets


def step(
    folder: str, fsdp: bool = False, accum_freq: int = 1, checkpointing: bool = False
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return the values that a step reports and the full gradients by the names of the transformers model."""
    cfg = ParallelConfig(fsdp=fsdp)
    runtime = init_runtime(cfg)
    try:
        layout = build_layout(runtime, cfg)
        model_cfg = ModelConfig(
            hf_model=folder, hf_seq_len=SEQ_LEN, hf_fsdp_block="DecoderLayer", grad_checkpointing=checkpointing
        )
        model: Any = create_hf_model(model_cfg, for_training=True).train()
        trained = parallelize(model, layout, cfg, device=runtime.device, model_cfg=model_cfg)
        options = StepOptions(runtime, layout, get_autocast("fp32"), accum_freq=accum_freq)
        inputs, targets = (x.chunk(layout.data_size)[layout.data_rank] for x in batch())
        result = train_step(trained, inputs, targets, build_optimizer(trained, OptimConfig(lr=0.0)), options)
        parameters = unwrap(trained).model.named_parameters()
        gradients = {name: full_tensor(p.grad) for name, p in parameters if p.grad is not None}
        return {name: value.item() for name, value in result.values.items()}, gradients
    finally:
        shutdown(runtime)


def main(argv: list[str]) -> None:
    folder, out, jobs = argv[0], argv[1], [json.loads(job) for job in argv[2:]]
    dist.init_process_group("gloo")
    results = {json.dumps(job, sort_keys=True): step(folder, **job) for job in jobs}
    if dist.get_rank() == 0:
        torch.save(results, Path(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process(0)
