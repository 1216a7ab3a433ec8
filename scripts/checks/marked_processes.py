"""Processes found again by a mark in their environment, whatever session they have moved to. Linux only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from open_lm.errors import DataError

MARK = "OPEN_LM_KILL"  # the variable of the environment
POLL_S, SETTLE_S = 0.05, 5.0


def end_all(mark: str) -> None:
    """End whatever carries the mark: processes may have left the group that was killed."""
    deadline = time.monotonic() + SETTLE_S
    while left := list(marked(mark)):
        if time.monotonic() > deadline:
            raise DataError(f"processes {left} survive SIGKILL")
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(POLL_S)


def marked(mark: str) -> Iterator[int]:
    """The processes that carry the mark in their environment; one that has ended carries none."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue
            if f"{MARK}={mark}".encode() in environment:
                yield int(folder.name)
