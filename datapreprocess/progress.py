"""Progress of a run: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_LINE_EVERY_S = 10.0


class Board:
    """Collects what the units say of themselves: unit -> (input bytes, tokens). Runs as a Ray actor."""

    def __init__(self) -> None:
        self._units: dict[int, tuple[int, int]] = {}

    def update(self, unit: int, num_bytes: int, tokens: int) -> None:
        self._units[unit] = (num_bytes, tokens)

    def totals(self) -> tuple[int, int]:
        """Input bytes and tokens of all units together."""
        counts = self._units.values()
        return sum(count[0] for count in counts), sum(count[1] for count in counts)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Display:
    """Shows how far a stage has come, its rate and the time left. `unit` names what is counted, MB are 10^6 bytes."""

    def __init__(self, stage: str, total: int, unit: str, stream: TextIO | None = None) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._start = self._shown = time.monotonic()

    def show(self, done: int, note: str = "", final: bool = False) -> None:
        """Say it, unless it was said a moment ago. `done` counts like the total."""
        now = time.monotonic()
        if not final and now - self._shown < (0.2 if self._live else _LINE_EVERY_S):
            return
        self._shown = now
        line = self.line(done, now - self._start, note)
        print(f"\r\x1b[K{line}" if self._live else line, end="" if self._live and not final else "\n",
              file=self._stream, flush=True)  # fmt: skip

    def line(self, done: int, elapsed_s: float, note: str = "") -> str:
        """The text of a line."""
        share = done / self._total if self._total else 1.0
        rate = done / elapsed_s if elapsed_s > 0 else 0.0
        left = clock((self._total - done) / rate) if rate > 0 else "?"
        scale, places = (1e6, 1) if self._unit == "MB" else (1.0, 0)
        parts = [
            f"{self._stage}: {done / scale:,.{places}f}/{self._total / scale:,.{places}f} {self._unit} ({share:.0%})",
            f"{rate / scale:,.1f} {self._unit}/s",
            *([note] if note else []),
            f"{clock(elapsed_s)} gone, {left} left",
        ]
        return ", ".join(parts)
