"""Compare the planner's memory with the CUDA allocator's peak."""

from __future__ import annotations

import gc

import pytest
import torch

from open_lm.config.command_line import parse_args
from open_lm.config.layout import MeshLayout
from open_lm.config.sections import Config
from open_lm.distributed.precision import get_autocast, parameter_dtype
from open_lm.distributed.processes import Runtime
from open_lm.model.transformer import create_model
from open_lm.optim.build import build_optimizer
from open_lm.parallel.parallelize import parallelize
from open_lm.planner.memory import peak
from open_lm.planner.setup import TrainingSetup
from open_lm.planner.shapes import shape_of
from open_lm.training.step import StepOptions, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("model", ["open_lm_160m", "open_lm_411m"])
@pytest.mark.parametrize(
    "flags",
    [
        "--precision fp32",
        "--precision amp_bfloat16",
        "--precision bf16",
        "--precision amp_bfloat16 --activation-checkpointing full",
        "--precision amp_bfloat16 --activation-checkpointing op",
        "--precision amp_bfloat16 --accum-freq 2",
        "--precision amp_bfloat16 --activation-checkpointing full --optimizer muon",
    ],
)
def test_memory_is_within_a_tenth_of_the_allocator_peak(model: str, flags: str) -> None:
    config = Config.from_namespace(parse_args(["--model", model, *flags.split()]))
    batch, precision, count = 4, config.precision.precision, config.optim.accum_freq
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    device, layout = torch.device("cuda"), MeshLayout()
    net = parallelize(
        create_model(config.model),
        layout,
        config.parallel,
        device=device,
        model_cfg=config.model,
        dtype=parameter_dtype(precision),
    )
    optimizer = build_optimizer(net, config.optim)
    autocast = get_autocast(precision, "cuda")
    evaluate_options = StepOptions(Runtime(device=device), layout, autocast, accum_freq=count, grad_clip_norm=1.0)
    ids = torch.randint(1000, (batch * count, shape_of(config.model).seq_len), device=device)
    for _ in range(2):  # the optimizer state exists from the start of the second step
        torch.cuda.reset_peak_memory_stats()
        train_step(net, ids, ids, optimizer, evaluate_options)
    measured = torch.cuda.max_memory_allocated() - before
    planned = peak(TrainingSetup(shape_of(config.model), config, layout, batch))
    assert planned.total == pytest.approx(measured, rel=0.1)
