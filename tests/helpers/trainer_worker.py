"""Train a small model for a few steps in any layout, under torchrun or inside pytest.

`python -m trainer_worker OUT JOB…` runs every job (JSON arguments of `train`) in one process group. Rank 0 writes
{job: steps} as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from open_lm.config.sections import ModelConfig, OptimConfig, ParallelConfig
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import build_layout, init_runtime, shutdown
from open_lm.errors import end_process
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.build import build_optimizer
from open_lm.parallel.parallelize import parallelize
from open_lm.training.gradient_noise import GradientNoise
from open_lm.training.step import StepOptions, train_step

BATCH_SIZE, SEQ_LEN, VOCAB, STEPS = 8, 12, 31, 4
SHAPE = {"dim": 24, "n_layers": 3, "n_heads": 2, "vocab_size": VOCAB, "seq_len": SEQ_LEN, "apply_qk_norm": True}
LAYOUTS: dict[str, ParallelConfig] = {
    "plain": ParallelConfig(),
    "static_graph": ParallelConfig(ddp_static_graph=True),
    "fsdp": ParallelConfig(fsdp=True),
    "prefetch": ParallelConfig(fsdp=True, fsdp_backward_prefetch=True),
    "hybrid": ParallelConfig(fsdp=True, fsdp_hybrid=True),
    "hybrid_o2": ParallelConfig(fsdp=True, fsdp_hybrid_o2=True),
    "amp": ParallelConfig(fsdp=True, fsdp_amp=True),
    "pure_bf16": ParallelConfig(fsdp=True, fsdp_pure_bf16=True),
}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and targets (BATCH_SIZE, SEQ_LEN) of a global batch, with about half of the targets masked."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (BATCH_SIZE, SEQ_LEN + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    kept = torch.rand(BATCH_SIZE, SEQ_LEN, generator=generator) < torch.linspace(0.05, 0.95, BATCH_SIZE)[:, None]
    targets[~kept] = IGNORE_INDEX
    targets[0] = IGNORE_INDEX  # a sequence, and with accumulation a micro-batch, without targets
    return tokens[:, :-1].contiguous(), targets


def train(
    layout: str, accum_freq: int = 1, tied: bool = False, checkpointing: bool = False, measures_noise: bool = False
) -> list[list[float]]:
    """Return [loss, gradient norm] of each step, and with `measures_noise` the state of GradientNoise after it."""
    cfg = LAYOUTS[layout]
    runtime = init_runtime(cfg)
    try:
        layout = build_layout(runtime, cfg)
        with torch.device("meta"):
            model = Transformer(Params(**SHAPE, weight_tying=tied))
        trained = parallelize(
            model,
            layout,
            cfg,
            device=runtime.device,
            model_cfg=ModelConfig(grad_checkpointing=checkpointing),
            initialise=lambda sharded: init_weights(sharded, seed=5),
        )
        optimizer = build_optimizer(trained, OptimConfig(lr=1e-2, wd=0.1))
        options = StepOptions(
            runtime, layout, get_autocast("fp32"), accum_freq=accum_freq, z_loss_coefficient=1e-3, grad_clip_norm=0.5
        )
        local_size = BATCH_SIZE // layout.data_size
        local = slice(layout.data_rank * local_size, (layout.data_rank + 1) * local_size)
        noise = None
        if measures_noise:
            sizes = {"seq_len": SEQ_LEN, "global_batch_size": BATCH_SIZE}
            noise = GradientNoise(trained, layout, accum_freq, device=runtime.device, **sizes)
        steps = []
        for step in range(STEPS):
            inputs, targets = batch(step)
            if noise is not None:
                noise.start()
            result = train_step(trained, inputs[local], targets[local], optimizer, options)
            loss = result.values["loss"]
            steps.append([loss.item(), result.grad_norm.item()])
            if noise is not None:
                noise.finish(targets[local], result.grad_norm, ~result.skipped)
                steps[-1] += noise.state()
            assert result.samples.item() == BATCH_SIZE
        return steps
    finally:
        shutdown(runtime)


def main(argv: list[str]) -> None:
    out, jobs = argv[0], [json.loads(job) for job in argv[1:]]
    dist.init_process_group("gloo")
    results = {json.dumps(job, sort_keys=True): train(**job) for job in jobs}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process(0)
