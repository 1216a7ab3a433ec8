"""Analyze a sweep: the final loss of each run, and the minimum of each curve.

The runs of a curve differ only in the axis, such as the learning rate, and in the seed. Its minimum is the vertex of a
least-squares parabola in the logarithm of the axis, fitted to the points around the lowest one. A value of 0, such as
wd=0, can be the minimum but is not part of a parabola.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from open_lm.scaling.jobs import has_diverged, is_finished, recorded_run
from open_lm.scaling.sweep import REPLICATE, SweepRun

FINISHED, DIVERGED, MISSING = "finished", "diverged", "missing"  # states of a run
_RISE = 1.02  # a run has diverged if its last training loss exceeds this multiple of the first
_NEIGHBORS = 2  # points on each side of the lowest one that the parabola fits
_EDGE = "at the edge of the grid"
_NO_VERTEX = "not curved around the lowest point"
_NOT_POSITIVE = "no value above 0 is better"


@dataclass(frozen=True)
class Result:
    """A run with its state and its final loss in nats per token, NaN if it has none.

    The loss is that of the last validation, or without one the mean of the last training losses.
    """

    run: SweepRun
    state: str
    loss: float = math.nan


@dataclass
class Minimum:
    """The minimum of a curve.

    Attributes:
        model, width, parametrization: of its runs.
        settings: the settings that its runs share, without axis and seed.
        points: (value of the axis, mean loss, number of seeds) of the runs that did not diverge, ascending.
        diverged: values of the axis with a diverged run.
        best: value of the axis with the lowest loss: the vertex, or the value of the lowest point; NaN without a point.
        interval: `best` times and divided by exp(standard error); None if it is unknown.
        loss: loss at `best`, of the parabola or of the lowest point.
        coefficients: (c0, c1, c2) of the parabola c0 + c1 x + c2 x^2, x = log of the axis; None without a parabola.
        note: why there is no parabola, or what else limits the result.
    """

    model: str
    width: int
    parametrization: str
    settings: dict[str, float]
    points: list[tuple[float, float, int]] = field(default_factory=list)
    diverged: list[float] = field(default_factory=list)
    best: float = math.nan
    interval: tuple[float, float] | None = None
    loss: float = math.nan
    coefficients: tuple[float, float, float] | None = None
    note: str = ""


def result_of(run: SweepRun, folder: str) -> Result:
    """Return the state and loss of a run from the files in its folder."""
    if has_diverged(folder):
        return Result(run, DIVERGED)
    content = recorded_run(folder)
    if content is None or not is_finished(content):
        return Result(run, MISSING)
    losses, first, last = content.metrics.get("val/loss")[1], content.summary.first_loss, content.summary.last_loss
    loss = float(losses[-1]) if len(losses) else last
    if loss is None or not math.isfinite(loss):
        return Result(run, DIVERGED)
    # A finished run whose training loss has risen has left the region of stable training. The loss on other data may be
    # higher than that of the first step, for example in a short fine-tuning. Batches differ in their loss: a rate that
    # is too low may end slightly above the start.
    has_risen = first is not None and last is not None and last > _RISE * first
    return Result(run, DIVERGED if has_risen else FINISHED, loss)


def find_minima(results: Sequence[Result]) -> list[Minimum]:
    """Return the minimum of each curve, in the order of the runs."""
    curves: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        run = result.run
        axis = next(iter(run.settings))
        shared = tuple((key, value) for key, value in run.settings.items() if key not in (axis, REPLICATE))
        curves.setdefault((run.model, run.parametrization, shared), []).append(result)
    return [_minimum(curve) for curve in curves.values()]


def _minimum(curve: Sequence[Result]) -> Minimum:
    run = curve[0].run
    axis = next(iter(run.settings))
    shared = {key: value for key, value in run.settings.items() if key not in (axis, REPLICATE)}
    found = Minimum(run.model, run.width, run.parametrization, shared)
    losses: dict[float, list[float]] = {}
    for result in curve:
        value = result.run.settings[axis]
        if result.state == DIVERGED:
            found.diverged.append(value)
        elif result.state == FINISHED:
            losses.setdefault(value, []).append(result.loss)
    found.diverged = sorted(set(found.diverged))
    kept = sorted((value, seeds) for value, seeds in losses.items() if value not in found.diverged)
    found.points = [(value, float(np.mean(seeds)), len(seeds)) for value, seeds in kept]
    if found.points:
        _fit(found, [(value, loss) for value, seeds in kept for loss in seeds])
    return found


def _fit(found: Minimum, points: Sequence[tuple[float, float]]) -> None:
    """Set the minimum of a curve from `points`, the (value, loss) of each run."""
    lowest = min(range(len(found.points)), key=lambda index: found.points[index][1])
    found.best, found.loss = found.points[lowest][:2]
    if found.best <= 0:
        found.note = _NOT_POSITIVE
        return
    values = [value for value, *_ in found.points if value > 0]  # 0 has no logarithm
    position = values.index(found.best)
    if position in (0, len(values) - 1):
        is_last = position == len(values) - 1
        blocked = is_last and found.diverged and found.diverged[-1] > found.best
        found.note = f"{_EDGE}: higher values diverge" if blocked else f"{_EDGE}: {'raise' if is_last else 'lower'} it"
        return
    window = values[max(0, position - _NEIGHBORS) : position + _NEIGHBORS + 1]
    chosen = np.array([point for point in points if point[0] in window])
    x, y = np.log(chosen[:, 0]) - math.log(found.best), chosen[:, 1]
    design = np.stack([np.ones_like(x), x, x * x], axis=1)
    theta, *_ = np.linalg.lstsq(design, y, rcond=None)
    vertex = -theta[1] / (2 * theta[2]) if theta[2] > 0 else math.nan
    if not x.min() <= vertex <= x.max():
        found.note = _NO_VERTEX
        return
    shift = math.log(found.best)
    found.coefficients = (
        float(theta[0] - theta[1] * shift + theta[2] * shift**2),
        float(theta[1] - 2 * theta[2] * shift),
        float(theta[2]),
    )
    found.best, found.loss = math.exp(vertex + shift), float(theta[0] + theta[1] * vertex / 2)
    freedom = len(y) - 3
    if freedom > 0:
        covariance = np.linalg.inv(design.T @ design) * np.sum((design @ theta - y) ** 2) / freedom
        slope = np.array([0.0, -1 / (2 * theta[2]), theta[1] / (2 * theta[2] ** 2)])
        error = math.sqrt(max(0.0, slope @ covariance @ slope))
        found.interval = (found.best * math.exp(-error), found.best * math.exp(error))


@dataclass(frozen=True)
class Shift:
    """The change of the best value over the widths.

    factor: the largest best value of all widths divided by the smallest.
    is_bound: whether a minimum is at an edge of the grid, so that the factor is about a lower bound.
    """

    parametrization: str
    settings: dict[str, float]
    widths: tuple[int, ...]
    factor: float
    is_bound: bool


def find_shifts(minima: Sequence[Minimum]) -> list[Shift]:
    """Return the shift of each parametrization and combination of settings that has several widths."""
    groups: dict[tuple[object, ...], list[Minimum]] = {}
    for minimum in minima:
        if math.isfinite(minimum.best):
            groups.setdefault((minimum.parametrization, *minimum.settings.items()), []).append(minimum)
    shifts = []
    for group in groups.values():
        widths = tuple(sorted({minimum.width for minimum in group}))
        best = [minimum.best for minimum in group]
        if len(widths) > 1 and min(best) > 0:
            is_bound = any(_EDGE in minimum.note for minimum in group)
            factor = max(best) / min(best)
            shifts.append(Shift(group[0].parametrization, group[0].settings, widths, factor, is_bound))
    return shifts


def shift_text(shift: Shift, axis: str) -> str:
    """Return a sentence about a shift."""
    settings = "".join(f", {key}={value:g}" for key, value in shift.settings.items())
    bound = " or more (a minimum is at the edge of the grid)" if shift.is_bound else ""
    return (
        f"{shift.parametrization}{settings}: the best {axis} of the widths {shift.widths[0]} to {shift.widths[-1]} "
        f"differs by a factor of {shift.factor:.2f}{bound}"
    )
