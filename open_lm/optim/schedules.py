"""Learning-rate schedules: pure functions of the step, and callables that also set the rate of an optimizer.

Steps count from 0: step n is the update after n completed optimizer updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from open_lm.config.registry import DECAY_SHAPES, SCHEDULES
from open_lm.config.sections import OptimConfig
from open_lm.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer

# The key of a parameter group whose learning rate is this factor of that of the schedule.
LR_FACTOR = "lr_factor"

Schedule = Callable[[int], float]


def warmup_value(base_lr: float, warmup_length: int, step: int) -> float:
    """Return the linear warmup: base_lr / warmup_length at step 0, base_lr at step warmup_length - 1."""
    return base_lr * (step + 1) / warmup_length


def cosine_value(base_lr: float, min_lr: float, progress: float) -> float:
    """Return a half cosine from base_lr at progress 0 to min_lr at progress 1 (Loshchilov & Hutter, 2016)."""
    return min_lr + _half_cosine(progress) * (base_lr - min_lr)


def polynomial_value(base_lr: float, min_lr: float, progress: float, power: float) -> float:
    """Return a decay (1 - progress)^power from base_lr at progress 0 to min_lr at progress 1; linear for power 1."""
    return min_lr + (1 - progress) ** power * (base_lr - min_lr)


def decayed_value(base_lr: float, min_lr: float, progress: float, shape: str) -> float:
    """Return a decay from base_lr at progress 0 to min_lr at progress 1.

    shape: "1-sqrt" (1 - sqrt(progress), steepest at the start), "linear" or "cosine" (a half cosine). Raise ConfigError
    for any other shape.
    """
    remaining: float = DECAY_SHAPES.get(shape)(progress)
    return min_lr + remaining * (base_lr - min_lr)


def const_lr(optimizer: Optimizer, base_lr: float, warmup_length: int) -> Schedule:
    """Return a schedule with warmup, then base_lr. Calling it with a step sets the optimizer's rate and returns it."""
    return _with_warmup(optimizer, base_lr, warmup_length, lambda progress: base_lr, 0, 0, force_min_lr=0.0)


def cosine_lr(  # noqa: PLR0917 - callers pass these by position
    optimizer: Optimizer,
    base_lr: float,
    warmup_length: int,
    steps: int,
    min_lr: float = 0.0,
    force_min_lr: float = 0.0,
) -> Schedule:
    """Return a schedule with warmup, then a cosine that reaches `min_lr` at step `steps`.

    After the warmup the rate is at least `force_min_lr`.
    """
    decay = partial(cosine_value, base_lr, min_lr)
    return _with_warmup(optimizer, base_lr, warmup_length, decay, warmup_length, steps, force_min_lr)


def const_lr_cooldown(  # noqa: PLR0917 - callers pass these by position
    optimizer: Optimizer,
    base_lr: float,
    warmup_length: int,
    steps: int,
    cooldown_steps: int,
    cooldown_power: float = 1.0,
    cooldown_end_lr: float = 0.0,
    force_min_lr: float = 0.0,
) -> Schedule:
    """Return a schedule with warmup, base_lr, then a polynomial decay to `cooldown_end_lr` over `cooldown_steps`.

    The decay ends at step `steps`. After the warmup the rate is at least `force_min_lr`.
    """
    decay = partial(polynomial_value, base_lr, cooldown_end_lr, power=cooldown_power)
    return _with_warmup(optimizer, base_lr, warmup_length, decay, steps - cooldown_steps, steps, force_min_lr)


def wsd_lr(  # noqa: PLR0917 - same interface as the schedules above
    optimizer: Optimizer,
    base_lr: float,
    warmup_length: int,
    steps: int,
    decay_steps: int,
    decay_shape: str = "1-sqrt",
    end_lr: float = 0.0,
    force_min_lr: float = 0.0,
) -> Schedule:
    """Return a schedule with warmup, base_lr, then a decay over the last `decay_steps` to `end_lr` at step `steps`.

    Warmup, stable, decay (Hägele et al. 2024, https://arxiv.org/abs/2405.18392; there, 1-sqrt over a fifth of the steps
    matches a cosine of the same length). Until the decay the rate does not depend on `steps`, so a run can be extended.
    """
    decay = partial(decayed_value, base_lr, end_lr, shape=decay_shape)
    return _with_warmup(optimizer, base_lr, warmup_length, decay, steps - decay_steps, steps, force_min_lr)


def build_scheduler(cfg: OptimConfig, optimizer: Optimizer, total_steps: int, cooldown_start: int | None) -> Schedule:
    """Build the schedule of --lr-scheduler for `total_steps`; const-cooldown's cooldown starts at `cooldown_start`."""
    if cfg.skip_scheduler:
        return const_lr(optimizer, cfg.lr, warmup_length=0)
    schedule: Schedule = SCHEDULES.get(cfg.lr_scheduler)(optimizer, cfg, total_steps, cooldown_start)
    return schedule


@SCHEDULES.register("cosine", help="a cosine over all steps after the warmup", uses=("lr_cooldown_end", "force_min_lr"))
def _cosine(optimizer: Optimizer, cfg: OptimConfig, total_steps: int, cooldown_start: int | None) -> Schedule:
    return cosine_lr(optimizer, cfg.lr, cfg.warmup, total_steps, cfg.lr_cooldown_end, cfg.force_min_lr)


@SCHEDULES.register("const", help="constant after the warmup")
def _const(optimizer: Optimizer, cfg: OptimConfig, total_steps: int, cooldown_start: int | None) -> Schedule:
    return const_lr(optimizer, cfg.lr, cfg.warmup)


@SCHEDULES.register(
    "const-cooldown",
    help="constant, then a polynomial over the last epochs",
    requires=("epochs_cooldown",),
    decay_length="epochs_cooldown",
    uses=("lr_cooldown_end", "lr_cooldown_power", "force_min_lr"),
)
def _const_cooldown(optimizer: Optimizer, cfg: OptimConfig, total_steps: int, cooldown_start: int | None) -> Schedule:
    if cooldown_start is None:
        raise ConfigError("--lr-scheduler const-cooldown needs --epochs-cooldown, the number of epochs of the cooldown")
    power, end = cfg.lr_cooldown_power, cfg.lr_cooldown_end
    cooldown = total_steps - cooldown_start
    return const_lr_cooldown(
        optimizer, cfg.lr, cfg.warmup, total_steps, cooldown, power, end, force_min_lr=cfg.force_min_lr
    )


@SCHEDULES.register(
    "wsd",
    help="warmup, stable, decay: constant, then a decay over the last steps",
    decay_length="lr_decay_fraction",
    uses=("lr_decay_fraction", "lr_decay_shape", "lr_cooldown_end", "force_min_lr"),
)
def _wsd(optimizer: Optimizer, cfg: OptimConfig, total_steps: int, cooldown_start: int | None) -> Schedule:
    decay, shape, end = round(cfg.lr_decay_fraction * total_steps), cfg.lr_decay_shape, cfg.lr_cooldown_end
    return wsd_lr(optimizer, cfg.lr, cfg.warmup, total_steps, decay, shape, end, cfg.force_min_lr)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


DECAY_SHAPES.register("1-sqrt")(lambda progress: 1 - math.sqrt(progress))
DECAY_SHAPES.register("linear")(lambda progress: 1 - progress)
DECAY_SHAPES.register("cosine")(_half_cosine)


def _with_warmup(  # noqa: PLR0917 - the order of the schedules above
    optimizer: Optimizer,
    base_lr: float,
    warmup_length: int,
    decay: Callable[[float], float],
    start: int,
    end: int,
    force_min_lr: float,
) -> Schedule:
    """Return a schedule with warmup, then `decay` of a step's progress from `start` to `end`, at least `force_min_lr`.

    Calling it with a step sets the learning rate of each group, times the group's LR_FACTOR, and returns it without
    that factor.
    """

    def adjust(step: int) -> float:
        if step < warmup_length:
            lr = warmup_value(base_lr, warmup_length, step)
        else:
            lr = max(decay(_progress(step, start, end)), force_min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get(LR_FACTOR, 1.0)
        return lr

    return adjust


def _progress(step: int, start: int, end: int) -> float:
    """Return the progress of `step` from `start` (0) to `end` (1), clamped to [0, 1]."""
    if step >= end:
        return 1.0
    return (step - start) / (end - start) if step > start else 0.0
