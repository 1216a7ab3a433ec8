"""Show a fit as one HTML page: runs, fits, residuals, predictions, iso-FLOP curves, frontier and cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_lm.report.figures import Figure, Page, Series
from open_lm.report.markup import Column, Html, paragraph, table, tag
from open_lm.scaling.error_law import mean_error
from open_lm.scaling.fitting import Prediction, ScalingFit
from open_lm.scaling.measured import Comparison
from open_lm.scaling.points import scales
from open_lm.scaling.solve import Array
from open_lm.scaling.value import RunValue

_GRID = 60
_ISO_CURVES = 6
_MULTIPLIER_RANGE = (2.0, 1000.0)


def build_page(
    fit: ScalingFit,
    predictions: Sequence[Prediction],
    values: Sequence[RunValue],
    measured: Sequence[Comparison | None],
) -> str:
    """Return the page.

    Args:
        fit: the fitted laws.
        predictions: targets.
        values: what further runs would add; see value.py.
        measured: the trained run of each prediction, or None.

    Raises:
        ConfigError: plotly is not installed.
    """
    settings = fit.settings
    data = f" on {settings.train}" if settings.train else ""
    page = Page(f"Scaling laws: {settings.loss}{data}", f"{len(fit.selection.loss)} runs, law {settings.law}")
    page.section("Predictions", *_predictions(fit, predictions, measured))
    page.section("Losses", page.figure(_losses(fit, predictions, measured)), page.figure(_residuals(fit)))
    if fit.error is not None:
        page.section("Downstream error", page.figure(_errors(fit)))
    page.section("Compute", page.figure(_iso_flops(fit, predictions)), page.figure(_frontier(fit, predictions)))
    if values:
        page.section("Further runs", *_further(values))
    page.section("Fits", _members(fit))
    page.section("Runs and cost", _runs(fit))
    return page.html()


def _predictions(
    fit: ScalingFit, predictions: Sequence[Prediction], measured: Sequence[Comparison | None]
) -> list[Html]:
    if not predictions:
        return [paragraph("No target was given with --predict.")]
    names = ("parameters", "tokens", "tokens per parameter", "loss", "interval", "error", "interval of the error",
             "compute, relative to the largest run")  # fmt: skip
    rows = [
        (f"{item.params:,}", f"{item.tokens:,}", f"{item.tokens / item.params:,.4g}", f"{item.loss:.4f}",
         _range(item.loss_interval), _number(item.error), _range(item.error_interval), f"{item.compute_ratio:,.3g}")
        for item in predictions
    ]  # fmt: skip
    blocks = [
        paragraph(f"Predicted at {fit.created} from the runs below. Intervals hold {100 * fit.settings.level:g} % of "
                  "the draws: resampled runs, losses drawn from their intervals, and the errors on sizes that a fit "
                  "did not see."),
        table([Column(name, True) for name in names], rows, "Predictions"),
    ]  # fmt: skip
    trained = [item for item in measured if item]
    if trained:
        blocks += [tag("h3", "Predicted and measured"), _measured(trained)]
    return blocks


def _measured(comparisons: Sequence[Comparison]) -> Html:
    """Return the table of the targets that were trained: each measured value next to its prediction."""
    rows = []
    for item in comparisons:
        for name, value, expected, limits, difference, covered in (
            ("loss", item.loss, item.prediction.loss, item.prediction.loss_interval, item.loss_difference,
             item.loss_covered),
            ("error", item.error, item.prediction.error, item.prediction.error_interval, item.error_difference,
             item.error_covered),
        ):  # fmt: skip
            if value is not None and difference is not None:
                rows.append((
                    item.run.label, name, _number(expected), _range(limits), f"{value:.4f}",
                    f"{100 * difference:+.2f} %", "yes" if covered else "no",
                ))  # fmt: skip
    names = ("predicted", "interval", "measured", "difference", "inside the interval")
    columns = [Column("run"), Column("value"), *(Column(name, True) for name in names)]
    return table(columns, rows, "Predicted and measured")


def _losses(fit: ScalingFit, predictions: Sequence[Prediction], measured: Sequence[Comparison | None]) -> Figure:
    """Return the losses over compute, with the fitted curve of each size."""
    figure = Figure("Loss over compute", "training compute 6ND (FLOP)", f"loss on {fit.settings.loss} (nats per token)")
    figure.x_log = True
    largest = max([run.tokens for run in fit.selection.loss])
    for color, group in enumerate(scales(fit.selection.loss)):
        ordered = sorted(group, key=lambda run: run.tokens)
        params, name = ordered[0].params, f"{ordered[0].params / 1e6:,.3g}M"
        losses = np.array([run.losses[fit.settings.loss] for run in ordered])
        figure.series.append(
            Series(
                name, [run.flops for run in ordered], losses[:, 0], "markers", losses[:, 1], losses[:, 2],
                [run.label for run in ordered], color,
            )
        )  # fmt: skip
        tokens = np.geomspace(ordered[0].tokens, max(largest, 2 * ordered[-1].tokens), _GRID)
        curve = [fit.loss(params, count) for count in tokens]
        figure.series.append(Series(f"{name} fit", 6.0 * params * tokens, curve, color=color, dash="solid"))
    if predictions:
        flops = [6.0 * item.params * item.tokens for item in predictions]
        ends = np.array([item.loss_interval for item in predictions])
        labels = [f"{item.params:,} parameters, {item.tokens:,} tokens" for item in predictions]
        values = [item.loss for item in predictions]
        figure.series.append(Series("predicted", flops, values, "markers", ends[:, 0], ends[:, 1], labels, 7))
    trained = [item for item in measured if item]
    if trained:
        losses = np.array([item.run.losses[fit.settings.loss] for item in trained])
        figure.series.append(
            Series(
                "measured", [item.run.flops for item in trained], losses[:, 0], "markers", losses[:, 1], losses[:, 2],
                [item.run.label for item in trained], 6,
            )
        )  # fmt: skip
    return figure


def _residuals(fit: ScalingFit) -> Figure:
    figure = Figure("Residuals", "tokens per parameter", "measured loss, relative to the fit (%)")
    figure.x_log = True
    for color, group in enumerate(scales(fit.selection.loss)):
        ordered = sorted(group, key=lambda run: run.multiplier)
        values = [
            100 * (run.losses[fit.settings.loss][0] / fit.loss(run.params, run.tokens) - 1) for run in ordered
        ]  # fmt: skip
        name = f"{ordered[0].params / 1e6:,.3g}M"
        figure.series.append(
            Series(name, [run.multiplier for run in ordered], values, "lines+markers", color=color)
        )  # fmt: skip
    return figure


def _errors(fit: ScalingFit) -> Figure:
    assert fit.error is not None
    figure = Figure("Error over loss", f"loss on {fit.settings.loss} (nats per token)", "mean error of the tasks")
    rated = [(run, error) for run in fit.selection.error if (error := mean_error(run, fit.error.tasks)) is not None]
    losses = np.array([run.losses[fit.settings.loss][0] for run, _ in rated])
    grid = np.linspace(0.9 * losses.min(), losses.max(), _GRID)
    figure.series = [
        Series("runs", losses, [error for _, error in rated], "markers", labels=[run.label for run, _ in rated]),
        Series("fit", grid, fit.error.fit.predict(grid)[0], color=1),
    ]
    return figure


def _iso_flops(fit: ScalingFit, predictions: Sequence[Prediction]) -> Figure:
    """Return the predicted loss over parameters for several amounts of compute."""
    figure = Figure("Iso-FLOP curves", "parameters", f"predicted loss on {fit.settings.loss} (nats per token)")
    figure.x_log = True
    figure.note = "Each curve spends the same compute 6ND on models of different sizes."
    for color, flops in enumerate(_budgets(fit, predictions)):
        params = _sizes(flops)
        losses = [fit.loss(size, flops / (6 * size)) for size in params]
        figure.series.append(Series(f"{flops:.1e} FLOP", params, losses, color=color))
    return figure


def _frontier(fit: ScalingFit, predictions: Sequence[Prediction]) -> Figure:
    """Return the parameters of the lowest predicted loss over compute."""
    figure = Figure("Compute-optimal size", "training compute 6ND (FLOP)", "parameters")
    figure.x_log = figure.y_log = True
    budgets = _budgets(fit, predictions)
    grid = np.geomspace(budgets[0], budgets[-1], 20)
    best = []
    for flops in grid:
        params = _sizes(flops)
        best.append(params[int(np.argmin([fit.loss(size, flops / (6 * size)) for size in params]))])
    figure.series = [
        Series("lowest predicted loss", grid, best, "lines+markers"),
        Series("20 tokens per parameter", grid, np.sqrt(grid / 120), color=1),
        Series("runs", *_points(fit), "markers", color=2, labels=[run.label for run in fit.selection.loss]),
    ]
    return figure


def _points(fit: ScalingFit) -> tuple[list[float], list[int]]:
    return [run.flops for run in fit.selection.loss], [run.params for run in fit.selection.loss]


def _budgets(fit: ScalingFit, predictions: Sequence[Prediction]) -> Array:
    flops = [run.flops for run in fit.selection.loss] + [6.0 * item.params * item.tokens for item in predictions]
    return np.geomspace(min(flops), max(flops), _ISO_CURVES)


def _sizes(flops: float) -> Array:
    """Return the sizes that a compute trains on `_MULTIPLIER_RANGE` tokens per parameter."""
    low, high = _MULTIPLIER_RANGE
    return np.geomspace((flops / (6 * high)) ** 0.5, (flops / (6 * low)) ** 0.5, _GRID)


def _further(values: Sequence[RunValue]) -> list[Html]:
    rows = [
        (f"{item.params:,}", f"{item.tokens:,}", f"{item.flops:.2e}", f"{100 * item.reduction:.1f} %",
         f"{100 * item.reduction / item.flops * 1e18:.3g} %")
        for item in values
    ]  # fmt: skip
    names = ("parameters", "tokens", "FLOP", "shrinks the interval by", "per 1e18 FLOP")
    return [
        paragraph("Expected change of the interval of the first target if this run is added, the largest first."),
        table([Column(name, True) for name in names], rows, "Further runs"),
    ]


def _members(fit: ScalingFit) -> Html:
    rows = []
    for member in fit.members:
        values = ", ".join(f"{name} = {value:.4g}" for name, value in member.law.values(member.theta).items())
        error = f"{100 * member.held_out_error:.2f} %" if member.held_out else "unknown"
        rows.append((f"{100 * member.weight:.1f} %", str(member.candidate), tag("code", values), error))
    columns = [Column("weight", True), Column("fit"), Column("coefficients"), Column("error on held-out sizes", True)]
    return table(columns, rows, "Fits")


def _runs(fit: ScalingFit) -> Html:
    rows = []
    for run in sorted(fit.selection.loss, key=lambda run: (run.params, run.tokens)):
        exact = run.facts.get("flops")
        rows.append((
            run.facts.get("name") or run.facts.get("model") or "", f"{run.params:,}", f"{run.tokens:,}",
            f"{run.multiplier:.4g}", f"{run.flops:.2e}", f"{exact:.2e}" if exact else "",
            f"{run.losses[fit.settings.loss][0]:.4f}",
        ))  # fmt: skip
    total = sum(run.flops for run in fit.selection.loss)
    rows.append(("total", "", "", "", f"{total:.2e}", "", ""))
    names = ("run", "parameters", "tokens", "tokens per parameter", "6ND (FLOP)", "exact (FLOP)", "loss")
    return table([Column(names[0]), *(Column(name, True) for name in names[1:])], rows, "Runs")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
