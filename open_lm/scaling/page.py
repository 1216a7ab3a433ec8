"""Show a fit as one HTML page: predictions, runs, fits, residuals, iso-FLOP curves, frontier and cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_lm.report.figures import Figure, Page, Series
from open_lm.report.markup import Column, Html, details, paragraph, table, tag
from open_lm.scaling.error_law import mean_error
from open_lm.scaling.fitting import Prediction, ScalingFit
from open_lm.scaling.frontier import Frontier
from open_lm.scaling.measured import Comparison
from open_lm.scaling.points import scales
from open_lm.scaling.settings import COMPUTE_OPTIMAL
from open_lm.scaling.value import RunValue

_GRID = 60
_ISO_CURVES = 6
_FRONTIER_POINTS = 16
_LISTED_FITS = 8


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
        page.section("Downstream error", page.figure(_errors(fit, predictions, measured)))
    frontier = Frontier(fit, predictions)
    page.section("Compute", page.figure(_iso_flops(fit, frontier)), page.figure(_optimal_sizes(fit, frontier)))
    if values:
        page.section("Further runs", *_further(values))
    page.section("Fits", *_members(fit))
    page.section("Runs and cost", page.figure(_ladder(fit, predictions)), _runs(fit), *_excluded(fit))
    return page.html()


def _predictions(
    fit: ScalingFit, predictions: Sequence[Prediction], measured: Sequence[Comparison | None]
) -> list[Html]:
    if not predictions:
        return [paragraph("No target was given with --predict.")]
    names = ("parameters", "tokens", "tokens per parameter", "loss", "interval", "error", "interval of the error",
             "compute / largest run")  # fmt: skip
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
                    f"{100 * difference:+.2f} %", "yes" if covered else "no", item.run.facts.get("started", ""),
                ))  # fmt: skip
    names = ("predicted", "interval", "measured", "difference", "inside the interval")
    columns = [Column("run"), Column("value"), *(Column(name, True) for name in names), Column("training started")]
    return table(columns, rows, "Predicted and measured")


def _losses(fit: ScalingFit, predictions: Sequence[Prediction], measured: Sequence[Comparison | None]) -> Figure:
    """Return the losses over compute, with the fitted curve of each size."""
    figure = Figure("Loss over compute", "training compute 6ND (FLOP)", f"loss on {fit.settings.loss} (nats per token)")
    figure.x_log = True
    largest = max([run.tokens for run in fit.selection.loss])
    for color, group in enumerate(scales(fit.selection.loss)):
        ordered = sorted(group, key=lambda run: run.tokens)
        params, name = ordered[0].params, _short(ordered[0].params)
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
        name = _short(ordered[0].params)
        figure.series.append(
            Series(name, [run.multiplier for run in ordered], values, "lines+markers", color=color)
        )  # fmt: skip
    return figure


def _errors(fit: ScalingFit, predictions: Sequence[Prediction], measured: Sequence[Comparison | None]) -> Figure:
    assert fit.error is not None
    figure = Figure("Error over loss", f"loss on {fit.settings.loss} (nats per token)", "mean error of the tasks")
    rated = [(run, error) for run in fit.selection.error if (error := mean_error(run, fit.error.tasks)) is not None]
    losses = np.array([run.losses[fit.settings.loss][0] for run, _ in rated])
    grid = np.linspace(0.95 * min([*losses, *(item.loss for item in predictions)]), losses.max(), _GRID)
    figure.series = [
        Series("runs", losses, [error for _, error in rated], "markers", labels=[run.label for run, _ in rated]),
        Series("fit", grid, fit.error.fit.predict(grid)[0], color=1),
    ]
    known = [(item, item.error, item.error_interval) for item in predictions if item.error_interval is not None]
    if known:
        ends = np.array([limits for *_, limits in known])
        labels = [f"{item.params:,} parameters, {item.tokens:,} tokens" for item, *_ in known]
        x, y = [item.loss for item, *_ in known], [error for _, error, _ in known]
        figure.series.append(Series("predicted", x, y, "markers", ends[:, 0], ends[:, 1], labels, 7))
    trained = [(item, item.error) for item in measured if item is not None and item.error is not None]
    if trained:
        x, y = [item.loss for item, _ in trained], [error for _, error in trained]
        labels = [item.run.label for item, _ in trained]
        figure.series.append(Series("measured", x, y, "markers", labels=labels, color=6))
    return figure


def _iso_flops(fit: ScalingFit, frontier: Frontier) -> Figure:
    """Return the predicted loss over parameters for several amounts of compute."""
    figure = Figure("Iso-FLOP curves", "parameters", f"predicted loss on {fit.settings.loss} (nats per token)")
    figure.x_log = True
    figure.note = "Each curve spends the same compute 6ND on models of different sizes."
    for color, flops in enumerate(frontier.budgets(_ISO_CURVES)):
        figure.series.append(Series(f"{flops:.1e} FLOP", *frontier.curve(flops), color=color))
    return figure


def _optimal_sizes(fit: ScalingFit, frontier: Frontier) -> Figure:
    """Return the parameters of the lowest predicted loss over compute."""
    figure = Figure("Compute-optimal size", "training compute 6ND (FLOP)", "parameters")
    figure.x_log = figure.y_log = True
    grid = frontier.budgets(_FRONTIER_POINTS)
    best = [item for flops in grid if (item := frontier.optimum(flops)) is not None]
    runs = fit.selection.loss
    figure.series = [
        Series("lowest predicted loss", [item.flops for item in best], [item.params for item in best], color=0),
        Series(f"{COMPUTE_OPTIMAL} tokens per parameter", grid, np.sqrt(grid / (6 * COMPUTE_OPTIMAL)), color=1),
        Series(
            "runs", [run.flops for run in runs], [run.params for run in runs], "markers", color=2,
            labels=[run.label for run in runs],
        ),
    ]  # fmt: skip
    if len(best) < len(grid):
        low, high = frontier.multipliers
        figure.note = (
            f"The line leaves out {len(grid) - len(best)} of {len(grid)} amounts of compute: their lowest loss is not "
            f"between {low:.3g} and {high:.3g} tokens per parameter, or the law depends on compute only."
        )
    names = ("compute 6ND (FLOP)", "parameters", "tokens", "tokens per parameter", "predicted loss")
    rows = [
        (f"{item.flops:.2e}", f"{item.params:.3g}", f"{item.tokens:.3g}", f"{item.tokens / item.params:.3g}",
         f"{item.loss:.4f}")
        for item in best
    ]  # fmt: skip
    figure.table = table([Column(name, True) for name in names], rows, "Compute-optimal size")
    return figure


def _ladder(fit: ScalingFit, predictions: Sequence[Prediction]) -> Figure:
    """Return the parameters and tokens of runs and targets."""
    figure = Figure("Ladder", "parameters", "training tokens")
    figure.x_log = figure.y_log = True
    runs = fit.selection.loss
    points = [(run.params, run.tokens) for run in runs] + [(item.params, item.tokens) for item in predictions]
    ends = np.array([min(params for params, _ in points), max(params for params, _ in points)])
    figure.series = [
        Series(
            "runs", [run.params for run in runs], [run.tokens for run in runs], "markers",
            labels=[run.label for run in runs],
        ),
        Series(f"{COMPUTE_OPTIMAL} tokens per parameter", ends, COMPUTE_OPTIMAL * ends, color=1),
    ]  # fmt: skip
    if predictions:
        x, y = [item.params for item in predictions], [item.tokens for item in predictions]
        figure.series.append(Series("targets", x, y, "markers", color=7))
    return figure


def _further(values: Sequence[RunValue]) -> list[Html]:
    rows = [
        (f"{item.params:,}", f"{item.tokens:,}", f"{item.flops:.2e}", f"x {item.cost:,.3g}",
         f"{100 * item.reduction:.1f} %")
        for item in values
    ]  # fmt: skip
    names = ("parameters", "tokens", "6ND (FLOP)", "cost, relative to all runs", "shrinks the interval by")
    return [
        paragraph(
            "Expected change of the interval of the first target if this run is added, the largest first. "
            "Runs that a cheaper one beats are left out."
        ),
        table([Column(name, True) for name in names], rows, "Further runs"),
    ]


def _members(fit: ScalingFit) -> list[Html]:
    rows = []
    for member in fit.members:
        values = ", ".join(f"{name} = {value:.4g}" for name, value in member.law.values(member.theta).items())
        error = f"{100 * member.held_out_error:.2f} %" if member.held_out else "unknown"
        rows.append((f"{100 * member.weight:.1f} %", str(member.candidate), tag("code", values), error))
    columns = [Column("weight", True), Column("fit"), Column("coefficients"), Column("error on held-out sizes", True)]
    blocks = [table(columns, rows[:_LISTED_FITS], "Fits")]
    if len(rows) > _LISTED_FITS:
        rest = table(columns, rows[_LISTED_FITS:], "Further fits")
        blocks.append(details(f"{len(rows) - _LISTED_FITS} further fits", rest))
    if fit.error is not None:
        law = ", ".join(f"{name} = {value:.4g}" for name, value in fit.error.fit.values().items())
        blocks.append(paragraph("Error of the tasks: epsilon - k exp(-gamma L) with ", tag("code", law), "."))
    return [*blocks, *(paragraph(f"Warning: {text}.") for text in fit.warnings)]


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


def _excluded(fit: ScalingFit) -> list[Html]:
    rows = [(run.label, reason) for run, reason in fit.selection.excluded]
    if not rows:
        return []
    listed = table([Column("run"), Column("reason")], rows, "Excluded runs")
    return [details(f"{len(rows)} runs of the table are not fitted", listed)]


def _short(params: float) -> str:
    """Return a number of parameters such as 411M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if params >= unit:
            return f"{params / unit:.3g}{name}"
    return f"{params:g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
