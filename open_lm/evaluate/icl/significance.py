"""Test whether two scores differ by more than chance: intervals and p-values of differences.

A score is the share of correct examples, or the mean of such shares over categories. `Paired` compares results of the
same examples, which cancels what makes examples easy or hard. `Unpaired` needs only the scores and is less sensitive.
Resamples have a fixed seed, so equal inputs give equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from open_lm.evaluate.icl.metrics import LEVEL, NORMAL_QUANTILE, binomial_cdf

RESAMPLES = 10_000
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Difference:
    """A difference between two scores.

    Attributes:
        value: second score minus first score.
        interval: 95 % interval of the value; None if there is no test.
        p_value: two-sided; None if there is no test.
        test: name of the test.
    """

    value: float
    interval: tuple[float, float] | None
    p_value: float | None
    test: str


class Comparison(Protocol):
    """Two scores of one task. `draws` returns resampled differences (RESAMPLES,) float64, None if there is no test."""

    def difference(self) -> Difference: ...

    def draws(self, generator: np.random.Generator) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Paired:
    """Results of the same examples.

    Attributes:
        groups: for each category (one, if the task has none) whether each example is correct, in the first and in the
            second evaluation: (n,) bool each.
    """

    groups: Sequence[tuple[np.ndarray, np.ndarray]]

    def difference(self) -> Difference:
        """One group: the exact test of McNemar (1947), with the interval of Agresti and Min (2005). Several: the
        bootstrap over the examples of each category."""
        if len(self.groups) > 1:
            return bootstrap([self], [1.0])
        n, gained, lost = self._counts()[0]
        discordant = gained + lost
        p_value = min(1.0, 2 * binomial_cdf(min(gained, lost), discordant, 0.5)) if discordant else 1.0
        # Adding half an example to each of the four outcomes keeps the interval wide enough for few examples.
        center = (gained - lost) / (n + 2)
        width = NORMAL_QUANTILE * math.sqrt(max(discordant + 1 - (gained - lost) * center, 0.0)) / (n + 2)
        return Difference((gained - lost) / n, _clipped(center - width, center + width), p_value, "McNemar")

    def draws(self, generator: np.random.Generator) -> np.ndarray:
        """Resample the examples of each group. The difference of an example is 1, -1 or 0, so that a multinomial draw
        of the three numbers equals drawing the examples."""
        total = np.zeros(RESAMPLES)
        for n, gained, lost in self._counts():
            shares = np.array([gained, lost, n - gained - lost]) / n
            counts = generator.multinomial(n, shares, size=RESAMPLES)
            total += (counts[:, 0] - counts[:, 1]) / n
        return total / len(self.groups)

    @property
    def value(self) -> float:
        return sum((gained - lost) / n for n, gained, lost in self._counts()) / len(self.groups)

    def _counts(self) -> list[tuple[int, int, int]]:
        """Return (examples, correct only in the second, correct only in the first) of each group."""
        return [(len(a), int((b & ~a).sum()), int((a & ~b).sum())) for a, b in self.groups]


@dataclass(frozen=True)
class Unpaired:
    """Scores of independent examples, or of the same examples without their results.

    Attributes:
        scores: first and second score.
        counts: numbers of examples.
        intervals: 95 % intervals of the scores if these are means over categories, whose sizes are unknown; else None.
    """

    scores: tuple[float, float]
    counts: tuple[int, int]
    intervals: tuple[tuple[float, float], tuple[float, float]] | None = None

    def difference(self) -> Difference:
        """Shares: the test of two proportions, with the interval of Agresti and Caffo (2000). Means over categories:
        the z-test with the standard errors that the intervals imply."""
        if self.intervals is not None:
            error = math.hypot(*self._errors())
            p_value = _normal_p_value(self.value, error)
            return Difference(
                self.value,
                _clipped(self.value - NORMAL_QUANTILE * error, self.value + NORMAL_QUANTILE * error),
                p_value,
                "unpaired z",
            )
        correct = [score * n for score, n in zip(self.scores, self.counts, strict=True)]
        pooled = sum(correct) / sum(self.counts)
        error = math.sqrt(max(pooled * (1 - pooled), 0.0) * sum(1 / n for n in self.counts))
        low, high = ((k + 1) / (n + 2) for k, n in zip(correct, self.counts, strict=True))
        spread = math.sqrt(low * (1 - low) / (self.counts[0] + 2) + high * (1 - high) / (self.counts[1] + 2))
        interval = _clipped(high - low - NORMAL_QUANTILE * spread, high - low + NORMAL_QUANTILE * spread)
        return Difference(self.value, interval, _normal_p_value(self.value, error), "two proportions")

    def draws(self, generator: np.random.Generator) -> np.ndarray:
        if self.intervals is not None:
            return generator.normal(self.value, math.hypot(*self._errors()), size=RESAMPLES)
        first, second = (
            generator.binomial(n, min(max(score, 0.0), 1.0), size=RESAMPLES) / n
            for score, n in zip(self.scores, self.counts, strict=True)
        )
        return np.asarray(second - first)

    @property
    def value(self) -> float:
        return self.scores[1] - self.scores[0]

    def _errors(self) -> list[float]:
        """Return the standard errors of both scores."""
        return [(upper - lower) / (2 * NORMAL_QUANTILE) for lower, upper in self.intervals or ()]


@dataclass(frozen=True)
class Untested:
    """Scores that are not shares of correct examples, such as a calibration error."""

    scores: tuple[float, float]

    def difference(self) -> Difference:
        return Difference(self.scores[1] - self.scores[0], None, None, "none")

    def draws(self, generator: np.random.Generator) -> None:
        return None


def bootstrap(comparisons: Sequence[Comparison], weights: Sequence[float]) -> Difference:
    """Return the difference of a weighted sum of scores, by the bootstrap over the examples of each task.

    The interval has the percentiles of the resamples. The p-value is the share of resamples that are at least as far
    from the difference as the difference is from 0 (Efron and Tibshirani 1993, chapter 16), and at least 1 / 10,001.
    """
    generator = np.random.default_rng(0)
    value = sum(w * _value(c) for c, w in zip(comparisons, weights, strict=True))
    parts = [comparison.draws(generator) for comparison in comparisons]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return Difference(value, None, None, "none")
    draws = sum((w * part for w, part in zip(weights, known, strict=True)), np.zeros(RESAMPLES))
    extreme = np.abs(draws - value) >= abs(value) - _ROUNDING
    lower, upper = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    num_paired = sum(isinstance(comparison, Paired) for comparison in comparisons)
    test = {len(parts): "paired bootstrap", 0: "unpaired bootstrap"}.get(num_paired, "partly paired bootstrap")
    p_value = float((1 + extreme.sum()) / (1 + RESAMPLES))
    return Difference(value, (float(lower), float(upper)), p_value, test)


def _value(comparison: Comparison) -> float:
    """Return the difference without its test."""
    if isinstance(comparison, Paired | Unpaired):
        return comparison.value
    return comparison.difference().value


def _normal_p_value(value: float, error: float) -> float:
    if abs(value) < _ROUNDING:
        return 1.0
    return math.erfc(abs(value) / error / math.sqrt(2)) if error else 0.0


def _clipped(lower: float, upper: float) -> tuple[float, float]:
    return max(lower, -1.0), min(upper, 1.0)
