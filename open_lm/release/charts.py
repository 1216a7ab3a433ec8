"""Line charts as SVG and in PDF, drawn with lines and text only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fpdf import FPDF

_MAX_POINTS = 400  # of a curve; of more points, each part keeps its smallest and its largest value
_COLORS = ("#1f5fa8", "#c2571a", "#2d7d46", "#8a3a8f", "#6b6b6b")
_NUM_TICKS = 5
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_WIDTH, _HEIGHT = 640.0, 320.0  # units of a chart; 1 is a pixel of the SVG
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 20.0, 40.0, 50.0


@dataclass(frozen=True)
class Curve:
    """A curve: x and y float (n,), finite, with its name."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Chart:
    """A chart of curves over the same axes; `name` is the name of its file."""

    name: str
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Text:
    """A text at a point; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    size: float = 12.0
    color: str = "#222222"


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: tuple[tuple[float, float], ...]
    color: str
    width: float = 1.0


def curve(name: str, x: np.ndarray, y: np.ndarray) -> Curve:
    """Return a curve of the finite values, thinned out without losing its extremes."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) > _MAX_POINTS:
        kept: set[int] = {0, len(x) - 1}
        for part in np.array_split(np.arange(len(x)), _MAX_POINTS // 2):
            kept |= {int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])}
        index = sorted(kept)
        x, y = x[index], y[index]
    return Curve(name, x, y)


def shapes(chart: Chart) -> list[Line | Text]:
    """Return the lines and texts of a chart in its units, from the top left."""
    x_ticks = ticks(*_range([curve.x for curve in chart.curves]))
    y_ticks = ticks(*_range([curve.y for curve in chart.curves]))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * width, _TOP + (1 - up) * height

    items: list[Line | Text] = [Text(_WIDTH / 2, 20, chart.title, size=14)]
    for y in y_ticks:
        items.append(Line((place(x_ticks[0], y), place(x_ticks[-1], y)), "#dddddd"))
        items.append(Text(_LEFT - 8, place(x_ticks[0], y)[1] + 4, _number(y), "end"))
    items += [Text(place(x, y_ticks[0])[0], _HEIGHT - _BOTTOM + 18, _number(x)) for x in x_ticks]
    items += [
        Line((place(x_ticks[0], y_ticks[0]), place(x_ticks[-1], y_ticks[0])), "#555555"),
        Text(_LEFT + width / 2, _HEIGHT - 12, chart.x_label),
        Text(_LEFT, _TOP - 10, chart.y_label, "start"),
    ]
    for number, item in enumerate(chart.curves):
        color = _COLORS[number % len(_COLORS)]
        points = tuple(place(float(x), float(y)) for x, y in zip(item.x, item.y, strict=True))
        items.append(Line(points, color, 1.5))
        if len(chart.curves) > 1:
            items.append(Text(_WIDTH - _RIGHT, _TOP + 16 + 16 * number, item.name, "end", color=color))
    return items


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    joined = np.concatenate([np.asarray(value, np.float64) for value in values])
    return float(joined.min()), float(joined.max())


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers that span the range from `low` to `high`."""
    if high <= low:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / _NUM_TICKS
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def to_svg(chart: Chart) -> str:
    """Return a chart as the text of an SVG file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{escape(chart.title)}" font-family="sans-serif">',
        f'<rect width="{_WIDTH:.0f}" height="{_HEIGHT:.0f}" fill="white"/>',
    ]
    for item in shapes(chart):
        if isinstance(item, Line):
            points = " ".join(f"{x:.2f},{y:.2f}" for x, y in item.points)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{item.color}" stroke-width="{item.width:g}"/>'
            )
        else:
            parts.append(
                f'<text x="{item.x:.2f}" y="{item.y:.2f}" text-anchor="{item.anchor}" font-size="{item.size:g}" '
                f'fill="{item.color}">{escape(item.text)}</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def draw_pdf(chart: Chart, pdf: FPDF, left: float, top: float, width: float) -> float:
    """Draw a chart on a page, `width` wide in the units of the document; return its height."""
    scale = width / _WIDTH
    for item in shapes(chart):
        color = tuple(int(item.color[i : i + 2], 16) for i in (1, 3, 5))
        if isinstance(item, Line):
            pdf.set_draw_color(*color)
            pdf.set_line_width(item.width * scale)
            pdf.polyline([(left + x * scale, top + y * scale) for x, y in item.points])
            continue
        pdf.set_text_color(*color)
        pdf.set_font("helvetica", size=item.size * scale * pdf.k)
        offset = {"start": 0.0, "middle": 0.5, "end": 1.0}[item.anchor] * pdf.get_string_width(latin(item.text))
        pdf.text(left + item.x * scale - offset, top + item.y * scale, latin(item.text))
    pdf.set_text_color(0)
    pdf.set_draw_color(0)
    pdf.set_line_width(0.2)
    return _HEIGHT * scale


def latin(text: str) -> str:
    r"""Return a text for the fonts of every PDF reader, with \uXXXX for characters that Latin-1 does not have."""
    text = _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text.replace("\ufffd", "?"))
    return text.encode("latin-1", "backslashreplace").decode("latin-1")
