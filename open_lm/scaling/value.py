"""Estimate which further run would shrink the interval of a target most, for its cost.

The draws of a fit are a sample of laws that the runs allow. Within this sample, a new run of loss L' leaves the part of
the target's spread that L' does not explain: with correlation r between both, and the noise of a measurement, the
standard deviation falls by 1 - sqrt(1 - r^2) (linear-Gaussian design of experiments, Chaloner and Verdinelli 1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from open_lm.scaling.fitting import ScalingFit
from open_lm.scaling.points import same, scales

_MULTIPLIERS = (20.0, 80.0, 320.0)
_GROWTH = (1.0, 2.0, 4.0)  # sizes relative to the largest of the fit


@dataclass(frozen=True)
class RunValue:
    """A further run: its compute 6ND, and the expected relative reduction of the target's interval."""

    params: int
    tokens: int
    flops: float
    reduction: float


def value_of_runs(fit: ScalingFit, target: tuple[int, int], count: int = 8) -> list[RunValue]:
    """Return runs below the target's compute, the largest reduction first.

    Candidates are the sizes of the fit, and twice and four times the largest, at several multipliers. The noise of a
    measurement is the mean held-out error.
    """
    goal = np.log(fit.law_draws(*target))
    noise = float(np.mean([member.held_out_error for member in fit.members if member.held_out] or [0.0]))
    sizes = [group[0].params for group in scales(fit.selection.loss)]
    sizes += [round(sizes[-1] * factor) for factor in _GROWTH[1:]]
    known = {(run.params, run.tokens) for run in fit.selection.loss}
    values = []
    for params in sizes:
        for multiplier in _MULTIPLIERS:
            tokens, flops = round(params * multiplier), 6.0 * params * params * multiplier
            is_known = any(same(params, n) and same(tokens, d) for n, d in known)
            if is_known or flops >= 6.0 * target[0] * target[1]:
                continue
            measured = np.log(fit.law_draws(params, tokens))
            values.append(RunValue(params, tokens, flops, _reduction(goal, measured, noise)))
    return sorted(values, key=lambda item: -item.reduction)[:count]


def _reduction(goal: np.ndarray, measured: np.ndarray, noise: float) -> float:
    covariance = np.cov(goal, measured)
    explained = covariance[0, 1] ** 2 / max(covariance[0, 0] * (covariance[1, 1] + noise**2), 1e-30)
    return float(1 - np.sqrt(max(0.0, 1 - explained)))
