"""Turn collected runs into one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from open_lm.report import evaluation_section, provenance_section, summary_section
from open_lm.report.curves import (
    EVENT_NAMES,
    MAX_POINTS,
    MIN_POINTS,
    CurveFigures,
    count_curves,
    curve_figures,
    run_clock,
)
from open_lm.report.figures import MAX_PAGE_BYTES, Page
from open_lm.report.markup import Html, details, paragraph, tag
from open_lm.report.records import Run

_POINT_BYTES = 18  # of a point of a curve in the page, in base64 and with its share of a mean
_CURVE_BYTES = 1_700_000  # for all curves
_SMOOTHED_FROM, _SMOOTHING = 200, 0.6  # points of the training loss from which on curves are smoothed at first


def build_page(runs: Sequence[Run], title: str | None = None) -> str:
    """Return the report of some runs as HTML below 5 MB. More runs have fewer points per curve.

    Raises:
        ConfigError: plotly is not installed.
    """
    points = _CURVE_BYTES // (_POINT_BYTES * max(count_curves(runs), 1))
    points = min(max(points, MIN_POINTS), MAX_POINTS)
    html = _build(runs, title, points)
    while len(html.encode()) > MAX_PAGE_BYTES and points > MIN_POINTS:
        points = max(points // 2, MIN_POINTS)
        html = _build(runs, title, points)
    return html


def _build(runs: Sequence[Run], title: str | None, max_points: int) -> str:
    names = [run.name for run in runs]
    clocks = [run_clock(run, run.name) for run in runs]
    longest = max((len(run.metrics.get("train/loss")[1]) for run in runs), default=0)
    page = Page(
        title
        or (
            f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names[:4])}{' …' * (len(runs) > 4)}"
        ),
        summary_section.subtitle(runs),
        clocks=clocks,
        smoothing=_SMOOTHING if longest >= _SMOOTHED_FROM else 0.0,
    )
    page.section("Summary", summary_section.summary(runs))
    page.section("Problems", summary_section.problems(runs))
    page.section("Curves", *_curves(page, runs, curve_figures(runs, names, max_points)))
    page.section("Tasks", *evaluation_section.tasks(page, runs))
    page.section("Samples", *evaluation_section.samples(runs))
    page.section("Data", *provenance_section.data(runs))
    page.section("Settings", *provenance_section.settings(runs))
    page.section("Provenance", *provenance_section.provenance(runs))
    return page.html()


def _curves(page: Page, runs: Sequence[Run], curves: CurveFigures) -> list[Html]:
    if not curves.main and not curves.others:
        return [paragraph("There are no training records yet.")]
    thinned = ""
    if curves.thinned > 1:
        thinned = (
            f" Long curves show, of each interval of up to {curves.thinned:,} records, the lowest and highest value, "
            "so that no spike is lost; smoothing uses the means of the intervals."
        )
    kinds = dict.fromkeys(event.kind for run in runs for event in run.events)
    symbols = {"skipped": "\N{MULTIPLICATION SIGN}", "restart": "▲", "rollback": "◀"}
    legend = [tag("li", f"{symbols[kind]} {EVENT_NAMES[kind]}") for kind in kinds]
    blocks = [
        page.controls(),
        tag("ul", *legend, class_="events", aria_label="Marks of events") if legend else Html(""),
        tag("div", *map(page.figure, curves.main), class_="figures"),
    ]
    if curves.others:
        count = len(curves.others)
        blocks.append(
            details(
                f"{count} more {'metric' if count == 1 else 'metrics'}",
                tag("div", *map(page.figure, curves.others), class_="figures"),
            )
        )
    blocks.append(paragraph(f"Drag in a figure to zoom, double-click to return.{thinned}", class_="note"))
    return blocks
