"""Measure how fast this machine trains the models of a ladder, with a few steps of each on random token ids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from open_lm.scaling.ladder_files import PlannedRun

_STEPS = 4  # the first one is a warm-up


def step_seconds(config_file: str) -> float:
    """Return the seconds of the fastest measured training step of a run, in one process on the CPU."""
    import torch

    from open_lm.config.command_line import parse_args
    from open_lm.config.layout import MeshLayout
    from open_lm.config.sections import Config
    from open_lm.distributed.precision import get_autocast
    from open_lm.distributed.processes import Runtime
    from open_lm.model.transformer import create_model
    from open_lm.optim.build import build_optimizer
    from open_lm.training.step import StepOptions, train_step

    config = Config.from_namespace(parse_args(["--config", config_file]))
    model = create_model(config.model)
    model.reset_parameters(config.run.seed)
    model.train()
    params: Any = model.params
    optimizer = build_optimizer(model, config.optim)
    options = StepOptions(Runtime(), MeshLayout(), get_autocast(config.precision.precision, "cpu"))
    ids = torch.randint(params.vocab_size, (config.data.global_batch_size, params.seq_len + 1))
    times = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        train_step(model, ids[:, :-1], ids[:, 1:], optimizer, options)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def estimate_seconds(runs: Sequence[PlannedRun]) -> dict[str, float]:
    """Return the seconds that each run trains, by name, without startup and validation. Measure each size once."""
    speeds: dict[int, float] = {}
    for planned in runs:
        if planned.params not in speeds:
            speeds[planned.params] = step_seconds(planned.config)
    return {planned.name: planned.trained_steps * speeds[planned.params] for planned in runs}
