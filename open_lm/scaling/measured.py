"""Compare predictions with runs that were trained afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.errors import ConfigError
from open_lm.scaling.error_law import mean_error
from open_lm.scaling.fitting import Prediction, ScalingFit
from open_lm.scaling.points import same
from open_lm.scaling.runs import Run


@dataclass(frozen=True)
class Comparison:
    """A prediction and the measured loss and error of its run; the error is None if the run lacks a task."""

    prediction: Prediction
    run: Run
    loss: float
    error: float | None

    @property
    def loss_difference(self) -> float:
        """Predicted loss relative to the measured one, minus 1."""
        return self.prediction.loss / self.loss - 1

    @property
    def error_difference(self) -> float | None:
        """Predicted error relative to the measured one, minus 1; None if either is missing or the measured one is 0."""
        if not self.error or self.prediction.error is None:
            return None
        return self.prediction.error / self.error - 1

    @property
    def loss_covered(self) -> bool:
        """Whether the interval of the loss contains the measured one."""
        return _contains(self.prediction.loss_interval, self.loss)

    @property
    def error_covered(self) -> bool | None:
        """Whether the interval of the error contains the measured one; None if either is missing."""
        if self.error is None or self.prediction.error_interval is None:
            return None
        return _contains(self.prediction.error_interval, self.error)

    def values(self) -> dict[str, Any]:
        """Return the JSON form."""
        names = ("loss", "loss_difference", "loss_covered", "error", "error_difference", "error_covered")
        times = {name: self.run.facts[name] for name in ("started", "ended") if name in self.run.facts}
        return {"run": self.run.label, **times, **{name: getattr(self, name) for name in names}}


def _contains(interval: tuple[float, float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def compare(fit: ScalingFit, predictions: Sequence[Prediction], runs: Sequence[Run]) -> list[Comparison | None]:
    """Return the comparison of each prediction with the closest run of its size and tokens; None without such a run.

    Parameters and tokens of the run may differ from the target by the tolerance of `points.same`. Runs of another
    training set or without the validation set of the fit are ignored.
    """
    settings = fit.settings
    usable = [run for run in runs if settings.train in (None, run.train) and settings.loss in run.losses]
    comparisons: list[Comparison | None] = []
    for item in predictions:
        near = [run for run in usable if same(run.params, item.params) and same(run.tokens, item.tokens)]
        run = min(near, key=lambda run: abs(run.flops / (6.0 * item.params * item.tokens) - 1), default=None)
        if run is None:
            comparisons.append(None)
        else:
            error = mean_error(run, settings.error_tasks)
            comparisons.append(Comparison(item, run, run.losses[settings.loss][0], error))
    return comparisons


def require_any(comparisons: Sequence[Comparison | None], predictions: Sequence[Prediction], path: str) -> None:
    """Raise ConfigError if a table that was given with --measured has none of the targets."""
    if predictions and not any(comparisons):
        targets = ", ".join(f"{item.params}:{item.tokens}" for item in predictions)
        raise ConfigError(
            f"--measured {path}: found no run of the targets {targets} on the fit's training and validation set; "
            "expected a run with these parameters and tokens"
        )
