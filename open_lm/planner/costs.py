"""Compute the time, device hours, energy and price of a training run, and find the cheapest way to run it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from open_lm.planner.strategies import SIMILAR_SPEED, Option

HOUR_S = 3600


@dataclass(frozen=True)
class Cost:
    """What a training run of a number of tokens takes.

    Attributes:
        seconds: its time, without evaluations and checkpoints.
        device_hours: time multiplied by the number of devices.
        kwh: the energy of the devices at their thermal design power, an upper bound; None if that is unknown.
        price: the price of the device hours; None without --price-per-device-hour.
    """

    seconds: float
    device_hours: float
    kwh: float | None
    price: float | None


def cost_of(option: Option, tokens: int, watts: float | None, price_per_hour: float | None) -> Cost:
    """Return the cost of training on `tokens` with an option that has no problem. `watts` is that of one device."""
    assert option.time is not None
    seconds = tokens / option.time.tokens_per_s
    device_hours = option.machine.devices * seconds / HOUR_S
    return Cost(
        seconds=seconds,
        device_hours=device_hours,
        kwh=None if watts is None else watts * device_hours / 1000,
        price=None if price_per_hour is None else price_per_hour * device_hours,
    )


def cheapest(options: Iterable[Option]) -> Option | None:
    """Return the fitting option with the fewest device hours per token, None if none fits. Of equally cheap ones the
    fastest wins."""
    fitting = [(option.time.tokens_per_s, option) for option in options if option.fits and option.time is not None]
    limit = SIMILAR_SPEED * max((speed / option.machine.devices for speed, option in fitting), default=0.0)
    candidates = [(speed, option) for speed, option in fitting if speed / option.machine.devices >= limit]
    return max(candidates, key=lambda pair: pair[0], default=(0.0, None))[1]
