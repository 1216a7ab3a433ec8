"""Diagnostics of a running training, in {run}/diagnostics/: traces of steps and snapshots of the memory of devices."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch

from open_lm import storage
from open_lm.config.diagnostics_section import DiagnosticsConfig, parse_steps
from open_lm.distributed.processes import Runtime
from open_lm.monitor.timing import PhaseClock
from open_lm.monitor.watchdog import long_operation

SNAPSHOT_SIGNAL = signal.SIGUSR2
_MAX_RECORDED_ALLOCATIONS = 200_000
_TABLE_ROWS = 60


class Diagnostics:
    """The diagnostics of this rank during its `with` block. They change neither losses nor weights.

    Args:
        cfg: the flags.
        runtime: this rank.
        folder: folder of the files; None for a run without files.
    """

    def __init__(self, cfg: DiagnosticsConfig, runtime: Runtime, folder: str | None) -> None:
        self._runtime, self._folder = runtime, folder
        self._steps = range(0) if cfg.profile_steps is None or folder is None else parse_steps(cfg.profile_steps)
        self._records_memory = cfg.memory_snapshot and runtime.device.type == "cuda" and folder is not None
        self._profiler: torch.profiler.profile | None = None
        self._clock: PhaseClock | None = None
        self._first_step, self._end_step, self._start = 0, 0, 0.0  # traced steps: from first to before end
        self._requested = False
        self._previous_handler: Any = None

    def __enter__(self) -> Diagnostics:
        if self._records_memory:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_RECORDED_ALLOCATIONS)
            if threading.current_thread() is threading.main_thread():
                self._previous_handler = signal.signal(SNAPSHOT_SIGNAL, self._request)
                logging.info(f"kill -USR2 {os.getpid()} writes a memory snapshot of rank {self._runtime.rank}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            with suppress(RuntimeError):  # must not hide the error that ends the run
                self._stop_trace()
            logging.warning("the run was stopped inside --profile-steps: its trace is not written")
        if self._records_memory:
            torch.cuda.memory._record_memory_history(enabled=None)
            if self._previous_handler is not None:
                signal.signal(SNAPSHOT_SIGNAL, self._previous_handler)

    def limit_to(self, total_steps: int) -> None:
        """End the trace after the last step of a run that has fewer steps."""
        self._steps = range(self._steps.start, min(self._steps.stop, total_steps))

    def at_step(self, step: int, clock: PhaseClock) -> None:
        """Start or end the trace, and write a snapshot that was requested. Call it before each step and at the end."""
        if self._profiler is not None and step not in (self._end_step, self._end_step + 1):
            self._stop_trace()
            logging.warning(f"the run went back to step {step}: the trace of --profile-steps starts again")
        if self._profiler is not None:
            self._end_step = step
            if step not in self._steps:
                self._end_trace()
        elif step in self._steps:
            self._start_trace(step, clock)
        if self._requested:
            self._requested = False
            self.write_snapshot(f"memory_step_{step}")

    def write_snapshot(self, name: str) -> str | None:
        """Write a snapshot of the device's memory and return its path; None without --memory-snapshot."""
        if not self._records_memory or self._folder is None:
            return None
        path = storage.join(self._folder, f"{name}_rank_{self._runtime.rank}.pickle")
        try:
            _write_with(torch.cuda.memory._dump_snapshot, path)
        except (OSError, RuntimeError) as error:
            logging.warning(f"cannot write a memory snapshot: {error}")
            return None
        logging.info(f"memory snapshot of rank {self._runtime.rank}: {path}")
        return path

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _start_trace(self, step: int, clock: PhaseClock) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
        self._profiler.start()
        self._first_step = self._end_step = step
        self._start, self._clock, clock.annotates = time.perf_counter(), clock, True

    def _stop_trace(self) -> torch.profiler.profile:
        """Stop the profiler, which waits for the device, and return it."""
        profiler, self._profiler = self._profiler, None
        assert profiler is not None and self._clock is not None
        self._clock.annotates = False
        profiler.stop()
        return profiler

    def _end_trace(self) -> None:
        """Stop the profiler and write its files."""
        assert self._folder is not None
        step = self._end_step
        with long_operation("writing a trace"):
            profiler = self._stop_trace()
            seconds = (time.perf_counter() - self._start) / (step - self._first_step)
            name = f"profile_{self._first_step}-{step}_rank_{self._runtime.rank}"
            path = storage.join(self._folder, f"{name}.json.gz")
            try:
                _write_with(profiler.export_chrome_trace, path)
                storage.write_text(storage.join(self._folder, f"{name}.txt"), self._table(profiler, seconds))
            except (OSError, RuntimeError) as error:
                logging.warning(f"cannot write the trace of --profile-steps: {error}")
                return
        if self._runtime.is_master:
            logging.info(f"traced steps {self._first_step} to {step - 1}: {path} and {name}.txt, one of each per rank")
        self.write_snapshot(f"memory_step_{step}")

    def _table(self, profiler: torch.profiler.profile, seconds: float) -> str:
        """Return a table of the operations, the most expensive first."""
        on_cuda = self._runtime.device.type == "cuda"
        table = profiler.key_averages().table(
            sort_by="self_cuda_time_total" if on_cuda else "self_cpu_time_total",
            row_limit=_TABLE_ROWS,
            max_name_column_width=80,
        )
        return (
            f"Steps {self._first_step} to {self._end_step - 1} on rank {self._runtime.rank} ({self._runtime.device}), "
            f"{seconds:.4f} s per step with the profiler\n{table}\n"
        )


def _write_with(write: Callable[[str], object], path: str) -> None:
    """Write a file atomically with a function that takes the name of a file; with .gz in the name, compressed."""
    with tempfile.TemporaryDirectory() as folder, storage.atomic_write(path) as file:
        temporary = os.path.join(folder, "file")
        write(temporary)
        with open(temporary, "rb") as source:
            if path.endswith(".gz"):
                with gzip.GzipFile(fileobj=file, mode="wb") as compressed:
                    shutil.copyfileobj(source, compressed)
            else:
                shutil.copyfileobj(source, file)
