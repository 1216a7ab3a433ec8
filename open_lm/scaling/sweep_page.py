"""Show a sweep as one HTML page: loss curves, best values over width, and all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from open_lm.report.figures import Figure, Page, Series
from open_lm.report.markup import Column, Html, paragraph, table
from open_lm.scaling.sweep import STANDARD
from open_lm.scaling.sweep_fit import Minimum, Result, find_minima, find_shifts, shift_text

_GRID = 40


def build_page(results: Sequence[Result]) -> str:
    """Return the page. Raise ConfigError if plotly is not installed."""
    axis, minima = next(iter(results[0].run.settings)), find_minima(results)
    groups: dict[str, list[Minimum]] = {}
    for item in minima:
        groups.setdefault(_group_name(item), []).append(item)
    page = Page(f"Sweep of {axis}", f"{len(results)} runs")
    sentences = [paragraph(shift_text(shift, axis)) for shift in find_shifts(minima)]
    page.section("Best values", *sentences, _table(minima, axis), page.figure(_best(groups, axis)))
    curves = [page.figure(_curves(name, items, axis)) for name, items in groups.items()]
    page.section("Losses", paragraph("Lines are parabolas in the logarithm around the lowest point."), *curves)
    page.section("Runs", _runs(results))
    return page.html()


def _group_name(item: Minimum) -> str:
    name = "standard parametrization" if item.parametrization == STANDARD else "muP"
    return ", ".join([name, *(f"{key}={value:g}" for key, value in item.settings.items())])


def _curves(name: str, minima: Sequence[Minimum], axis: str) -> Figure:
    figure = Figure(f"Final loss: {name}", axis, "loss (nats per token)")
    figure.x_log = True
    for color, item in enumerate(minima):
        values = [value for value, *_ in item.points]
        figure.series.append(
            Series(item.model, values, [loss for _, loss, _ in item.points], "markers", color=color)
        )  # fmt: skip
        if item.coefficients is not None:
            grid = np.geomspace(max(values[0], item.best / 8), min(values[-1], item.best * 8), _GRID)
            curve = np.polynomial.Polynomial(item.coefficients)(np.log(grid))
            figure.series.append(Series(f"{item.model} fit", grid, curve, color=color, dash="solid"))
    return figure


def _best(groups: dict[str, list[Minimum]], axis: str) -> Figure:
    figure = Figure(f"Best {axis} over width", "width", f"best {axis}")
    figure.x_log = figure.y_log = True
    for color, (name, items) in enumerate(groups.items()):
        kept = [item for item in items if math.isfinite(item.best)]
        ends = [item.interval or (item.best, item.best) for item in kept]
        figure.series.append(
            Series(
                name, [item.width for item in kept], [item.best for item in kept], "lines+markers",
                [low for low, _ in ends], [high for _, high in ends], [item.note or item.model for item in kept], color,
            )
        )  # fmt: skip
    return figure


def _table(minima: Sequence[Minimum], axis: str) -> Html:
    rows = [
        (
            item.model, f"{item.width:,}", _group_name(item), f"{item.best:.3g}",
            "" if item.interval is None else f"{item.interval[0]:.3g} to {item.interval[1]:.3g}",
            f"{item.loss:.4f}", ", ".join(f"{value:g}" for value in item.diverged), item.note,
        )
        for item in minima
    ]  # fmt: skip
    columns = [
        Column("model"), Column("width", True), Column("parametrization"), Column(f"best {axis}", True),
        Column("standard error", True), Column("loss", True), Column("diverged"), Column("note"),
    ]  # fmt: skip
    return table(columns, rows, "Best values")


def _runs(results: Sequence[Result]) -> Html:
    rows = [
        (result.run.name, result.state, f"{result.loss:.4f}" if math.isfinite(result.loss) else "")
        for result in results
    ]
    return table([Column("run"), Column("state"), Column("loss", True)], rows, "Runs")
