"""Durations of steps and their phases, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Mean time per step since the last reading, and the time spent waiting for data, in seconds.

    Attributes:
        num_steps: number of steps since the last reading.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._data_s, self.num_steps = 0.0, 0

    def record_step(self, waited_s: float) -> None:
        """Count one step that waited `waited_s` for its batch."""
        self._data_s += waited_s
        self.num_steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the `with` block."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before

    def pop(self) -> tuple[float, float]:
        """Return (data_s, step_s), means over the steps since the last call. Read the device's results first."""
        now = time.perf_counter()
        steps = max(self.num_steps, 1)
        means = (self._data_s / steps, max((now - self._start) / steps, 1e-9))
        self._start, self._data_s, self.num_steps = now, 0.0, 0
        return means


class PhaseClock:
    """The time of each phase of a step on the device: from the host's clock on CPU, from events on CUDA.

    Attributes:
        annotates: whether phases appear by name in the trace of a profiler.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._current: tuple[str, float | torch.cuda.Event] | None = None
        self._unread: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds: dict[str, float] = {}
        self._steps = 0
        self.annotates = False
        self._annotation: torch.profiler.record_function | None = None

    def enter(self, phase: str) -> None:
        """Start `phase` and end the previous phase: operations enqueued from now on belong to it."""
        self._end_phase()
        self._current = (phase, self._now())
        if self.annotates:
            self._annotation = torch.profiler.record_function(f"phase: {phase}")
            self._annotation.__enter__()

    def end_step(self) -> None:
        """End the step and its last phase."""
        self._end_phase()
        self._steps += 1
        while self._unread and self._unread[0][2].query():
            self._read_one()

    def pop(self) -> dict[str, float]:
        """Return the seconds of each phase, means over the steps since the last call. Waits for the device."""
        while self._unread:
            self._unread[0][2].synchronize()
            self._read_one()
        means = {phase: seconds / max(self._steps, 1) for phase, seconds in self._seconds.items()}
        self._seconds, self._steps = {}, 0
        return means

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _end_phase(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if self._current is None:
            return
        (phase, start), end = self._current, self._now()
        self._current = None
        if isinstance(start, float):
            assert isinstance(end, float)
            self._add(phase, end - start)
        else:
            assert isinstance(end, torch.cuda.Event)
            self._unread.append((phase, start, end))

    def _read_one(self) -> None:
        phase, start, end = self._unread.popleft()
        self._add(phase, start.elapsed_time(end) / 1000)

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
