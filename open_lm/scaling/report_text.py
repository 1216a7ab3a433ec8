"""Format fits and predictions as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from open_lm.scaling.fitting import FAR, Prediction, ScalingFit
from open_lm.scaling.measured import Comparison
from open_lm.scaling.points import ABOVE_LIMIT
from open_lm.scaling.value import RunValue

_LISTED = 8  # members of a combined fit


def fit_text(
    fit: ScalingFit, predictions: Sequence[Prediction], tasks: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """Return the text that `fit` prints."""
    above = sum(reason == ABOVE_LIMIT for _, reason in fit.selection.excluded)
    others = f"; {above} {ABOVE_LIMIT}" if above else ""
    lines = [f"loss on {fit.settings.loss}, fitted to {len(fit.selection.loss)} runs{others}"]
    if len(fit.members) > 1:
        lines.append(f"average of {len(fit.members)} fits, weighted by their error on held-out sizes:")
    for member in fit.members[:_LISTED]:
        share = f"{100 * member.weight:5.1f} %  " if len(fit.members) > 1 else ""
        error = f"{100 * member.held_out_error:.2f} %" if member.held_out else "unknown"
        lines.append(f"  {share}{member.candidate}: {_named(member.law.values(member.theta))}; held-out error {error}")
    if len(fit.members) > _LISTED:
        rest = sum(member.weight for member in fit.members[_LISTED:])
        lines.append(f"  {100 * rest:5.1f} %  {len(fit.members) - _LISTED} others")
    if fit.error is not None:
        values = _named(fit.error.fit.values())
        lines.append(f"Err(L) = epsilon - k exp(-gamma L), mean over {len(fit.error.tasks)} tasks: {values}")
    if predictions:
        lines += ["", *prediction_table(predictions, fit.settings.level)]
    for task, law in (tasks or {}).items():
        errors = " ".join(f"{error:.4f}" if 0 <= error <= 1 else "(outside of 0 to 1)" for error in law["errors"])
        bounds = f"; at a bound: {', '.join(law['at_bounds'])}" if law["at_bounds"] else ""
        lines.append(f"{task:<40} {_named(law['coefficients'])}; predicted {errors or 'nothing'}{bounds}")
    return "\n".join(lines)


def prediction_table(predictions: Sequence[Prediction], level: float) -> list[str]:
    """Return the lines of a table of predictions."""
    share = f"{100 * level:g} % interval"
    lines = [f"{'parameters':>15} {'tokens':>19} {'loss':>7} {share:>16} {'error':>7} {share:>16} {'compute':>8}"]
    for item in predictions:
        error = "" if item.error is None else f"{item.error:.4f}"
        lines.append(
            f"{item.params:>15,} {item.tokens:>19,} {item.loss:>7.4f} {_range(item.loss_interval):>16} {error:>7} "
            f"{_range(item.error_interval):>16} {f'x {item.compute_ratio:,.3g}':>8}"
        )
    return lines


def measured_table(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the lines of a table of measured targets."""
    lines = [f"{'measured':>15} {'tokens':>19} {'loss':>7} {'difference':>12} {'interval':>9} {'error':>7}"]
    for item in comparisons:
        covered = "inside" if item.loss_covered else "outside"
        lines.append(
            f"{item.run.params:>15,} {item.run.tokens:>19,} {item.loss:>7.4f} {100 * item.loss_difference:>+10.2f} % "
            f"{covered:>9} {'' if item.error is None else f'{item.error:.4f}':>7}"
        )
    return lines


def value_table(values: Sequence[RunValue]) -> list[str]:
    """Return the lines of a table of further runs."""
    lines = ["further runs that would shrink the interval of the first target (cost relative to all runs of the fit):"]
    lines.append(f"{'parameters':>15} {'tokens':>19} {'FLOP':>9} {'cost':>9} {'interval':>9}")
    for item in values:
        lines.append(
            f"{item.params:>15,} {item.tokens:>19,} {item.flops:>9.2e} {f'x {item.cost:,.3g}':>9} "
            f"{-100 * item.reduction:>7.1f} %"
        )
    return lines


def far_targets(predictions: Sequence[Prediction]) -> list[str]:
    """Return a warning for each target far outside of the fitted runs."""
    return [
        f"target {item.params:,}:{item.tokens:,} has {item.compute_ratio:,.0f} times the compute of the largest run "
        "that the fit uses; its interval assumes that the law holds that far"
        for item in predictions
        if item.compute_ratio > FAR
    ]


def _named(values: dict[str, float]) -> str:
    return ", ".join(f"{name} = {value:.4g}" for name, value in values.items())


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f}-{interval[1]:.4f}"
