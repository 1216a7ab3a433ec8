"""Downstream error as a function of loss, Err(L) = epsilon - k exp(-gamma L) (Gadre et al. 2024, arXiv 2403.08540).

For a given gamma the law is linear in epsilon and k, so the fit is a search over gamma only.

`fit_errors` fits the runs of several training sets together: they share the exponent gamma, and each has its own
epsilon and k, as in the fits of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from open_lm.scaling.runs import Run
from open_lm.scaling.solve import Array

COEFFICIENTS = ("k", "gamma", "epsilon")
GAMMAS = (0.01, 20.0)  # smallest and largest
_GRID = 200
_ZOOMS = 12


@dataclass(frozen=True)
class ErrorFits:
    """Coefficients of many fits, each an array (fits,). k is 0 where the error does not fall with the loss."""

    k: Array
    gamma: Array
    epsilon: Array

    def predict(self, loss: Array) -> Array:
        """Return the error at the losses (fits, points) or (points,)."""
        k, gamma, epsilon = (np.asarray(values)[:, None] for values in (self.k, self.gamma, self.epsilon))
        return np.asarray(epsilon - k * np.exp(-gamma * loss))

    def at(self, loss: float, index: int = 0) -> float:
        """Return the error of one fit at a loss."""
        return float(self.epsilon[index] - self.k[index] * math.exp(-self.gamma[index] * loss))

    def values(self, index: int = 0) -> dict[str, float]:
        """Return the coefficients of a fit by name."""
        return {name: float(getattr(self, name)[index]) for name in COEFFICIENTS}

    def at_bounds(self, index: int = 0) -> list[str]:
        """Return a description of each coefficient of a fit that is at a bound."""
        gamma = self.gamma[index]
        limits = [f"gamma = {limit:g}" for limit in GAMMAS if math.isclose(gamma, limit, rel_tol=1e-3)]
        return ["k = 0"] if self.k[index] <= 0 else limits


@dataclass(frozen=True)
class ErrorPoints:
    """Losses, errors and weights of the runs of one training set in many fits, each an array (fits, points)."""

    loss: Array
    error: Array
    weights: Array


def fit_errors(groups: Sequence[ErrorPoints]) -> list[ErrorFits]:
    """Fit the law by weighted least squares to each training set. They share gamma, not epsilon and k."""
    number = len(groups[0].error)
    low, high, rows = np.full(number, math.log(GAMMAS[0])), np.full(number, math.log(GAMMAS[1])), np.arange(number)
    for zoom in range(_ZOOMS):
        grid = np.linspace(low, high, _GRID if zoom == 0 else 21)  # (grid, fits)
        best = np.sum([_profile(points, np.exp(grid)) for points in groups], axis=0).argmin(axis=0)
        low, high = grid[np.maximum(best - 1, 0), rows], grid[np.minimum(best + 1, len(grid) - 1), rows]
    gamma = np.exp(grid[best, rows])
    fits = []
    for points in groups:
        epsilon, k = _linear(points, gamma)
        fits.append(ErrorFits(k, gamma, epsilon))
    return fits


def _profile(points: ErrorPoints, gamma: Array) -> Array:
    """Return the sums of squares (grid, fits) of the best epsilon and k for each gamma (grid, fits)."""
    epsilon, k = _linear(points, gamma)
    residuals = epsilon[..., None] - k[..., None] * np.exp(-gamma[..., None] * points.loss) - points.error
    return np.asarray((points.weights * residuals**2).sum(axis=-1))


def _linear(points: ErrorPoints, gamma: Array) -> tuple[Array, Array]:
    """Return epsilon and k >= 0 of the least squares for given gamma (..., fits)."""
    error, weights = points.error, points.weights
    shape = np.exp(-gamma[..., None] * points.loss)
    total = weights.sum(axis=-1)
    mean_x, mean_y = (weights * shape).sum(axis=-1) / total, (weights * error).sum(axis=-1) / total
    centered = shape - mean_x[..., None]
    variance = (weights * centered**2).sum(axis=-1)
    slope = (weights * centered * error).sum(axis=-1) / np.maximum(variance, 1e-300)
    k = np.maximum(-slope, 0.0)
    return mean_y + k * mean_x, k


def mean_error(run: Run, tasks: Sequence[str]) -> float | None:
    """Return 1 - mean accuracy over the tasks; None if the run lacks one of them."""
    if not tasks or any(task not in run.accuracy for task in tasks):
        return None
    return 1 - float(np.mean([run.accuracy[task] for task in tasks]))
