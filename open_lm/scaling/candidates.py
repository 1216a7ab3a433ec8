"""Fit a law to runs, and measure how well it predicts sizes that it has not seen.

Leave-one-scale-out: for each size but the smallest, the law is fitted to the runs of all other sizes and predicts those
of this size. The smallest size is always kept, because a law of large models need not hold below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from open_lm.config.registry import SCALING_LAWS
from open_lm.errors import ConfigError
from open_lm.scaling import solve
from open_lm.scaling.laws import Law
from open_lm.scaling.points import same, scales
from open_lm.scaling.resampling import draw
from open_lm.scaling.runs import Run
from open_lm.scaling.solve import Array

COMPUTE_OPTIMAL = 20  # tokens per parameter, as in Hoffmann et al. 2022
_FOLD_STARTS = 6


@dataclass(frozen=True)
class Candidate:
    """A way to fit the loss.

    Attributes:
        law: name in SCALING_LAWS.
        robust: minimize the Huber loss of log residuals, else the squared residuals of the loss.
        active: N counts the parameters of matrix products only, else all.
        min_multiplier: runs with fewer tokens per parameter are not used.
    """

    law: str
    robust: bool
    active: bool = False
    min_multiplier: float = 0.0

    def __str__(self) -> str:
        parts = [self.law, "Huber" if self.robust else "least squares", "active N" if self.active else "total N"]
        return ", ".join([*parts, f"M >= {self.min_multiplier:g}"] if self.min_multiplier else parts)

    def uses(self, run: Run) -> bool:
        """Return whether the fit uses a run."""
        return run.multiplier >= self.min_multiplier * 0.99

    def size(self, run: Run) -> float:
        """Return N of a run."""
        return float((run.active_params if self.active else None) or run.params)


@dataclass
class Member:
    """A fitted law.

    Attributes:
        theta: its coefficients, see laws.py.
        held_out: log of predicted over measured loss of the runs that each fold left out.
        at_bounds: coefficients at a bound.
        weight: its share in the prediction.
        draws: coefficients of resamples (resamples, coefficients).
    """

    candidate: Candidate
    theta: Array
    held_out: list[Array]
    at_bounds: list[str]
    weight: float = 1.0
    draws: Array = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def law(self) -> Law:
        law: Law = SCALING_LAWS.get(self.candidate.law)
        return law

    @property
    def held_out_error(self) -> float:
        """Root mean square of the held-out errors, each size with the same weight; NaN without folds."""
        if not self.held_out:
            return float("nan")
        return float(np.sqrt(np.mean([np.mean(errors**2) for errors in self.held_out])))

    def predict(self, params: float, tokens: float, theta: Array) -> Array:
        """Return the loss for theta (..., coefficients)."""
        return solve.predict(self.law.design([params], [tokens]), theta)[..., 0]


def fit_candidate(candidate: Candidate, runs: Sequence[Run], loss: str) -> Member:
    """Fit a candidate and its folds.

    Raises:
        ConfigError: fewer runs than coefficients.
    """
    law: Law = SCALING_LAWS.get(candidate.law)
    used = [run for run in runs if candidate.uses(run)]
    if len(used) < len(law.coefficients):
        names = ", ".join(item.name for item in law.coefficients)
        raise ConfigError(
            f"--law {candidate.law}: found {len(used)} runs to fit, expected at least {len(law.coefficients)}, the "
            f"number of coefficients ({names}); add runs, or raise --max-flops"
        )
    terms, losses = _points(candidate, law, used, loss)
    theta = solve.fit(terms, losses, law.starts, law.bounds, candidate.robust)
    return Member(candidate, theta, _held_out(candidate, used, runs, loss, theta), law.at_bounds(theta))


def resample(member: Member, runs: Sequence[Run], loss: str, number: int, generator: np.random.Generator) -> Array:
    """Return the coefficients (number, coefficients) of fits to resamples of the runs."""
    candidate, law = member.candidate, member.law
    used = [run for run in runs if candidate.uses(run)]
    weights, losses = draw(used, loss, number, generator)
    terms, _ = _points(candidate, law, used, loss)
    starts = np.broadcast_to(member.theta, (number, len(member.theta)))
    return solve.refine(terms, losses, weights, starts, bounds=law.bounds, robust=candidate.robust)[0]


def _points(candidate: Candidate, law: Law, runs: Sequence[Run], loss: str) -> tuple[Array, Array]:
    terms = law.design([candidate.size(run) for run in runs], [run.tokens for run in runs])
    return terms, np.array([run.losses[loss][0] for run in runs])


def _held_out(candidate: Candidate, used: Sequence[Run], runs: Sequence[Run], loss: str, theta: Array) -> list[Array]:
    """Return the errors of each fold that has enough runs for the law. Each start of a fold is one problem."""
    law: Law = SCALING_LAWS.get(candidate.law)
    groups = scales(runs)[1:]
    masks = [np.array([not same(run.params, group[0].params) for run in used]) for group in groups]
    folds = [
        (group, mask) for group, mask in zip(groups, masks, strict=True) if mask.sum() >= len(law.coefficients)
    ]  # fmt: skip
    if not folds:
        return []
    terms, losses = _points(candidate, law, used, loss)
    grid = law.starts
    starts = np.concatenate([[theta], grid[:: max(1, len(grid) // _FOLD_STARTS)]])
    weights = np.repeat(np.array([mask for _, mask in folds], float), len(starts), axis=0)
    many = np.broadcast_to(losses, weights.shape)
    fitted, objective = solve.refine(
        terms, many, weights, np.tile(starts, (len(folds), 1)), bounds=law.bounds, robust=candidate.robust
    )
    best = objective.reshape(len(folds), -1).argmin(axis=1) + np.arange(len(folds)) * len(starts)
    errors = []
    for (group, _), coefficients in zip(folds, fitted[best], strict=True):
        held_terms, held_losses = _points(candidate, law, _judged(group), loss)
        errors.append(np.log(solve.predict(held_terms, coefficients) / held_losses))
    return errors


def _judged(group: Sequence[Run]) -> Sequence[Run]:
    """Return the runs of a size that are trained at least compute-optimally, or all if none is."""
    return [run for run in group if run.multiplier >= COMPUTE_OPTIMAL * 0.99] or group
