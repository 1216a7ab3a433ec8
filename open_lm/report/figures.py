"""Self-contained HTML pages with interactive figures: one file, no network request, below 5 MB.

    page = Page("Scaling laws", "Fits of 12 runs")
    losses = Figure("Final loss", x_label="training compute (FLOP)", y_label="loss (nats per token)", x_log=True)
    losses.series = [Series("runs", compute, loss, mode="markers"), Series("fit", grid, fit, color=1)]
    page.section("Final losses", paragraph("..."), page.figure(losses), table([Column("run"), ...], rows, "Runs"))
    storage.write_text(out, page.html())

`open_lm.report.markup` has the parts without figures: paragraphs, tables, facts, text that is folded away. The page has
a light and a dark theme, fits a phone, prints, and gives every figure a table of its values. Plotly is compressed in
the file and drawn without WebGL; a browser that cannot decompress it shows the tables and says so.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from open_lm.errors import ConfigError, missing_package
from open_lm.report.markup import Column, Html, details, escape, identifier, join, paragraph, table, tag
from open_lm.storage.strict_json import to_json

MAX_PAGE_BYTES = 5_000_000
NUM_COLORS = 8  # of page.css
_ASSETS = Path(__file__).resolve().parent / "assets"
_TABLE_ROWS = 12  # of the table of a figure
_DTYPES = {"f8": "<f8", "f4": "<f4", "i4": "<i4"}


@dataclass
class Series:
    """One curve or set of points.

    Attributes:
        name: its name in legends and tooltips.
        x, y: values (n,); NaN is a gap. Empty `x` with `clock`: the x values follow from `steps`.
        mode: "lines", "markers" or "lines+markers".
        low, high: ends of the intervals (n,) of y, or None.
        labels: a text per point for its tooltip, or None.
        color: index of a color; equal numbers have equal colors in all figures of a page.
        dash: "solid", "dash", "dot" or "dashdot"; None selects one that tells the color's neighbors apart.
        clock: index of the page's clock that converts `steps` to tokens and time, or None.
        steps: steps (n,) of the points of a series with a clock.
        mean_steps, means: the means of a thinned series (m,), which are what smoothing is applied to; None: y itself.
        smooth: whether the page's slider smooths the series.
    """

    name: str
    x: Any = ()
    y: Any = ()
    mode: str = "lines"
    low: Any = None
    high: Any = None
    labels: Sequence[str] | None = None
    color: int = 0
    dash: str | None = None
    clock: int | None = None
    steps: Any = None
    mean_steps: Any = None
    means: Any = None
    smooth: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the series for the page's script."""
        content: dict[str, Any] = {"name": self.name, "mode": self.mode, "color": self.color, "y": pack(self.y, "f4")}
        content |= {"clock": self.clock, "smooth": self.smooth, "dash": self.dash}
        if self.clock is None:
            is_text = len(self.x) > 0 and isinstance(self.x[0], str)
            content["x"] = list(self.x) if is_text else pack(self.x, "f8")
        for name, dtype in (("steps", "i4"), ("mean_steps", "i4"), ("means", "f4"), ("low", "f4"), ("high", "f4")):
            value = getattr(self, name)
            if value is not None:
                content[name] = pack(value, dtype)
        if self.labels is not None:
            content["labels"] = list(self.labels)
        return {key: value for key, value in content.items() if value is not None}


@dataclass
class Clock:
    """The progress of a run: converts its steps to tokens and hours. Between two entries, both grow evenly.

    Attributes:
        name: name of the run.
        steps, tokens, hours: equally many values, ascending; hours since the first record.
        events: what happened, each with "step", "kind" ("skipped", "restart" or "rollback") and "text".
    """

    name: str
    steps: Any
    tokens: Any
    hours: Any
    events: Sequence[dict[str, Any]] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "steps": pack(self.steps, "i4"),
            "tokens": pack(self.tokens, "f8"),
            "hours": pack(self.hours, "f8"),
            "events": list(self.events),
        }


@dataclass
class Figure:
    """A figure with axes.

    Attributes:
        title: heading.
        x_label, y_label: labels of the axes with units. Series with a clock have the x axis that the reader selects.
        series: what is drawn.
        x_log, y_log: logarithmic axes.
        percent: whether y is a fraction that is shown in percent.
        from_zero: whether the y axis begins at 0.
        events: whether the events of the clocks are marked.
        note: a sentence below the figure.
        summary: what the figure shows, for screen readers; the default is made from the series.
        table: a table of the values in place of the default one.
    """

    title: str
    x_label: str = ""
    y_label: str = ""
    series: list[Series] = field(default_factory=list)
    x_log: bool = False
    y_log: bool = False
    percent: bool = False
    from_zero: bool = False
    events: bool = False
    note: Any = ""
    summary: str = ""
    table: Html | None = None

    def to_json(self) -> dict[str, Any]:
        names = ("title", "x_label", "y_label", "x_log", "y_log", "percent", "from_zero", "events")
        return {**{name: getattr(self, name) for name in names}, "series": [s.to_json() for s in self.series]}


def pack(values: Any, dtype: str) -> dict[str, str]:
    """Return numbers as base64 text of little-endian values, which JSON of the page holds without loss."""
    array = np.ascontiguousarray(np.asarray(values, dtype=_DTYPES[dtype]))
    return {"t": dtype, "b": base64.b64encode(array.tobytes()).decode()}


class Page:
    """A page that is built from sections.

    Args:
        title: heading and title of the page.
        subtitle: a line below it.
        clocks: the runs of series with a clock. With clocks, the page shows controls for the x axis and for smoothing.
        smoothing: initial smoothing from 0 to 0.99, the weight of earlier values in an exponential moving average.
    """

    def __init__(self, title: str, subtitle: Any = "", clocks: Sequence[Clock] = (), smoothing: float = 0.0) -> None:
        self.title, self.subtitle, self.clocks, self.smoothing = title, subtitle, list(clocks), smoothing
        self._figures: dict[str, Figure] = {}
        self._sections: list[tuple[str, str, Html]] = []

    def figure(self, figure: Figure) -> Html:
        """Return the HTML of a figure, which the page's script fills, with the table of its values."""
        key = identifier(figure.title)
        while key in self._figures:
            key += "-2"
        self._figures[key] = figure
        return tag(
            "figure",
            tag("figcaption", tag("h3", figure.title), tag("span", figure.y_label, class_="unit")),
            tag("div", class_="plot", role="group", aria_label=figure.summary or _summary(figure)),
            paragraph(figure.note, class_="note") if figure.note else None,
            details(f"Values of “{figure.title}”", figure.table or _values(figure)),
            id=f"figure-{key}",
            data_figure=key,
        )

    def controls(self) -> Html:
        """Return the controls of the figures with a clock: x axis, smoothing, logarithmic y axes, runs."""
        axes = {"tokens": "tokens", "step": "steps", "hours": "time"}
        if not all(np.isfinite(np.asarray(clock.tokens, dtype=np.float64)).all() for clock in self.clocks):
            del axes["tokens"]
        choices = [
            tag("label", tag("input", type="radio", name="axis", value=key, checked=number == 0), label)
            for number, (key, label) in enumerate(axes.items())
        ]
        smoothing = tag(
            "label",
            "Smoothing",
            tag("input", type="range", id="smoothing", min=0, max=0.99, step=0.01, value=self.smoothing),
            tag("output", f"{self.smoothing:.2f}", id="smoothing-value"),
        )
        runs = [
            tag("label", tag("input", type="checkbox", value=index, checked=True), _swatch(index), clock.name)
            for index, clock in enumerate(self.clocks)
        ]
        return tag(
            "form",
            tag("fieldset", tag("legend", "x axis"), *choices, id="axis"),
            smoothing,
            tag("label", tag("input", type="checkbox", id="log"), "log y axis"),
            tag("fieldset", tag("legend", "Runs"), *runs, id="runs") if len(runs) > 1 else None,
            class_="controls",
            aria_label="Settings of the curves",
        )

    def section(self, title: str, *blocks: Any, id_: str | None = None) -> None:
        """Append a section to the page."""
        self._sections.append((id_ or identifier(title), title, join(*blocks)))

    def html(self) -> str:
        """Return the complete page.

        Raises:
            ConfigError: plotly is not installed.
        """
        links = [tag("a", title, href=f"#{key}") for key, title, _ in self._sections]
        sections = [
            tag("section", tag("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
            for key, title, content in self._sections
        ]
        state = {
            "figures": {key: figure.to_json() for key, figure in self._figures.items()},
            "clocks": [clock.to_json() for clock in self.clocks],
            "smoothing": self.smoothing,
        }
        body = join(
            tag("a", "Skip to the content", href="#content", class_="skip"),
            tag(
                "header",
                tag("h1", self.title),
                paragraph(self.subtitle, class_="subtitle") if self.subtitle else None,
                tag("button", "Dark theme", type="button", id="theme", aria_pressed="false"),
            ),
            tag("nav", *links, aria_label="Sections"),
            tag("p", "The figures need JavaScript; the tables below them have their values.", id="message"),
            tag("main", *sections, id="content"),
            _script(_embedded(to_json(state)), type="application/json", id="state"),
            _script(_plotly() if self._figures else "", type="text/plain", id="plotly"),
            _script(_asset("page.js")),
        )
        head = join(
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", self.title),
            _script(
                "document.documentElement.dataset.theme = "
                "matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'"
            ),
            Html(f"<style>{_asset('page.css')}</style>"),
        )
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


# Nothing that a page holds, such as a text of a model, can load a file or send anything.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def _script(content: str, **attributes: str) -> Html:
    return tag("script", Html(content), **attributes)


def _embedded(text: str) -> str:
    """Return JSON that a script element can hold: no character of it can end the element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@lru_cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


@lru_cache
def _plotly() -> str:
    """Return the script of plotly, compressed by gzip and encoded as base64."""
    try:
        import plotly
    except ModuleNotFoundError as error:
        raise ConfigError(missing_package("plotly") or str(error)) from error
    script = (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, 5, mtime=0)).decode()  # higher levels save 1 % in twice the time


def _swatch(index: int) -> Html:
    """Return the line of a run in legends: its color and its dashes."""
    dashes = ("", "6 3", "2 3", "6 3 2 3")[index // NUM_COLORS % 4]
    line = tag(
        "line", x1=0, y1=6, x2=30, y2=6, stroke_dasharray=dashes or None, style=f"stroke:var(--c{index % NUM_COLORS})"
    )
    return tag("svg", line, class_="swatch", viewBox="0 0 30 12", aria_hidden="true")


# ---------------------------------------------------------------------------------------------- the values as text
def _summary(figure: Figure) -> str:
    """Return a sentence about a figure: the first and the last value of each series."""
    ends = []
    for series in figure.series:
        values = np.asarray(series.y, dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            name = f"{series.name} " if series.name else ""
            ends.append(
                f"{name}from {values[0]:.4g} to {values[-1]:.4g}" if len(values) > 1 else f"{name}{values[0]:.4g}"
            )
    return f"{figure.title}: {'; '.join(ends) or 'no values'}. The table below has the values."


def _values(figure: Figure) -> Html:
    """Return the table of a figure: up to 12 points of each series."""
    rows = []
    for series in figure.series:
        x = np.asarray(series.x if series.clock is None else series.steps)
        chosen = np.unique(np.linspace(0, max(len(x) - 1, 0), min(len(x), _TABLE_ROWS)).round().astype(int))
        rows += [(series.name, _number(x[i]), _number(series.y[i])) for i in chosen]
    label = figure.x_label or "step"
    columns = [Column("series"), Column(label, True), Column(figure.y_label or "value", True)]
    return table(columns, rows, f"Values of {figure.title}")


def _number(value: Any) -> str:
    return str(value) if isinstance(value, str) else f"{float(value):,.6g}"


__all__ = ["MAX_PAGE_BYTES", "NUM_COLORS", "Clock", "Figure", "Page", "Series", "escape", "pack"]
