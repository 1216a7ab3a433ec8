"""Resident memory of this process and its peak, which can be reset. Linux only."""

from __future__ import annotations

from pathlib import Path


def resident_bytes() -> int:
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Return the peak since the last call of `reset_peak`."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().split("\n") if line.startswith(field))
    return int(line.split()[1]) * 1024
