"""Fit the laws of loss and error to a table of runs, and predict targets with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np

from open_lm.config.registry import SCALING_LAWS
from open_lm.errors import ConfigError, UserError
from open_lm.scaling.candidates import Candidate, Member, combine, comparable, fit_candidate, resample
from open_lm.scaling.error_fit import ErrorFit, fit_error_law
from open_lm.scaling.error_law import COEFFICIENTS, ErrorFits
from open_lm.scaling.points import Selection, all_points, paper_points, select_runs
from open_lm.scaling.resampling import interval
from open_lm.scaling.runs import Run, active_params
from open_lm.scaling.settings import COMBINED, Settings
from open_lm.scaling.solve import Array

FAR = 100  # compute of a target, relative to the largest fitting run, from which on a warning is given


@dataclass(frozen=True)
class Prediction:
    """Loss and error of a target, each with its interval. `compute_ratio` is relative to the largest fitting run."""

    params: int
    tokens: int
    loss: float
    loss_interval: tuple[float, float]
    error: float | None
    error_interval: tuple[float, float] | None
    compute_ratio: float


@dataclass
class ScalingFit:
    """The laws fitted to the runs of one training set, the targets (params, tokens) and the time of the fit (UTC)."""

    settings: Settings
    selection: Selection
    table: Sequence[Run]
    members: list[Member]
    error: ErrorFit | None
    warnings: list[str] = field(default_factory=list)
    targets: Sequence[tuple[int, int]] = ()
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients of the loss (of the member with the largest weight) and of the error by name."""
        best = max(self.members, key=lambda member: member.weight)
        return {**best.law.values(best.theta), **(self.error.fit.values() if self.error else {})}

    @property
    def held_out_error(self) -> float:
        """Root mean square of the members' errors on held-out sizes, by weight; 0 if there are none."""
        known = [member for member in self.members if member.held_out]
        squares = [member.weight * member.held_out_error**2 for member in known]
        return float(np.sqrt(sum(squares) / sum(member.weight for member in known))) if known else 0.0

    def _size(self, member: Member, params: float) -> float:
        return active_params(params, self.table) if member.candidate.active else float(params)

    def loss(self, params: float, tokens: float) -> float:
        """Return the predicted loss: the weighted geometric mean of the members."""
        logs = [
            member.weight * np.log(member.predict(self._size(member, params), tokens, member.theta))
            for member in self.members
        ]
        return float(np.exp(sum(logs)))

    def law_draws(self, params: float, tokens: float) -> Array:
        """Return the losses (draws,) of all resamples, without the error of the laws themselves."""
        return np.concatenate([
            member.predict(self._size(member, params), tokens, member.draws) for member in self.members
        ])  # fmt: skip

    def predict(self, params: int, tokens: int) -> Prediction:
        """Return the prediction for a model of `params` parameters trained on `tokens` tokens."""
        generator = np.random.default_rng((self.settings.seed, 1))
        noise = [_noise(member.held_out, len(member.draws), generator) for member in self.members]
        loss, losses = self.loss(params, tokens), self.law_draws(params, tokens) * np.exp(np.concatenate(noise))
        level = self.settings.level
        error = error_range = None
        if self.error is not None:
            error = self.error.fit.at(loss)
            rows = np.arange(len(losses)) % len(self.error.draws.k)
            fits = ErrorFits(*(getattr(self.error.draws, name)[rows] for name in COEFFICIENTS))
            spread = np.exp(_noise([self.error.held_out], len(losses), generator))
            error_range = interval(fits.predict(losses[:, None])[:, 0] * spread, level)
        largest = max(run.flops for run in self.selection.loss)
        return Prediction(
            params, tokens, loss, interval(losses, level), error, error_range, 6.0 * params * tokens / largest
        )


def _noise(held_out: Sequence[Array], number: int, generator: np.random.Generator) -> Array:
    """Return draws of the errors of held-out sizes with random signs; zeros if there are none."""
    errors = np.concatenate([*held_out, np.zeros(0)])
    if not len(errors):
        return np.zeros(number)
    return np.asarray(generator.choice(errors, number) * generator.choice((-1.0, 1.0), number))


def fit_runs(runs: Sequence[Run], settings: Settings, targets: Sequence[tuple[int, int]] = ()) -> ScalingFit:
    """Fit the laws to the runs that the settings select.

    Raises:
        ConfigError, DataError: see `select_groups`, `fit_candidate`, `combine` and `fit_error_law`.
    """
    selections = select_groups(runs, settings, targets)
    groups = comparable([selection.loss for selection in selections])
    if settings.law == COMBINED:
        members = combine(groups, settings.loss)
    else:
        robust = SCALING_LAWS.get(settings.law).robust
        members = [fit_candidate(Candidate(settings.law, robust), groups, settings.loss)]
    generator = np.random.default_rng(settings.seed)
    for member, number in zip(members, _shares(members, settings.resamples), strict=True):
        member.draws = resample(member, groups, settings.loss, number, generator)
    rated = [selection.error for selection in selections]
    error = fit_error_law(rated, settings.error_tasks, settings.loss, settings.resamples, generator)
    fit = ScalingFit(settings, selections[0], runs, members, error, targets=targets)
    fit.warnings += [
        f"{member.candidate}: the fit is at a bound ({', '.join(member.at_bounds)}): these runs do not determine it"
        for member in members
        if member.at_bounds
    ]
    return fit


def select_groups(runs: Sequence[Run], settings: Settings, targets: Sequence[tuple[int, int]]) -> list[Selection]:
    """Return the fitting points of the training set of the settings, followed by those that may share its exponents.

    Only `combined` fits share exponents.

    Raises:
        ConfigError, DataError: see `select_runs` and `paper_points`.
    """
    selections = [_select(runs, settings, settings.train, targets)]
    if settings.law == COMBINED:
        for name in sorted({run.train for run in runs} - {selections[0].loss[0].train}):
            with suppress(UserError):  # a training set that cannot be fitted only fails to contribute
                selections.append(_select(runs, settings, name, targets))
    return selections


def _select(
    runs: Sequence[Run], settings: Settings, train: str | None, targets: Sequence[tuple[int, int]]
) -> Selection:
    """Return the fitting points of one training set."""
    usable, excluded = select_runs(runs, train, settings.loss)
    is_paper = settings.points == "paper"
    selection = paper_points(usable) if is_paper else all_points(usable, targets, settings.max_flops)
    selection.excluded[:0] = excluded
    if not selection.loss:
        raise ConfigError("no run is left to fit: raise --max-flops, or add runs")
    return selection


def _shares(members: Sequence[Member], number: int) -> list[int]:
    """Return how many of `number` resamples each member gets, in proportion to its weight and at least one."""
    return [max(1, round(number * member.weight)) for member in members]


def fit_values(fit: ScalingFit, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the JSON values of `fit --json`."""
    return {
        "coefficients": fit.coefficients,
        "predictions": [
            {
                "params": item.params,
                "tokens": item.tokens,
                "loss": item.loss,
                "loss_interval": list(item.loss_interval),
                "error": item.error,
            }
            for item in predictions
        ],
    }
