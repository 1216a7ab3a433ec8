"""Draw the scores of several checkpoints over their training as SVG, which browsers and office programs open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.checkpoint.files import epoch_number
from open_lm.checkpoint.folders import step_number
from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.icl.metrics import Outcome
from open_lm.evaluate.icl.report import averages
from open_lm.monitor.panels import Panel, Value, draw_panels

_SUFFIXES = (".svg", ".html")


@dataclass(frozen=True)
class Point:
    """The results of one checkpoint: path of the file, its content and its outcomes."""

    path: str
    content: Mapping[str, Any]
    outcomes: Sequence[Outcome]

    @property
    def run(self) -> str:
        """The folder of the checkpoint and the engine: points with the same values are connected."""
        folder = str(self.content.get("checkpoint", "")).rstrip("/").rpartition("/")[0]
        return f"{folder or '.'} ({self.content.get('engine')})"

    def position(self, axis: str) -> int | None:
        """Return the tokens, steps or epochs of the checkpoint, None if the results do not have them."""
        value = self.content.get(axis)
        checkpoint = str(self.content.get("checkpoint", ""))
        if axis == "step" and value is None:
            value = step_number(checkpoint)
        if axis == "epoch" and value is None:
            value = epoch_number(checkpoint)
        return value if isinstance(value, int) else None


def check_plot(path: str) -> None:
    """Raise ConfigError if the suffix of --plot has no format."""
    if not path.lower().endswith(_SUFFIXES):
        raise ConfigError(f"--plot {path}: expected a name that ends in {' or '.join(_SUFFIXES)}")


def write_plot(path: str, points: Sequence[Point]) -> None:
    """Draw a panel per task, and one for the average of the tasks that all results have.

    Raises:
        DataError: the results have no common axis (tokens, steps or epochs).
    """
    axis = _axis(points)
    panels = _panels(points, axis)
    svg = draw_panels(panels, axis)
    if path.lower().endswith(".html"):
        svg = (
            f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>Scores</title>\n<body>{svg}</body></html>\n'
        )
    storage.write_text(path, svg)


def _axis(points: Sequence[Point]) -> str:
    for axis in ("tokens", "step", "epoch"):
        if all(point.position(axis) is not None for point in points):
            return axis
    unknown = [point.path for point in points if all(point.position(axis) is None for axis in ("tokens", "step"))]
    raise DataError(
        "--plot: the results have neither tokens nor steps nor epochs in common; evaluate these checkpoints with this "
        f"version: {', '.join(unknown or [point.path for point in points])}"
    )


def _panels(points: Sequence[Point], axis: str) -> list[Panel]:
    ordered = sorted(points, key=lambda point: point.position(axis) or 0)
    tasks = [{(o.task, o.shots): o for o in reversed(point.outcomes) if o.score is not None} for point in ordered]
    common = [key for key in tasks[0] if all(key in known for known in tasks)]
    keys = dict.fromkeys(key for point in points for key in [(o.task, o.shots) for o in point.outcomes])
    panels: list[Panel] = []
    if len(common) > 1:
        curves: dict[str, list[Value]] = {}
        for point, known in zip(ordered, tasks, strict=True):
            mean = averages([known[key] for key in common])["average"]
            if mean is not None:
                curves.setdefault(point.run, []).append(_value(point, axis, mean, None))
        panels.append((f"average of {len(common)} tasks", None, curves))
    for key in keys:
        curves, baseline = {}, None
        for point, known in zip(ordered, tasks, strict=True):
            outcome = known.get(key)
            if outcome is not None and outcome.score is not None:
                baseline = outcome.baseline
                curves.setdefault(point.run, []).append(_value(point, axis, outcome.score, outcome.interval))
        if curves:
            panels.append((f"{key[0]} {key[1]}-shot", baseline, curves))
    return panels


def _value(point: Point, axis: str, score: float, interval: tuple[float, float] | None) -> Value:
    x = point.position(axis) or 0
    span = "" if interval is None else " ({:.4f} to {:.4f})".format(*interval)
    return Value(x, score, interval, f"{point.content.get('checkpoint')}: {score:.4f}{span}, {axis} {x:,}")
