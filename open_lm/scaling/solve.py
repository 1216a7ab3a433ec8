"""Minimize the residuals of a sum of powers, L = sum_j exp(X_j theta).

log L is a log-sum-exp, as in Hoffmann et al. 2022 (arXiv 2203.15556): amplitudes stay positive, and gradients have a
similar size over many orders of magnitude.

`refine` solves many problems of the same X at once: all starts of a fit, or all resamples of a bootstrap.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bounds = tuple[Array, Array]  # smallest and largest theta

HUBER_DELTA = 1e-3  # of log residuals, as in Hoffmann et al. 2022
_REFINED_STARTS = 12  # starts with the lowest objective that `refine` follows
_FOLLOWED_STARTS = 2  # results of `refine` that L-BFGS follows
_ITERATIONS = 100
_TOLERANCE = 1e-8  # relative change of the objective of a converged problem
_DAMPING = (1e-3, 1e-12, 1e12)  # first, smallest and largest


def evaluate(terms: Array, theta: Array) -> tuple[Array, Array]:
    """Return log L (..., points) and its gradient (..., points, coefficients) for theta (..., coefficients)."""
    num_terms, num_points, width = terms.shape
    exponents = (theta @ terms.reshape(-1, width).T).reshape(*theta.shape[:-1], num_terms, num_points)
    top = exponents.max(axis=-2, keepdims=True)
    powers = np.exp(exponents - top)
    total = powers.sum(axis=-2, keepdims=True)
    logs = (np.log(total) + top)[..., 0, :]
    shares = powers / total
    gradient = sum(shares[..., term, :, None] * terms[term] for term in range(num_terms))
    return logs, np.asarray(gradient)


def predict(terms: Array, theta: Array) -> Array:
    """Return L (..., points)."""
    return np.exp(evaluate(terms, theta)[0])


def fit(terms: Array, loss: Array, starts: Array, bounds: Bounds, *, robust: bool, polish: bool = True) -> Array:
    """Return theta (coefficients,) of the lowest objective over all starts.

    Args:
        terms: X (terms, points, coefficients).
        loss: measured losses (points,).
        starts: (starts, coefficients).
        bounds: smallest and largest theta.
        robust: minimize the Huber loss of log residuals, else the sum of squared residuals of the loss.
        polish: minimize a Huber loss with L-BFGS, from the best results of `refine`.
    """

    def repeated(number: int) -> tuple[Array, Array]:
        return np.broadcast_to(loss, (number, len(loss))), np.ones((number, len(loss)))

    first = _residuals(terms, *repeated(len(starts)), starts, robust)[2]
    starts = starts[np.argsort(first, kind="stable")[:_REFINED_STARTS]]
    theta, objective = refine(terms, *repeated(len(starts)), starts, bounds=bounds, robust=robust)
    order = np.argsort(objective, kind="stable")
    if not (robust and polish):
        return theta[order[0]]
    results = [_lbfgs(terms, loss, theta[index], bounds) for index in order[:_FOLLOWED_STARTS]]
    return min(results, key=lambda result: result[1])[0]


def refine(
    terms: Array, loss: Array, weights: Array, theta: Array, *, bounds: Bounds, robust: bool
) -> tuple[Array, Array]:
    """Minimize problems in parallel with the Levenberg-Marquardt method. Return theta and the objectives.

    The Huber loss is minimized by iteratively reweighted least squares. Values outside the bounds are clipped.

    Args:
        terms: X (terms, points, coefficients), of all problems.
        loss: (problems, points).
        weights: (problems, points).
        theta: starts (problems, coefficients).
        bounds: smallest and largest theta.
        robust: see `fit`.
    """
    theta = np.array(theta)
    objective, damping = np.empty(len(theta)), np.full(len(theta), _DAMPING[0])
    active = np.arange(len(theta))
    residuals, jacobian, objective = _residuals(terms, loss, weights, theta, robust)
    settled = np.zeros(len(theta), int)
    for _ in range(_ITERATIONS):
        if not len(active):
            break
        step = _step(residuals[active], jacobian[active], weights[active], damping[active], robust)
        moved = np.clip(theta[active] + step, *bounds)
        trial = _residuals(terms, loss[active], weights[active], moved, robust)
        better = trial[2] <= objective[active]
        gain = (objective[active] - trial[2]) / np.maximum(objective[active], 1e-300)
        accepted = active[better]
        theta[accepted], residuals[accepted], jacobian[accepted] = moved[better], trial[0][better], trial[1][better]
        objective[accepted] = trial[2][better]
        damping[active] = np.clip(damping[active] * np.where(better, 0.2, 5.0), *_DAMPING[1:])
        settled[active] = np.where(better & (gain < _TOLERANCE), settled[active] + 1, 0)
        active = active[(settled[active] < 2) & (damping[active] < _DAMPING[2])]
    return theta, objective


def _residuals(terms: Array, loss: Array, weights: Array, theta: Array, robust: bool) -> tuple[Array, Array, Array]:
    """Return residuals (problems, points), their Jacobian (problems, points, coefficients) and the objectives."""
    logs, gradient = evaluate(terms, theta)
    if robust:
        residuals = logs - np.log(loss)
        clipped = np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)
        return residuals, gradient, (weights * clipped * (residuals - clipped / 2)).sum(axis=-1)
    values = np.exp(logs)
    residuals = values - loss
    return residuals, values[..., None] * gradient, (weights * residuals**2).sum(axis=-1) / 2


def _step(residuals: Array, jacobian: Array, weights: Array, damping: Array, robust: bool) -> Array:
    """Return a step of the Levenberg-Marquardt method (problems, coefficients)."""
    if robust:
        weights = weights * np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residuals), 1e-300))
    weighted = weights[..., None] * jacobian
    transposed = weighted.transpose(0, 2, 1)
    normal = transposed @ jacobian
    gradient = (transposed @ residuals[..., None])[..., 0]
    diagonal = np.diagonal(normal, axis1=1, axis2=2)
    scale = np.sqrt(np.maximum(diagonal, 1e-12 * diagonal.max(axis=-1, keepdims=True) + 1e-300))
    scaled = normal / (scale[:, :, None] * scale[:, None, :])
    scaled += damping[:, None, None] * np.eye(normal.shape[-1])
    return -np.linalg.solve(scaled, (gradient / scale)[..., None])[..., 0] / scale


def _lbfgs(terms: Array, loss: Array, start: Array, bounds: Bounds) -> tuple[Array, float]:
    """Minimize the Huber loss of log residuals with L-BFGS. Return theta and the objective."""
    from scipy import optimize

    targets, scale = np.log(loss), HUBER_DELTA**-2  # brings the objective to an order of 1, which tolerances expect

    def objective(theta: Array) -> tuple[float, Array]:
        logs, gradient = evaluate(terms, theta)
        residuals = logs - targets
        clipped = np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)
        value = float(clipped @ (residuals - clipped / 2))
        return scale * value, scale * (clipped @ gradient)

    options = {"maxiter": 300, "ftol": 1e-14, "gtol": 1e-8, "maxcor": 20}
    box = list(zip(*bounds, strict=True))
    result = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=box, options=options)
    return np.asarray(result.x), float(result.fun)
