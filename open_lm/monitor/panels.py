"""Draw curves in a grid of panels as SVG, which browsers and office programs open. Imports no torch."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.system.names import printable

_WIDTH, _HEIGHT, _MARGIN, _COLUMNS = 320, 200, 45, 3  # pixels of a panel, panels of a row
_MAX_MARKERS = 60  # points of a curve that are marked; a longer curve is only a line
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # distinct for color-blind readers


@dataclass(frozen=True)
class Value:
    """A point of a panel: position, score, its interval, and a text for the tooltip."""

    x: float
    y: float
    interval: tuple[float, float] | None
    label: str


Panel = tuple[str, float | None, dict[str, list[Value]]]  # title, baseline, values by run


def draw_panels(panels: Sequence[Panel], axis: str) -> str:
    """Return all panels in a grid, with a legend of the runs above them."""
    runs = list(dict.fromkeys(run for _, _, curves in panels for run in curves))
    colors = {run: _COLORS[index % len(_COLORS)] for index, run in enumerate(runs)}
    top = 20 + 18 * len(runs)
    rows = -(-len(panels) // _COLUMNS)
    width, height = min(len(panels), _COLUMNS) * _WIDTH, top + rows * _HEIGHT
    body = [_text(10, 18 * (i + 1), run, fill=colors[run]) for i, run in enumerate(runs)]
    for index, panel in enumerate(panels):
        x, y = index % _COLUMNS * _WIDTH, top + index // _COLUMNS * _HEIGHT
        body.append(f'<g transform="translate({x},{y})">{_panel(panel, axis, colors)}</g>')
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _panel(panel: Panel, axis: str, colors: Mapping[str, str]) -> str:
    title, baseline, curves = panel
    values = [value for curve in curves.values() for value in curve]
    heights = [bound for value in values for bound in (value.y, *(value.interval or ()))]
    low_x, high_x = _range([value.x for value in values])
    low_y, high_y = _range([*heights, *([] if baseline is None else [baseline])])
    right, bottom = _WIDTH - 15, _HEIGHT - 35

    def at(x: float, y: float) -> tuple[float, float]:
        share_x, share_y = (x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)
        return _MARGIN + share_x * (right - _MARGIN), bottom - share_y * (bottom - 25)

    parts = [_text(_MARGIN, 15, title, weight="bold"), _text((_MARGIN + right) / 2, _HEIGHT - 5, axis, anchor="middle")]
    parts.append(f'<path d="M{_MARGIN},25V{bottom}H{right}" fill="none" stroke="black"/>')
    for share in (0.0, 0.5, 1.0):
        x, y = low_x + share * (high_x - low_x), low_y + share * (high_y - low_y)
        parts.append(_text(_MARGIN - 4, at(x, y)[1] + 4, _short(y) if y >= 1000 else f"{y:.3g}", anchor="end"))
        parts.append(_text(at(x, y)[0], bottom + 14, _short(x), anchor="middle"))
    if baseline is not None:
        y = at(low_x, baseline)[1]
        parts.append(f'<path d="M{_MARGIN},{y:.1f}H{right}" stroke="gray" stroke-dasharray="4"/>')
    for run, curve in curves.items():
        parts += _curve([(value, *at(value.x, value.y)) for value in curve], colors[run], at)
    return "".join(parts)


def _curve(points: Sequence[tuple[Value, float, float]], color: str, at: Any) -> list[str]:
    """Return a line, its points with tooltips, and their intervals."""
    line = " ".join(f"{x:.1f},{y:.1f}" for _, x, y in points)
    parts = [f'<polyline points="{line}" fill="none" stroke="{color}"/>']
    for value, x, y in points:
        if value.interval is not None:
            lower, upper = (at(value.x, bound)[1] for bound in value.interval)
            parts.append(f'<path d="M{x:.1f},{lower:.1f}V{upper:.1f}" stroke="{color}" opacity="0.5"/>')
        tooltip = html.escape(printable(value.label))
        if len(points) > _MAX_MARKERS and value.interval is None:
            continue
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"><title>{tooltip}</title></circle>')
    return parts


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest value, or a range around a single value."""
    low, high = min(values), max(values)
    margin = 0.0 if high > low else max(abs(low), 1.0) * 0.05
    return low - margin, high + margin


def _short(value: float) -> str:
    """Return a number with a suffix for thousands: 1.5M."""
    power = min(int(math.log10(value) // 3), 4) if value >= 1 else 0
    return f"{value / 1000**power:.3g}{('', 'k', 'M', 'B', 'T')[power]}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", fill: str = "black") -> str:
    content = html.escape(printable(text))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}">{content}</text>'
