"""Progress of a run: a few lines redrawn in place on a terminal, a plain line now and then elsewhere.

The lines are pure functions of a `Snapshot` and a `Pace`; `Display` keeps the time.
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
_WINDOW_S, _WINDOW_STEPS = 60.0, 8  # a rate looks back so far, and over so many finished units at least
_MAX_SOURCES = 8
_BAR_CELLS = 30
_PROC = Path("/proc")


@dataclass(frozen=True)
class Snapshot:
    """How far a run has come. Bytes are of input; `total_bytes`, `files` and `shards` are what there is to do.

    sources: tokens of each named source. memory_bytes: 0 where it is not known.
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
        """What the stage has done, as it counts: input bytes, or shards."""
        return self.shards_done if self.stage == WRITING else self.done_bytes

    @property
    def total(self) -> int:
        return self.shards if self.stage == WRITING else self.total_bytes

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 1.0


@dataclass(frozen=True)
class Pace:
    """Seconds since the stage began, and what it does in a second: input bytes or shards, and tokens."""

    elapsed_s: float = 0.0
    done_per_s: float = 0.0
    tokens_per_s: float = 0.0

    def left(self, snapshot: Snapshot) -> str:
        """The time that the rest of the stage takes at this pace."""
        missing = max(0, snapshot.total - snapshot.done)
        if not missing:
            return clock(0)
        return clock(missing / self.done_per_s) if self.done_per_s > 0 else "?"


# --- words -------------------------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves a digit before the point; a MB is 10^6 bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


def line(snapshot: Snapshot, pace: Pace) -> str:
    """Everything in one plain line."""
    parts = [f"{snapshot.share:.0%}", *_counts(snapshot, pace), *_sources(snapshot), *_resources(snapshot)]
    return f"{snapshot.stage}: {', '.join(parts)}, {clock(pace.elapsed_s)} gone, {pace.left(snapshot)} left"


def lines(snapshot: Snapshot, pace: Pace, width: int) -> list[str]:
    """The same for a terminal, with a bar: lines of at most `width` characters."""
    times = f"{snapshot.share:4.0%}  {clock(pace.elapsed_s)} gone, {pace.left(snapshot)} left"
    cells = min(_BAR_CELLS, width - len(snapshot.stage) - len(times) - 4)
    full = int(cells * snapshot.share)
    bar = f"[{'#' * full}{'.' * (cells - full)}] " if cells >= 5 else ""
    rows = [f"{snapshot.stage} {bar}{times}", *_wrapped(_counts(snapshot, pace), width)]
    rows += [f"    {source}" for source in _sources(snapshot)]
    rows += _wrapped(_resources(snapshot), width)
    return [row[:width] for row in rows]


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
        f"{size(snapshot.done_bytes)} of {size(snapshot.total_bytes)}",
        f"{pace.done_per_s / 1e6:,.1f} MB/s",
        f"{snapshot.tokens:,} tokens",
        f"{pace.tokens_per_s:,.0f} tokens/s",
    ]


def _sources(snapshot: Snapshot) -> list[str]:
    """Tokens of each source, most first; what is beyond the room for them is summed."""
    if snapshot.stage == WRITING:
        return []
    ranked = sorted(snapshot.sources.items(), key=lambda item: (-item[1], item[0]))
    if len(ranked) > _MAX_SOURCES:
        rest = ranked[_MAX_SOURCES - 1 :]
        ranked = [*ranked[: _MAX_SOURCES - 1], (f"{len(rest)} more", sum(tokens for _, tokens in rest))]
    return [f"{name} {tokens:,} tokens" for name, tokens in ranked]


def _resources(snapshot: Snapshot) -> list[str]:
    """What the run holds at this moment, and what was wrong with its input."""
    workers, bad = snapshot.workers, snapshot.bad_documents
    said = [
        (snapshot.spilled_bytes, f"{size(snapshot.spilled_bytes)} spilled"),
        (snapshot.memory_bytes, f"{size(snapshot.memory_bytes)} memory"),
        (workers, f"{workers} worker{'s' * (workers != 1)}"),
        (bad, f"{bad:,} bad document{'s' * (bad != 1)}"),
    ]
    return [words for count, words in said if count]


# --- showing -----------------------------------------------------------------------------------------------------


class _Meter:
    """The pace of one stage, from what was done at which time; what its first snapshot counts was done before it."""

    def __init__(self, snapshot: Snapshot, now: float) -> None:
        self._first = (now, snapshot.done, snapshot.tokens)
        self._steps = deque([self._first])

    def pace(self, snapshot: Snapshot, now: float, overall: bool) -> Pace:
        """The pace of about the last minute, or of the whole stage."""
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
    """Shows snapshots as they come, as often as is good for the stream (standard error by default).

    A stage's times and rates begin with its first snapshot, so show one before the work. A block on a terminal ends
    with a line break, so that whatever is printed after an interruption stands on a line of its own.
    """

    def __init__(self, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream: TextIO | None = stream or sys.stderr
        self._now = now
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._stage: str | None = None
        self._drawn: list[str] = []

    def show(self, snapshot: Snapshot, final: bool = False) -> None:
        """Say it, unless something was said a moment ago; `final` ends a stage, with the rates of all of it."""
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
        self._print(self._redrawn(snapshot, pace) if self._live else line(snapshot, pace) + "\n")
        if final:
            self._stage, self._drawn = None, []

    def _redrawn(self, snapshot: Snapshot, pace: Pace) -> str:
        """The block, and before it what moves the cursor up over the last one and clears that."""
        columns, rows = shutil.get_terminal_size()
        # A terminal that has become narrower since has wrapped the lines.
        above = sum(max(1, -(-len(row) // columns)) for row in self._drawn)
        self._drawn = lines(snapshot, pace, columns - 1)[: rows - 1]
        up = f"\x1b[{above}A" if above else ""
        return f"{up}\r\x1b[J" + "".join(f"{row}\n" for row in self._drawn)

    def _print(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads any more; the work goes on
            self._stream = None


# --- memory ------------------------------------------------------------------------------------------------------


def memory_in_use(pids: Iterable[int] | None = None) -> int:
    """Bytes of memory that processes hold together: those given, or this one and all that descend from it.

    Memory that several share counts once where the kernel tells (Linux). 0 where nothing tells.
    """
    if not (_PROC / "self").exists():
        return _memory_by_psutil(pids)
    return sum(map(_process_bytes, _family(os.getpid()) if pids is None else pids))


def _family(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            parent = _read(folder / "stat").rpartition(")")[2].split()[1:2]  # the name before it may hold anything
            children.setdefault(int(parent[0]) if parent else 0, []).append(int(folder.name))
    family = [root]
    for pid in family:  # grows while it is walked through
        family += children.get(pid, [])
    return family


def _process_bytes(pid: int) -> int:
    """A process's share of its pages where the kernel tells it, else all its resident pages; 0 once it ended."""
    for row in _read(_PROC / f"{pid}/smaps_rollup").splitlines():
        if row.startswith("Pss:"):
            return int(row.split()[1]) << 10
    pages = _read(_PROC / f"{pid}/statm").split()[1:2]
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _read(path: Path) -> str:
    """The content of a file of the kernel; "" where the process ended meanwhile or is somebody else's."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _memory_by_psutil(pids: Iterable[int] | None) -> int:
    try:
        psutil = importlib.import_module("psutil")  # Ray brings it along
    except ImportError:
        return 0

    def resident(pid: int) -> int:
        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:  # it ended, or is somebody else's
            return 0

    if pids is None:
        here = psutil.Process()
        pids = [here.pid, *(child.pid for child in here.children(recursive=True))]
    return sum(map(resident, pids))
