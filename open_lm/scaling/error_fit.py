"""Fit the law of the error to runs, with resamples and the errors on held-out sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from open_lm.errors import ConfigError
from open_lm.scaling.candidates import Groups, comparable, judged
from open_lm.scaling.error_law import COEFFICIENTS, ErrorFits, ErrorPoints, fit_errors, mean_error
from open_lm.scaling.points import same, scales
from open_lm.scaling.resampling import draw
from open_lm.scaling.solve import Array

_MIN_ERROR = 1e-3  # of a held-out run, whose error is compared as a ratio


@dataclass
class ErrorFit:
    """The fitted law of the error.

    Attributes:
        tasks: the error is 1 - mean accuracy over these.
        fit: the coefficients of one fit.
        draws: the coefficients of one fit per resample.
        held_out: log of predicted over measured error of runs whose size was left out of the fit.
    """

    tasks: tuple[str, ...]
    fit: ErrorFits
    draws: ErrorFits
    held_out: Array


def fit_error_law(
    groups: Groups, tasks: tuple[str, ...], loss: str, resamples: int, generator: np.random.Generator
) -> ErrorFit | None:
    """Fit the law to the runs that have all tasks; return None if the first training set has no such run.

    Raises:
        ConfigError: fewer runs than coefficients.
    """
    groups = _rated(groups, tasks)
    found = len(groups[0])
    if not found:
        return None
    if found < len(COEFFICIENTS):
        raise ConfigError(
            f"found {found} runs with all of --error-tasks, expected at least {len(COEFFICIENTS)}, the number of "
            "coefficients of the law of the error; evaluate more runs, or name fewer tasks"
        )
    problem = _Problem(groups, tasks, loss)
    weights, losses = draw(problem.runs, loss, resamples, generator)
    return ErrorFit(tasks, problem.fit()[0], problem.fit(weights, losses)[0], _held_out(problem))


def fit_tasks(groups: Groups, loss: str) -> dict[str, ErrorFits]:
    """Return the law of the error of each task, if enough runs of the first training set have the task."""
    laws = {}
    for task in sorted({task for run in groups[0] for task in run.accuracy}):
        rated = _rated(groups, (task,))
        if len(rated[0]) >= len(COEFFICIENTS):
            laws[task] = _Problem(rated, (task,), loss).fit()[0]
    return laws


def _rated(groups: Groups, tasks: Sequence[str]) -> Groups:
    """Return the runs that have all tasks, of the first training set and of those that can share its exponent."""
    rated = [[run for run in group if mean_error(run, tasks) is not None] for group in groups]
    return [rated[0], *(group for group in comparable(rated)[1:] if len(group) >= len(COEFFICIENTS))]


class _Problem:
    """The points of all training sets."""

    def __init__(self, groups: Groups, tasks: Sequence[str], loss: str) -> None:
        self.groups = groups
        self.runs = [run for group in groups for run in group]
        self.losses = np.array([run.losses[loss][0] for run in self.runs])
        self.errors = np.array([mean_error(run, tasks) for run in self.runs], float)
        self.ends = np.cumsum([len(group) for group in groups])

    def split(self, values: Array) -> list[Array]:
        """Split values (..., runs) by training set."""
        return np.split(values, self.ends[:-1], axis=-1)

    def fit(self, weights: Array | None = None, losses: Array | None = None) -> list[ErrorFits]:
        """Return the fits of each training set, one for each row of weights and losses (fits, runs)."""
        weights = np.ones((1, len(self.runs))) if weights is None else weights
        losses = np.broadcast_to(self.losses if losses is None else losses, weights.shape)
        errors = np.broadcast_to(self.errors, weights.shape)
        parts = zip(*map(self.split, (losses, errors, weights)), strict=True)
        return fit_errors([ErrorPoints(*part) for part in parts])


def _held_out(problem: _Problem) -> Array:
    """Return the log of predicted over measured error for runs of each size but the smallest, fitted without it.

    Runs of few tokens are not judged; see `judged`. The errors of all training sets count. Both errors are at least
    _MIN_ERROR: a task may be solved, and the law may predict an error below 0.
    """
    held = [np.zeros(0)]
    for size in scales(problem.runs)[1:]:
        is_kept = np.array([not same(run.params, size[0].params) for run in problem.runs])
        if min(part.sum() for part in problem.split(is_kept)) < len(COEFFICIENTS):
            continue
        fits = problem.fit(is_kept[None].astype(float))
        parts = zip(problem.groups, fits, *map(problem.split, (is_kept, problem.losses, problem.errors)), strict=True)
        for group, fit, kept, losses, errors in parts:
            chosen = {id(run) for run in judged([run for run, known in zip(group, kept, strict=True) if not known])}
            rows = np.array([id(run) in chosen for run in group])
            held.append(
                np.log(np.maximum(fit.predict(losses[rows])[0], _MIN_ERROR) / np.maximum(errors[rows], _MIN_ERROR))
            )
    return np.concatenate(held)
