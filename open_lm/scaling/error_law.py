"""Downstream error as a function of loss, Err(L) = epsilon - k exp(-gamma L) (Gadre et al. 2024, arXiv 2403.08540).

For a given gamma the law is linear in epsilon and k, so the fit is a search over gamma only.
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

    def values(self, index: int = 0) -> dict[str, float]:
        """Return the coefficients of a fit by name."""
        return {name: float(getattr(self, name)[index]) for name in COEFFICIENTS}

    def at_bounds(self, index: int = 0) -> list[str]:
        """Return a description of each coefficient of a fit that is at a bound."""
        gamma = self.gamma[index]
        limits = [f"gamma = {limit:g}" for limit in GAMMAS if math.isclose(gamma, limit, rel_tol=1e-3)]
        return ["k = 0"] if self.k[index] <= 0 else limits


def fit_error(loss: Array, error: Array, weights: Array) -> ErrorFits:
    """Fit the law by weighted least squares, one fit for each row of `error` and `weights` (fits, points).

    `loss` is (fits, points) as well, or (points,) for all fits.
    """
    loss = np.broadcast_to(loss, error.shape)
    low = np.full(len(error), math.log(GAMMAS[0]))
    high = np.full(len(error), math.log(GAMMAS[1]))
    rows = np.arange(len(error))
    for zoom in range(_ZOOMS):
        grid = np.linspace(low, high, _GRID if zoom == 0 else 21)  # (grid, fits)
        best = _profile(loss, error, weights, np.exp(grid)).argmin(axis=0)
        low, high = grid[np.maximum(best - 1, 0), rows], grid[np.minimum(best + 1, len(grid) - 1), rows]
    gamma = np.exp(grid[best, rows])
    epsilon, k = _linear(loss, error, weights, gamma)
    return ErrorFits(k, gamma, epsilon)


def _profile(loss: Array, error: Array, weights: Array, gamma: Array) -> Array:
    """Return the sums of squares (grid, fits) of the best epsilon and k for each gamma (grid, fits)."""
    epsilon, k = _linear(loss, error, weights, gamma)
    residuals = epsilon[..., None] - k[..., None] * np.exp(-gamma[..., None] * loss) - error
    return np.asarray((weights * residuals**2).sum(axis=-1))


def _linear(loss: Array, error: Array, weights: Array, gamma: Array) -> tuple[Array, Array]:
    """Return epsilon and k >= 0 of the least squares for given gamma (..., fits)."""
    shape = np.exp(-gamma[..., None] * loss)
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
