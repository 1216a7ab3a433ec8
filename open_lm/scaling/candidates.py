"""Fit a law to runs, and measure how well it predicts sizes that it has not seen.

Leave-one-scale-out: for each size but the smallest, the law is fitted to the runs of all other sizes and predicts those
of this size. The smallest size is always kept, because a law of large models need not hold below it.

Runs of several training sets are fitted together: the exponents are shared, while each set has its own amplitudes and
offset. The exponents then come from more runs.
"""

from __future__ import annotations

import itertools
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
from open_lm.scaling.settings import COMPUTE_OPTIMAL
from open_lm.scaling.solve import Array

_MIN_MULTIPLIERS = (0.0, 10.0, 20.0)
_FOLD_STARTS = 6
_SMALLEST_ERROR = 1e-3  # relative; smaller held-out errors are luck, because runs vary more with their seed

Groups = Sequence[Sequence[Run]]  # runs of each training set; the first one is that of the prediction


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

    def used(self, groups: Groups) -> list[list[Run]]:
        """Return the runs that the fit uses."""
        return [[run for run in group if run.multiplier >= 0.99 * self.min_multiplier] for group in groups]

    def size(self, run: Run) -> float:
        """Return N of a run."""
        return float((run.active_params if self.active else None) or run.params)


@dataclass
class Member:
    """A fitted law.

    Attributes:
        theta: its coefficients for the first training set, see laws.py.
        held_out: log of predicted over measured loss of the runs that each fold left out.
        at_bounds: coefficients at a bound.
        pooled: coefficients of all training sets; see `_Problem`.
        weight: its share in the prediction.
        draws: coefficients of resamples (resamples, coefficients).
    """

    candidate: Candidate
    theta: Array
    held_out: list[Array]
    at_bounds: list[str]
    pooled: Array
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


class _Problem:
    """The points of all training sets, with one column of X for each shared exponent and each amplitude of a set."""

    def __init__(self, candidate: Candidate, groups: Groups, loss: str) -> None:
        self.candidate, self.law = candidate, SCALING_LAWS.get(candidate.law)
        self.groups = candidate.used(groups)
        self.runs = [run for group in self.groups for run in group]
        self.losses = np.array([run.losses[loss][0] for run in self.runs])
        own = [item.is_log for item in self.law.coefficients]
        size, number = len(own), len(groups)
        amplitudes = np.cumsum(own) - 1
        exponents = np.cumsum(np.logical_not(own)) - 1 + number * sum(own)
        self.columns = [np.where(own, amplitudes + sum(own) * index, exponents) for index in range(number)]
        self.width = number * sum(own) + size - sum(own)
        blocks = []
        for group, columns in zip(self.groups, self.columns, strict=True):
            terms = self.design(group)
            block = np.zeros((*terms.shape[:2], self.width))
            block[:, :, columns] = terms
            blocks.append(block)
        self.terms = np.concatenate(blocks, axis=1)

    def design(self, runs: Sequence[Run]) -> Array:
        """Return X of the law for runs of one training set."""
        terms: Array = self.law.design([self.candidate.size(run) for run in runs], [run.tokens for run in runs])
        return terms

    def spread(self, theta: Array) -> Array:
        """Return coefficients (..., width) that are the same for all training sets, from (..., coefficients)."""
        pooled = np.zeros((*theta.shape[:-1], self.width))
        for columns in self.columns:
            pooled[..., columns] = theta
        return pooled

    @property
    def bounds(self) -> solve.Bounds:
        low, high = self.law.bounds
        return self.spread(low), self.spread(high)

    def refine(self, losses: Array, weights: Array, starts: Array) -> tuple[Array, Array]:
        """Return coefficients and objectives of problems; see `solve.refine`."""
        robust = self.candidate.robust
        return solve.refine(self.terms, losses, weights, starts, bounds=self.bounds, robust=robust)


def comparable(groups: Groups) -> Groups:
    """Return the first training set and the others with at least as many sizes, which can share its exponents."""
    return [group for group in groups if len(scales(group)) >= len(scales(groups[0]))]


def all_candidates(groups: Groups) -> list[Candidate]:
    """Return every law, objective, count of parameters and smallest multiplier that these runs support."""
    known = all(run.active_params for group in groups for run in group)
    return [
        candidate
        for parts in itertools.product(SCALING_LAWS, (False, True), (False, True)[: 1 + known], _MIN_MULTIPLIERS)
        if _has_enough(candidate := Candidate(*parts), groups)
    ]


def _has_enough(candidate: Candidate, groups: Groups) -> bool:
    """Return whether the runs of each training set determine the law, also without any one size."""
    number = len(SCALING_LAWS.get(candidate.law).coefficients)
    for group in candidate.used(groups):
        sizes = scales(group)
        if len(sizes) < 3 or len(group) - max(map(len, sizes[1:])) < number:
            return False
    return True


def fit_candidate(candidate: Candidate, groups: Groups, loss: str, polish: bool = True) -> Member:
    """Fit a candidate and its folds. With `polish`, a Huber loss is minimized with L-BFGS.

    Raises:
        ConfigError: fewer runs than coefficients.
    """
    problem = _Problem(candidate, groups, loss)
    law: Law = problem.law
    found = min(map(len, problem.groups))
    if found < len(law.coefficients):
        names = ", ".join(item.name for item in law.coefficients)
        raise ConfigError(
            f"--law {candidate.law}: found {found} runs to fit, expected at least {len(law.coefficients)}, the number "
            f"of coefficients ({names}); add runs, or raise --max-flops"
        )
    robust, starts = candidate.robust, problem.spread(law.starts)
    pooled = solve.fit(problem.terms, problem.losses, starts, problem.bounds, robust=robust, polish=polish)
    theta = pooled[problem.columns[0]]
    bounds = list(dict.fromkeys(name for columns in problem.columns for name in law.at_bounds(pooled[columns])))
    return Member(candidate, theta, _held_out(problem, groups, loss, pooled), bounds, pooled)


def combine(groups: Groups, loss: str) -> list[Member]:
    """Return the fits of all candidates with weights in inverse proportion to their mean squared held-out error.

    This is the combination of forecasts of Bates and Granger 1969. Candidates at a bound are left out, unless all are.

    Raises:
        ConfigError: the runs support no candidate.
    """
    members = [fit_candidate(candidate, groups, loss, polish=False) for candidate in all_candidates(groups)]
    tested = [member for member in members if member.held_out]
    chosen = [member for member in tested if not member.at_bounds] or tested
    if not chosen:
        sizes, runs = len(scales(groups[0])), len(groups[0])
        raise ConfigError(
            f"--law combined: found {runs} runs of {sizes} sizes, which determine no law after one size is left out; "
            "expected at least 3 sizes with several token multipliers; add runs, or choose one law with --law"
        )
    precision = np.array([1 / (member.held_out_error**2 + _SMALLEST_ERROR**2) for member in chosen])
    for member, weight in zip(chosen, precision / precision.sum(), strict=True):
        member.weight = float(weight)
    return sorted(chosen, key=lambda member: -member.weight)


def resample(member: Member, groups: Groups, loss: str, number: int, generator: np.random.Generator) -> Array:
    """Return the coefficients (number, coefficients) of the first training set in fits to resamples of the runs."""
    problem = _Problem(member.candidate, groups, loss)
    weights, losses = draw(problem.runs, loss, number, generator)
    starts = np.broadcast_to(member.pooled, (number, len(member.pooled)))
    return problem.refine(losses, weights, starts)[0][:, problem.columns[0]]


def _held_out(problem: _Problem, groups: Groups, loss: str, pooled: Array) -> list[Array]:
    """Return the errors of each fold that has enough runs for the law. Each start of a fold is one problem."""
    law, number = problem.law, len(problem.law.coefficients)
    sizes = [size[0].params for size in scales([run for group in groups for run in group])[1:]]
    kept = [np.array([not same(run.params, size) for run in problem.runs]) for size in sizes]
    ends = np.cumsum([0, *map(len, problem.groups)])
    folds = [
        (size, mask)
        for size, mask in zip(sizes, kept, strict=True)
        if min(mask[start:end].sum() for start, end in itertools.pairwise(ends)) >= number
    ]
    if not folds:
        return []
    grid = problem.spread(law.starts)
    starts = np.concatenate([[pooled], grid[:: max(1, len(grid) // _FOLD_STARTS)]])
    weights = np.repeat(np.array([mask for _, mask in folds], float), len(starts), axis=0)
    losses = np.broadcast_to(problem.losses, weights.shape)
    fitted, objective = problem.refine(losses, weights, np.tile(starts, (len(folds), 1)))
    best = objective.reshape(len(folds), -1).argmin(axis=1) + np.arange(len(folds)) * len(starts)
    errors = []
    for (size, _), theta in zip(folds, fitted[best], strict=True):
        for group, columns in zip(groups, problem.columns, strict=True):
            unseen = judged([run for run in group if same(run.params, size)])
            if unseen:
                measured = np.array([run.losses[loss][0] for run in unseen])
                errors.append(np.log(solve.predict(problem.design(unseen), theta[columns]) / measured))
    return errors


def judged(runs: Sequence[Run]) -> Sequence[Run]:
    """Return the runs of a size that are trained at least compute-optimally, or all if none is.

    Only they measure how well a fit predicts a size that it has not seen.
    """
    return [run for run in runs if run.multiplier >= 0.99 * COMPUTE_OPTIMAL] or runs
