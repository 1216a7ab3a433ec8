"""Show the progress of a run: on a terminal a block that is redrawn in place, elsewhere a plain line every 10 s.

The text is a pure function of a `Snapshot` and a `Pace`; only `Display` and its meter depend on time.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

TOKENIZING, WRITING = "tokenizing", "shuffling and writing"
_REDRAW_EVERY_S, _LINE_EVERY_S = 0.2, 10.0
_WINDOW_S, _WINDOW_STEPS = 60.0, 8  # a rate is an average over this time, but over at least this many updates
_MAX_SOURCES = 8
_BAR_CELLS = 30
_PROC = Path("/proc")


@dataclass(frozen=True)
class Snapshot:
    """The progress of a run at one time.

    done_bytes, total_bytes: of input.
    total_bytes, files, shards: totals of the finished and the remaining work.
    sources: tokens by source name; empty if there is only one source.
    memory_bytes: 0 if unknown.
    """

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0
    files_done: int = 0
    files: int = 0
    tokens: int = 0
    sources: Mapping[str, int] = field(default_factory=dict)
    spilled_bytes: int = 0
    memory_bytes: int = 0
    workers: int = 0
    shards_done: int = 0
    shards: int = 0
    bad_documents: int = 0

    @property
    def done(self) -> int:
        """The finished work of the stage: input bytes or shards."""
        return self.shards_done if self.stage == WRITING else self.done_bytes

    @property
    def total(self) -> int:
        """The total work of the stage: input bytes or shards."""
        return self.shards if self.stage == WRITING else self.total_bytes

    @property
    def fraction(self) -> float:
        """The finished fraction of the stage."""
        return min(1.0, self.done / self.total) if self.total else 1.0


@dataclass(frozen=True)
class Pace:
    """The elapsed time of a stage, and its rates: input bytes or shards per second, and tokens per second."""

    elapsed_s: float = 0.0
    done_per_s: float = 0.0
    tokens_per_s: float = 0.0

    def time_left(self, snapshot: Snapshot) -> str:
        """Return the remaining time of the stage at this pace, or "?" if it is unknown."""
        remaining = max(0, snapshot.total - snapshot.done)
        if not remaining:
            return format_duration(0)
        return format_duration(remaining / self.done_per_s) if self.done_per_s > 0 else "?"


# --- formatting --------------------------------------------------------------------------------------------------


def format_duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    rounded = max(0, round(seconds))
    return f"{rounded // 3600}:{rounded // 60 % 60:02d}:{rounded % 60:02d}"


def format_bytes(num_bytes: float) -> str:
    """Format bytes in the largest unit in which the value is at least 1; 1 MB is 10^6 bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


def format_line(snapshot: Snapshot, pace: Pace) -> str:
    """Return the progress as one plain line."""
    parts = [f"{snapshot.fraction:.0%}", *_counts(snapshot, pace), *_sources(snapshot), *_resources(snapshot)]
    return f"{snapshot.stage}: {', '.join(parts)}, {_times(snapshot, pace)}"


def format_block(snapshot: Snapshot, pace: Pace, width: int) -> list[str]:
    """Return the progress for a terminal, with a bar: lines of at most `width` characters."""
    times = f"{snapshot.fraction:4.0%}  {_times(snapshot, pace)}"
    cells = min(_BAR_CELLS, width - len(snapshot.stage) - len(times) - 4)
    full = int(cells * snapshot.fraction)
    bar = f"[{'#' * full}{'.' * (cells - full)}] " if cells >= 5 else ""
    rows = [f"{snapshot.stage} {bar}{times}", *_wrapped(_counts(snapshot, pace), width)]
    rows += [f"    {source}" for source in _sources(snapshot)]
    rows += _wrapped(_resources(snapshot), width)
    return [row[:width] for row in rows]


def _times(snapshot: Snapshot, pace: Pace) -> str:
    return f"{format_duration(pace.elapsed_s)} elapsed, {pace.time_left(snapshot)} left"


def _wrapped(parts: list[str], width: int) -> list[str]:
    return textwrap.wrap(", ".join(parts), max(width, 1), initial_indent="  ", subsequent_indent="  ")


def _counts(snapshot: Snapshot, pace: Pace) -> list[str]:
    if snapshot.stage == WRITING:
        return [
            f"{snapshot.shards_done:,}/{snapshot.shards:,} shards",
            f"{pace.done_per_s:,.1f} shards/s",
            f"{snapshot.tokens:,} tokens",
        ]
    return [
        f"{snapshot.files_done:,}/{snapshot.files:,} files",
        f"{format_bytes(snapshot.done_bytes)} of {format_bytes(snapshot.total_bytes)}",
        f"{pace.done_per_s / 1e6:,.1f} MB/s",
        f"{snapshot.tokens:,} tokens",
        f"{pace.tokens_per_s:,.0f} tokens/s",
    ]


def _sources(snapshot: Snapshot) -> list[str]:
    """Return the tokens of each source in descending order; the sources after the first few are summed."""
    if snapshot.stage == WRITING:
        return []
    ranked = sorted(snapshot.sources.items(), key=lambda item: (-item[1], item[0]))
    if len(ranked) > _MAX_SOURCES:
        rest = ranked[_MAX_SOURCES - 1 :]
        ranked = [*ranked[: _MAX_SOURCES - 1], (f"{len(rest)} more", sum(tokens for _, tokens in rest))]
    return [f"{name} {tokens:,} tokens" for name, tokens in ranked]


def _resources(snapshot: Snapshot) -> list[str]:
    """Return the current resource usage and the number of bad documents, without zeros."""
    workers, bad = snapshot.workers, snapshot.bad_documents
    entries = [
        (snapshot.spilled_bytes, f"{format_bytes(snapshot.spilled_bytes)} spilled"),
        (snapshot.memory_bytes, f"{format_bytes(snapshot.memory_bytes)} memory"),
        (workers, f"{workers} worker{'s' * (workers != 1)}"),
        (bad, f"{bad:,} bad document{'s' * (bad != 1)}"),
    ]
    return [text for count, text in entries if count]


# --- display -----------------------------------------------------------------------------------------------------


class _Meter:
    """A meter of the pace of one stage. Work that its first snapshot contains was done before and does not count."""

    def __init__(self, snapshot: Snapshot, now: float) -> None:
        self._first = (now, snapshot.done, snapshot.tokens)
        self._steps = deque([self._first])

    def pace(self, snapshot: Snapshot, now: float, overall: bool) -> Pace:
        """Return the pace of about the last minute, or with `overall` of the full stage."""
        if snapshot.done != self._steps[-1][1]:
            self._steps.append((now, snapshot.done, snapshot.tokens))
        while len(self._steps) > _WINDOW_STEPS and self._steps[1][0] <= now - _WINDOW_S:
            self._steps.popleft()
        start, done, tokens = self._first if overall else self._steps[0]
        seconds = now - start
        if seconds <= 0:
            return Pace(now - self._first[0])
        return Pace(now - self._first[0], (snapshot.done - done) / seconds, (snapshot.tokens - tokens) / seconds)


class Display:
    """A display of snapshots on a stream (default: standard error), at a frequency that suits the kind of stream.

    The time of a stage starts with its first snapshot, so show one before the work starts. A block on a terminal ends
    with a line break, so that output after an interruption starts on a new line.
    """

    def __init__(self, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream: TextIO | None = stream or sys.stderr
        self._now = now
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._stage: str | None = None
        self._drawn: list[str] = []

    def show(self, snapshot: Snapshot, final: bool = False) -> None:
        """Show a snapshot unless the last one is too recent; `final` ends a stage and shows its overall rates."""
        now = self._now()
        if snapshot.stage != self._stage:
            self._stage, self._meter, self._shown = snapshot.stage, _Meter(snapshot, now), now
            due = self._live
        else:
            due = now - self._shown >= (_REDRAW_EVERY_S if self._live else _LINE_EVERY_S)
        pace = self._meter.pace(snapshot, now, overall=final)
        if not (due or final):
            return
        self._shown = now
        self._print(self._redrawn(snapshot, pace) if self._live else format_line(snapshot, pace) + "\n")
        if final:
            self._stage, self._drawn = None, []

    def _redrawn(self, snapshot: Snapshot, pace: Pace) -> str:
        """Return the new block, preceded by control codes that clear the previous block."""
        columns, rows = shutil.get_terminal_size()
        # If the terminal was made narrower, it has wrapped the previous lines.
        above = sum(max(1, -(-len(row) // columns)) for row in self._drawn)
        self._drawn = format_block(snapshot, pace, columns - 1)[: rows - 1]
        up = f"\x1b[{above}A" if above else ""
        return f"{up}\r\x1b[J" + "".join(f"{row}\n" for row in self._drawn)

    def _print(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the stream is closed; continue without progress output
            self._stream = None


# --- memory ------------------------------------------------------------------------------------------------------


def memory_in_use(pids: Iterable[int] | None = None) -> int:
    """Return the memory in bytes of the given processes, or of this process and all its descendants.

    Shared memory counts once if the kernel reports proportional sizes (Linux). Return 0 if memory cannot be measured.
    """
    if not (_PROC / "self").exists():
        return _memory_by_psutil(pids)
    return sum(map(_process_bytes, _process_tree(os.getpid()) if pids is None else pids))


def _process_tree(root: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            parent = _read(folder / "stat").rpartition(")")[2].split()[1:2]  # the process name may contain ")" itself
            children.setdefault(int(parent[0]) if parent else 0, []).append(int(folder.name))
    tree = [root]
    for pid in tree:  # grows during the iteration
        tree += children.get(pid, [])
    return tree


def _process_bytes(pid: int) -> int:
    """Return the proportional set size of a process if available, otherwise its resident set size; 0 after its end."""
    for row in _read(_PROC / f"{pid}/smaps_rollup").split("\n"):
        if row.startswith("Pss:"):
            return int(row.split()[1]) << 10
    pages = _read(_PROC / f"{pid}/statm").split()[1:2]
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _read(path: Path) -> str:
    """Return the content of a /proc file, or "" if the process has ended or belongs to another user."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _memory_by_psutil(pids: Iterable[int] | None) -> int:
    try:
        psutil = importlib.import_module("psutil")  # installed with Ray
    except ImportError:
        return 0

    def resident(pid: int) -> int:
        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:  # the process has ended or belongs to another user
            return 0

    if pids is None:
        current = psutil.Process()
        pids = [current.pid, *(child.pid for child in current.children(recursive=True))]
    return sum(map(resident, pids))
