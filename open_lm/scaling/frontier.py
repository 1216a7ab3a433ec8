"""Iso-FLOP curves and the compute-optimal frontier of a fit: the size of the lowest loss for a compute budget 6ND."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from open_lm.scaling.fitting import Prediction, ScalingFit
from open_lm.scaling.solve import Array

_GRID = 41
_BEYOND = 4.0  # factor by which token multipliers go beyond those of runs and targets
_FLAT = 1e-9  # relative difference of losses that are equal up to rounding


@dataclass(frozen=True)
class Optimum:
    """The size N and tokens D of the lowest predicted loss (nats per token) for a compute budget in FLOPs."""

    flops: float
    params: float
    tokens: float
    loss: float


class Frontier:
    """Curves of equal compute for the range of compute and token multipliers of the runs and targets of a fit."""

    def __init__(self, fit: ScalingFit, predictions: Sequence[Prediction]) -> None:
        self.fit = fit
        points = [(float(run.params), float(run.tokens)) for run in fit.selection.loss]
        points += [(float(item.params), float(item.tokens)) for item in predictions]
        params, tokens = np.array(points).T
        compute, multipliers = 6 * params * tokens, tokens / params
        self.compute = (float(compute.min()), float(compute.max()))
        self.multipliers = (float(multipliers.min()) / _BEYOND, float(multipliers.max()) * _BEYOND)

    def budgets(self, number: int) -> Array:
        """Return `number` compute budgets in FLOPs, evenly spaced in the logarithm."""
        return np.geomspace(*self.compute, number)

    def curve(self, flops: float, number: int = _GRID) -> tuple[Array, Array]:
        """Return `number` sizes and their predicted losses for a compute budget in FLOPs."""
        low, high = self.multipliers
        params = np.geomspace((flops / (6 * high)) ** 0.5, (flops / (6 * low)) ** 0.5, number)
        return params, np.array([self._loss(flops, size) for size in params])

    def optimum(self, flops: float) -> Optimum | None:
        """Return the size with the lowest loss; None if the curve is flat or lowest at an end of its range."""
        params, losses = self.curve(flops)
        best = int(np.argmin(losses))
        if np.ptp(losses) <= _FLAT * losses[best] or best in (0, len(losses) - 1):
            return None
        result = optimize.minimize_scalar(
            lambda log_n: self._loss(flops, float(np.exp(log_n))), method="bounded",
            bounds=(np.log(params[best - 1]), np.log(params[best + 1])), options={"xatol": 1e-4},
        )  # fmt: skip
        size = float(np.exp(result.x))
        return Optimum(flops, size, flops / (6 * size), float(result.fun))

    def _loss(self, flops: float, params: float) -> float:
        return self.fit.loss(params, flops / (6 * params))
