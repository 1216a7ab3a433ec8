"""Shares of several sources, kept exactly: pure integer arithmetic behind plan.py."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from math import gcd, lcm

import numpy as np

_MAX_SIMULATED_SAMPLES = 1_000_000


def parse_fraction(value: float | str) -> Fraction:
    """The number that was meant: "0.1" is one tenth, and 0.3333333333333333 (which is 1/3 as it prints) a third.

    ValueError for what is no finite number.
    """
    typed = Fraction(str(value))
    near = typed.limit_denominator(10**6)
    return near if abs(typed - near) < Fraction(1, 10**13) else typed


def integer_weights(weights: Sequence[Fraction]) -> list[int]:
    """The smallest integers in the proportion of the weights."""
    scale = lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * scale) for weight in weights]
    divisor = gcd(*numbers) or 1
    return [number // divisor for number in numbers]


class Interleaving:
    """Which source each sample comes from, so that after any number n of samples every source has given less than one
    sample more or less than n times its share.

    The k-th sample (from 0) of a source with the share s may come at the places floor(k / s) … ceil((k + 1) / s) - 1.
    Each place goes to the source whose time ends first, among those whose time has come; that this keeps every
    sample's time is a known property of unit tasks (earliest deadline first). `weights` are whole numbers, `counts` the
    samples that each source has given so far.
    """

    def __init__(self, weights: Sequence[int], counts: Sequence[int]) -> None:
        self._weights, self._total = list(weights), sum(weights)
        self._counts, self._place = list(counts), sum(counts)
        self._due: list[tuple[int, int]] = []  # (end of its time, source): may come now
        self._waiting = [(self._begin(source), source) for source, weight in enumerate(weights) if weight]
        heapify(self._waiting)

    def _begin(self, source: int) -> int:
        return self._counts[source] * self._total // self._weights[source]

    def _end(self, source: int) -> int:
        return -(-(self._counts[source] + 1) * self._total // self._weights[source])

    def take(self, count: int) -> np.ndarray:
        """The sources of the next `count` samples: int64 (count,)."""
        chosen = []
        for place in range(self._place, self._place + count):
            while self._waiting and self._waiting[0][0] <= place:
                source = heappop(self._waiting)[1]
                heappush(self._due, (self._end(source), source))
            source = heappop(self._due)[1]
            self._counts[source] += 1
            heappush(self._waiting, (self._begin(source), source))
            chosen.append(source)
        self._place += count
        return np.array(chosen, dtype=np.int64)


def most_samples(weights: Sequence[Fraction], count: int) -> list[int]:
    """Samples that each source gives to the first `count`: exact, or one more where that takes too long to work out."""
    numbers = integer_weights(weights)
    total = sum(numbers)
    periods, rest = divmod(count, total)
    if rest > _MAX_SIMULATED_SAMPLES:
        return [-(-count * number // total) for number in numbers]
    begun = np.bincount(Interleaving(numbers, [0] * len(numbers)).take(rest), minlength=len(numbers)).tolist()
    return [periods * number + more for number, more in zip(numbers, begun, strict=True)]
