"""Format fits and predictions as text."""

from __future__ import annotations

from collections.abc import Sequence

from open_lm.scaling.fitting import FAR, Prediction, ScalingFit


def fit_text(fit: ScalingFit, predictions: Sequence[Prediction]) -> str:
    """Return the text that `fit` prints."""
    lines = [f"{len(fit.selection.loss)} runs to fit the loss on {fit.settings.loss}"]
    best = max(fit.members, key=lambda member: member.weight)
    lines.append(f"{best.law.formula}: {_named(best.law.values(best.theta))}")
    if best.held_out:
        lines.append(f"error on held-out sizes (root mean square): {100 * best.held_out_error:.2f} %")
    if fit.error is not None:
        lines.append(
            f"Err(L) = epsilon - k exp(-gamma L) over {len(fit.error.tasks)} tasks: {_named(fit.error.fit.values())}"
        )
    if predictions:
        share = f"{100 * fit.settings.level:g} %"
        lines += ["", f"{'parameters':>15} {'tokens':>19} {'loss':>8} {share + ' interval':>18} {'error':>7} x compute"]
    for item in predictions:
        low, high = item.loss_interval
        error = "" if item.error is None else f"{item.error:.4f}"
        lines.append(
            f"{item.params:>15,} {item.tokens:>19,} {item.loss:>8.4f} {f'{low:.4f} to {high:.4f}':>18} {error:>7} "
            f"{item.compute_ratio:,.0f}"
        )
    return "\n".join(lines)


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
