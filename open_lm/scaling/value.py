"""Estimate which further run would shrink the interval of a target most, for its cost.

The draws of a fit are a sample of laws that the runs allow. Within this sample, a new run of loss L' removes the share
r^2 of the target's variance, with the correlation r between both (linear-Gaussian design of experiments, Chaloner and
Verdinelli 1995). The errors of the laws themselves, which intervals contain as well, remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from open_lm.scaling.fitting import ScalingFit
from open_lm.scaling.points import same, scales
from open_lm.scaling.solve import Array

_GROWTH = (2, 4)  # sizes and token multipliers relative to the largest of the fit


@dataclass(frozen=True)
class RunValue:
    """A further run: its compute 6ND, also relative to all runs of the fit, and the expected change of the interval.

    `reduction` is the share of the width of the target's interval that the run is expected to remove.
    """

    params: int
    tokens: int
    flops: float
    cost: float
    reduction: float


def value_of_runs(fit: ScalingFit, target: tuple[int, int], count: int = 8) -> list[RunValue]:
    """Return runs below the target's compute, the largest reduction first, without those that a cheaper one beats.

    Candidates are the sizes and token multipliers of the fit, and twice and four times the largest. The noise of a
    measurement is the held-out error.
    """
    goal = np.log(fit.law_draws(*target))
    noise = fit.held_out_error
    spent = sum(run.flops for run in fit.selection.loss)
    values = []
    for params in _extended([group[0].params for group in scales(fit.selection.loss)]):
        for multiplier in _extended(sorted(run.multiplier for run in fit.selection.loss)):
            tokens = round(params * multiplier)
            flops = 6.0 * params * tokens
            is_known = any(same(params, run.params) and same(tokens, run.tokens) for run in fit.selection.loss)
            if is_known or flops >= 6.0 * target[0] * target[1]:
                continue
            measured = np.log(fit.law_draws(params, tokens))
            values.append(RunValue(round(params), tokens, flops, flops / spent, _reduction(goal, measured, noise)))
    best: list[RunValue] = []
    for item in sorted(values, key=lambda item: (item.flops, -item.reduction)):
        if not best or item.reduction > best[-1].reduction:
            best.append(item)
    return best[::-1][:count]


def _extended(values: Sequence[float]) -> list[float]:
    """Return ascending values without near duplicates, followed by multiples of the largest."""
    distinct: list[float] = []
    for value in values:
        if not distinct or not same(value, distinct[-1]):
            distinct.append(value)
    return [*distinct, *(factor * distinct[-1] for factor in _GROWTH)]


def _reduction(goal: Array, measured: Array, noise: float) -> float:
    """Return the expected relative reduction of an interval that contains noise as well."""
    covariance = np.cov(goal, measured)
    explained = covariance[0, 1] ** 2 / max(covariance[1, 1] + noise**2, 1e-30)
    total = max(covariance[0, 0] + noise**2, 1e-30)
    return float(1 - np.sqrt(max(0.0, 1 - explained / total)))
