"""Shares of several sources, kept exactly: pure integer arithmetic behind plan.py."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

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


def next_source(credits_: list[int], weights: Sequence[int], total: int) -> int:
    """The source furthest behind its share (the first of several); updates the credits."""
    for number, weight in enumerate(weights):
        credits_[number] += weight
    chosen = max(range(len(weights)), key=credits_.__getitem__)
    credits_[chosen] -= total
    return chosen


def most_samples(weights: Sequence[Fraction], count: int) -> list[int]:
    """Samples that each source gives to the first `count`: exact, or one more where that takes too long to work out."""
    numbers = integer_weights(weights)
    total = sum(numbers)
    periods, rest = divmod(count, total)
    if rest > _MAX_SIMULATED_SAMPLES:
        return [-(-count * number // total) for number in numbers]
    counts = [periods * number for number in numbers]
    credits_ = [0] * len(numbers)
    for _ in range(rest):
        counts[next_source(credits_, numbers, total)] += 1
    return counts
