"""Reduce long curves to the points that a screen shows, so that no spike is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """A curve of at most some points.

    Attributes:
        steps, values: the points (n,), ascending.
        mean_steps, means: the means of equally many records each (m,), at the last of their steps; None if the curve
            has all its records.
        records_per_point: number of records in an interval of which the lowest and the highest value are kept; 1 if the
            curve has all records.
    """

    steps: np.ndarray
    values: np.ndarray
    mean_steps: np.ndarray | None = None
    means: np.ndarray | None = None
    records_per_point: int = 1


def thin(steps: np.ndarray, values: np.ndarray, max_points: int) -> Curve:
    """Return a curve with at most `max_points` + 2 points.

    Intervals of equally many records keep the record with the lowest and that with the highest value, so that every
    extreme value of the curve remains. The first and the last record remain too. NaN is kept only where an interval has
    nothing else.
    """
    if len(values) <= max_points:
        return Curve(steps, values)
    num_intervals = max(max_points // 2, 1)
    length = -(-len(values) // num_intervals)
    num_intervals = -(-len(values) // length)
    table = np.full((num_intervals, length), np.nan)
    table.reshape(-1)[: len(values)] = values
    missing = np.isnan(table)
    starts = np.arange(num_intervals) * length
    lowest = starts + np.where(missing, np.inf, table).argmin(axis=1)
    highest = starts + np.where(missing, -np.inf, table).argmax(axis=1)
    kept = np.unique(np.concatenate([[0], lowest, highest, [len(values) - 1]]))
    number = (~missing).sum(axis=1)
    with np.errstate(invalid="ignore"):
        means = np.where(missing, 0.0, table).sum(axis=1) / number
    ends = np.minimum(starts + length, len(values)) - 1
    return Curve(steps[kept], values[kept], steps[ends], means, length)


def thin_positions(length: int, max_points: int, required: np.ndarray) -> np.ndarray:
    """Return at most `max_points` evenly spaced positions of `length`, and the `required` ones, ascending."""
    even = np.linspace(0, max(length - 1, 0), min(length, max_points)).round().astype(np.int64)
    return np.unique(np.concatenate([even, required[(required >= 0) & (required < length)].astype(np.int64)]))
