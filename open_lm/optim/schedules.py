"""Learning rate as a function of the step. Pure functions, and callables that also set it on an optimizer.

A step counts from 0 and is the number of optimizer updates already made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from open_lm.config.sections import OptimConfig
from open_lm.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer

Schedule = Callable[[int], float]


def warmup_value(base_lr: float, warmup_length: int, step: int) -> float:
    """Linear warmup: base_lr / warmup_length at step 0, base_lr at step warmup_length - 1."""
    return base_lr * (step + 1) / warmup_length


def cosine_value(base_lr: float, min_lr: float, progress: float) -> float:
    """Half a cosine from base_lr at progress 0 to min_lr at progress 1 (Loshchilov & Hutter, 2016)."""
    return min_lr + _half_cosine(progress) * (base_lr - min_lr)


def polynomial_value(base_lr: float, min_lr: float, progress: float, power: float) -> float:
    """(1 - progress)^power from base_lr at progress 0 to min_lr at progress 1; linear for power 1."""
    return min_lr + (1 - progress) ** power * (base_lr - min_lr)


def decayed_value(base_lr: float, min_lr: float, progress: float, shape: str) -> float:
    """From base_lr at progress 0 to min_lr at progress 1, as 1 - sqrt(progress), which falls fastest at first, as a
    straight line, or as half a cosine. ConfigError for another shape."""
    if shape not in DECAY_SHAPES:
        raise ConfigError(f"--lr-decay-shape: found {shape!r}, expected one of {', '.join(DECAY_SHAPES)}")
    return min_lr + DECAY_SHAPES[shape](progress) * (base_lr - min_lr)


def const_lr(optimizer: Optimizer, base_lr: float, warmup_length: int) -> Schedule:
    """Warmup, then base_lr. The result takes a step, sets the optimizer's learning rate and returns it."""

    def value(step: int) -> float:
        return warmup_value(base_lr, warmup_length, step) if step < warmup_length else base_lr

    return _setting(optimizer, value)


def cosine_lr(  # noqa: PLR0917 - callers pass these by position
    optimizer: Optimizer,
    base_lr: float,
    warmup_length: int,
    steps: int,
    min_lr: float = 0.0,
    force_min_lr: float = 0.0,
) -> Schedule:
    """Warmup, then a cosine that reaches `min_lr` at step `steps`; after the warmup never below `force_min_lr`."""

    def lowered(progress: float) -> float:
        return max(cosine_value(base_lr, min_lr, progress), force_min_lr)

    return _setting(optimizer, _after_warmup(base_lr, warmup_length, lowered, warmup_length, steps))


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
    """Warmup, base_lr, and over the last `cooldown_steps` of `steps` a polynomial down to `cooldown_end_lr`."""

    def lowered(progress: float) -> float:
        return max(polynomial_value(base_lr, cooldown_end_lr, progress, cooldown_power), force_min_lr)

    return _setting(optimizer, _after_warmup(base_lr, warmup_length, lowered, steps - cooldown_steps, steps))


def wsd_lr(  # noqa: PLR0917 - as its neighbours
    optimizer: Optimizer,
    base_lr: float,
    warmup_length: int,
    steps: int,
    decay_steps: int,
    decay_shape: str = "1-sqrt",
    end_lr: float = 0.0,
    force_min_lr: float = 0.0,
) -> Schedule:
    """Warmup, base_lr, and over the last `decay_steps` of `steps` down to `end_lr`, which step `steps` would have.

    Warmup, stable, decay (Hägele et al. 2024, https://arxiv.org/abs/2405.18392, where 1-sqrt over a fifth of the steps
    equals a cosine of that length): until the decay nothing depends on `steps`, so that a run can go on from there.
    """

    def lowered(progress: float) -> float:
        return max(decayed_value(base_lr, end_lr, progress, decay_shape), force_min_lr)

    return _setting(optimizer, _after_warmup(base_lr, warmup_length, lowered, steps - decay_steps, steps))


def build_scheduler(cfg: OptimConfig, optimizer: Optimizer, total_steps: int, cooldown_start: int | None) -> Schedule:
    """The schedule of --lr-scheduler over `total_steps`; `cooldown_start` is the step where const-cooldown descends."""
    if cfg.skip_scheduler:
        return const_lr(optimizer, cfg.lr, warmup_length=0)
    if cfg.lr_scheduler == "cosine":
        return cosine_lr(optimizer, cfg.lr, cfg.warmup, total_steps, cfg.lr_cooldown_end, cfg.force_min_lr)
    if cfg.lr_scheduler == "const":
        return const_lr(optimizer, cfg.lr, cfg.warmup)
    if cfg.lr_scheduler == "const-cooldown":
        if cooldown_start is None:
            raise ConfigError("--lr-scheduler const-cooldown needs --epochs-cooldown, the number of its last epochs")
        power, end = cfg.lr_cooldown_power, cfg.lr_cooldown_end
        cooldown = total_steps - cooldown_start
        return const_lr_cooldown(
            optimizer, cfg.lr, cfg.warmup, total_steps, cooldown, power, end, force_min_lr=cfg.force_min_lr
        )
    if cfg.lr_scheduler == "wsd":
        decay, shape, end = round(cfg.lr_decay_fraction * total_steps), cfg.lr_decay_shape, cfg.lr_cooldown_end
        return wsd_lr(optimizer, cfg.lr, cfg.warmup, total_steps, decay, shape, end, cfg.force_min_lr)
    raise ConfigError(f"--lr-scheduler: found {cfg.lr_scheduler!r}, expected cosine, const, const-cooldown or wsd")


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


# What is left of the way down, by progress.
DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
    "linear": lambda progress: 1 - progress,
    "cosine": _half_cosine,
}


def _after_warmup(
    base_lr: float, warmup_length: int, lowered: Callable[[float], float], start: int, end: int
) -> Schedule:
    """Warmup, then `lowered` of how far a step is from `start` to `end`."""

    def value(step: int) -> float:
        if step < warmup_length:
            return warmup_value(base_lr, warmup_length, step)
        return lowered(_progress(step, start, end))

    return value


def _progress(step: int, start: int, end: int) -> float:
    """How far `step` is from `start` to `end`, kept within 0 and 1."""
    if step >= end:
        return 1.0
    return (step - start) / (end - start) if step > start else 0.0


def _setting(optimizer: Optimizer, value: Schedule) -> Schedule:
    def adjust(step: int) -> float:
        lr = value(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr

    return adjust
