"""Write numbers for readers: with a suffix or a unit, and no more digits than they mean."""

from __future__ import annotations

import math

MISSING = "\N{EN DASH}"
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_FLOPS = ((1e24, "YFLOP"), (1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


def big(value: float | None) -> str:
    """Return a large number with three digits and a suffix: "1.44B"; smaller ones completely: "999"."""
    if value is None:
        return MISSING
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * (1 if size > 1e3 else 10):
            return f"{_three_digits(value / size)}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def _three_digits(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}"


def size(num_bytes: float | None) -> str:
    """Return a number of bytes: "1.5 GiB"."""
    if num_bytes is None:
        return MISSING
    power = min(int(math.log(num_bytes, 1024)), len(_BINARY) - 1) if num_bytes >= 1 else 0
    return f"{num_bytes:.0f} B" if power == 0 else f"{num_bytes / 1024**power:.1f} {_BINARY[power]}"


def duration(seconds: float | None) -> str:
    """Return a duration: "42 s", "3 min 20 s", "5 h 12 min", "3 d 4 h"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.2g} s"
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    for length, name, part_length, part_name in units:
        if seconds >= length:
            whole, rest = divmod(round(seconds / part_length) * part_length, length)
            return f"{whole:.0f} {name}" + (f" {rest / part_length:.0f} {part_name}" if rest >= part_length else "")
    raise AssertionError(seconds)


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction of 1 in percent: "41.2 %"."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def flops(value: float | None) -> str:
    """Return floating point operations: "3.1 EFLOP"."""
    if value is None:
        return MISSING
    for length, name in _FLOPS:
        if value >= length:
            return f"{_three_digits(value / length)} {name}"
    return f"{value:.3g} FLOP"


def energy(kwh: float | None) -> str:
    """Return an energy: "12.3 kWh", "4.1 Wh"."""
    if kwh is None:
        return MISSING
    if kwh >= 1000:
        return f"{_three_digits(kwh / 1000)} MWh"
    return (
        f"{_three_digits(kwh)} kWh"
        if kwh >= 1
        else f"{_three_digits(1000 * kwh)} Wh"
        if kwh >= 1e-3
        else f"{1000 * kwh:.2g} Wh"
    )


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with fixed decimals, or a dash."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
