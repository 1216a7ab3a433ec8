"""Find and kill processes by a marker in their environment, even if they changed their session. Linux only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from open_lm.errors import DataError

MARK = "OPEN_LM_KILL"  # environment variable that holds the marker
POLL_S, SETTLE_S = 0.05, 5.0


def end_all(mark: str) -> None:
    """Kill all processes with this marker, including those that left the process group of the command."""
    deadline = time.monotonic() + SETTLE_S
    while pids := list(marked(mark)):
        if time.monotonic() > deadline:
            raise DataError(f"processes {pids} are still running {SETTLE_S:.0f} s after SIGKILL")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(POLL_S)


def marked(mark: str) -> Iterator[int]:
    """Yield the ids of running processes with this marker in their environment."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue
            if f"{MARK}={mark}".encode() in environment:
                yield int(folder.name)
