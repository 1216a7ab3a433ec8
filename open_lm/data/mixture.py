"""Exact shares of several sources: the integer arithmetic behind order.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush
from math import gcd, lcm

import numpy as np

_MAX_SIMULATED_SAMPLES = 1_000_000


def parse_fraction(value: float | str) -> Fraction:
    """Return the number the user meant: "0.1" is one tenth, and 0.3333333333333333 (how 1/3 prints) is a third.

    ValueError if it is not a finite number.
    """
    exact = Fraction(str(value))
    simple = exact.limit_denominator(10**6)
    return simple if abs(exact - simple) < Fraction(1, 10**13) else exact


def integer_weights(weights: Sequence[Fraction]) -> list[int]:
    """Return the smallest integers in the same proportion as the weights."""
    scale = lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * scale) for weight in weights]
    divisor = gcd(*numbers) or 1
    return [number // divisor for number in numbers]


class Interleaving:
    """The source of each sample: after any n samples, each source has given n times its share, to within one sample.

    The k-th sample (from 0) of a source with share s is released at position floor(k / s) and due before position
    ceil((k + 1) / s). Each position goes to the released source with the earliest deadline. Earliest deadline first is
    known to meet every deadline for unit-length tasks. `weights` are integers, `counts` the samples that each source
    has given so far.
    """

    def __init__(self, weights: Sequence[int], counts: Sequence[int]) -> None:
        self._weights, self._total = list(weights), sum(weights)
        self._counts, self._position = list(counts), sum(counts)
        self._released: list[tuple[int, int]] = []  # (deadline, source)
        self._waiting = [(self._release(source), source) for source, weight in enumerate(weights) if weight]
        heapify(self._waiting)

    def _release(self, source: int) -> int:
        return self._counts[source] * self._total // self._weights[source]

    def _deadline(self, source: int) -> int:
        return -(-(self._counts[source] + 1) * self._total // self._weights[source])

    def take(self, count: int) -> np.ndarray:
        """Return the sources of the next `count` samples: int64 (count,)."""
        chosen = []
        for position in range(self._position, self._position + count):
            while self._waiting and self._waiting[0][0] <= position:
                source = heappop(self._waiting)[1]
                heappush(self._released, (self._deadline(source), source))
            source = heappop(self._released)[1]
            self._counts[source] += 1
            heappush(self._waiting, (self._release(source), source))
            chosen.append(source)
        self._position += count
        return np.array(chosen, dtype=np.int64)


@dataclass(frozen=True)
class SourceLayout:
    """The rows of a source in a round: `lanes` of them, and `shared` (less than 1) more on average."""

    lanes: int
    shared: Fraction


class Slots:
    """The slots of a round: `fixed` (lanes,) int64 holds the source of each fixed slot, then -1 for the shared ones.

    `num_fixed` are the fixed slots of each source, `shared_weights` the integer weights of the sources in the shared
    slots, `layouts` both together.
    """

    def __init__(self, weights: Sequence[int], lanes: int) -> None:
        total = sum(weights)
        self.num_fixed = [lanes * weight // total for weight in weights]
        self.shared_weights = [lanes * weight % total for weight in weights]
        fixed = Interleaving(self.num_fixed, [0] * len(weights)).take(sum(self.num_fixed))
        self.fixed: np.ndarray = np.concatenate([fixed, np.full(lanes - len(fixed), -1, np.int64)])
        self.layouts = [
            SourceLayout(count, Fraction(rest, total))
            for count, rest in zip(self.num_fixed, self.shared_weights, strict=True)
        ]

    def shared_counts(self, samples: Sequence[int]) -> list[int]:
        """Return how many of the samples of each source were in shared slots."""
        rounds, rest = divmod(sum(samples), len(self.fixed))
        in_part = [int(np.count_nonzero(self.fixed[:rest] == source)) for source in range(len(samples))]
        return [
            count - rounds * layout.lanes - part
            for count, layout, part in zip(samples, self.layouts, in_part, strict=True)
        ]


def samples_per_source(weights: Sequence[Fraction], count: int, lanes: int = 1) -> list[int]:
    """Return how many of the first `count` samples come from each source, in rounds of `lanes` samples.

    Exact, except where counting would take too long: then it may be one too many.
    """
    slots = Slots(integer_weights(weights), lanes)
    rounds, rest = divmod(count, lanes)
    in_part = np.bincount(slots.fixed[:rest] + 1, minlength=len(weights) + 1)
    numbers = integer_weights([Fraction(weight) for weight in slots.shared_weights])
    periods, rest = divmod(rounds * (lanes - sum(slots.num_fixed)) + int(in_part[0]), max(1, sum(numbers)))
    if rest > _MAX_SIMULATED_SAMPLES:
        partial = [-(-rest * number // sum(numbers)) for number in numbers]
    else:
        shared = Interleaving(numbers, [0] * len(numbers)).take(rest)
        partial = np.bincount(shared, minlength=len(numbers)).tolist()
    return [
        rounds * fixed + part + periods * number + extra
        for fixed, part, number, extra in zip(slots.num_fixed, in_part[1:].tolist(), numbers, partial, strict=True)
    ]
