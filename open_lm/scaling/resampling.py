"""Intervals of predictions by resampling.

A resample weighs the runs by a Dirichlet distribution (Bayesian bootstrap, Rubin 1981), which never drops a run, and
so keeps fits of few runs determined. It also replaces each measured loss by a draw from the run's interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_lm.scaling.runs import Run
from open_lm.scaling.solve import Array

_INTERVAL_WIDTH = 2 * 1.959964  # standard deviations in a 95 % interval


def draw(runs: Sequence[Run], loss: str, number: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Return weights and losses (number, runs) of resamples."""
    weights = generator.dirichlet(np.ones(len(runs)), size=number) * len(runs)
    center, lower, upper = np.array([run.losses[loss] for run in runs]).T
    noise = generator.standard_normal((number, len(runs))) * (upper - lower) / _INTERVAL_WIDTH
    return weights, np.maximum(center + noise, 0.5 * center)


def interval(values: Array, level: float) -> tuple[float, float]:
    """Return the central interval of draws."""
    lower, upper = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)
