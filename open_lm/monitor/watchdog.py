"""Detect and end a run that hangs, and report the stacks, the collective operations and the progress of all ranks.

The main thread calls `heartbeat(phase)` whenever it makes progress. A watchdog thread on each rank publishes the latest
heartbeat through its own connection to the store, which works while the main thread is blocked in a collective, a read
or a lock. A run hangs if no rank makes progress: as long as one does, the others may be waiting for it.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from open_lm import storage
from open_lm.distributed.processes import Runtime, restart_count
from open_lm.errors import WATCHDOG_EXIT_CODE
from open_lm.monitor import flight_recorder
from open_lm.storage.strict_json import to_json
from open_lm.system.names import ESCAPE_ERRORS

_POLL_S = 1.0
_STORE_TIMEOUT = timedelta(seconds=10)
_GRACE_S = 10.0  # time for the other ranks to write their stacks, or to end on their own after a failure
_WATCHDOG_COUNTER = itertools.count()  # several runs of a process share its store


@dataclass(frozen=True)
class RankStatus:
    """The progress of a rank. `number` counts its published statuses; `remaining_s` is the time until it is overdue."""

    number: int
    step: int
    phase: str
    remaining_s: float


class _Progress:
    """The last heartbeat of this process. Written by the main thread, read by the watchdog thread."""

    def __init__(self) -> None:
        self.step, self.phase = 0, "starting"
        self.time, self.extra_time_s = time.monotonic(), 0.0

    def update(self, phase: str, step: int | None, extra_time_s: float = 0.0) -> None:
        self.step = self.step if step is None else step
        self.phase, self.extra_time_s = phase, extra_time_s
        self.time = time.monotonic()


_progress = _Progress()


def heartbeat(phase: str, step: int | None = None, extra_time_s: float = 0.0) -> None:
    """Record that this process makes progress, the phase that it starts and the step (default: unchanged).

    extra_time_s: time that the phase may take beyond --hang-timeout. The call is cheap, also without a watchdog.
    """
    _progress.update(phase, step, extra_time_s)


def position() -> str:
    """Return the last progress of this process, such as "at step 12 (step)"."""
    return f"at step {_progress.step} ({_progress.phase})"


@contextmanager
def long_operation(phase: str, extra_time_s: float = math.inf) -> Iterator[None]:
    """Allow the operation in the `with` block to take `extra_time_s` beyond --hang-timeout without a heartbeat."""
    previous = _progress.phase
    _progress.update(phase, None, extra_time_s)
    try:
        yield
    finally:
        _progress.update(previous, None)


class Watchdog:
    """A watchdog for this rank during its `with` block; every rank has one.

    If the block ends with an error, the watchdogs of the other ranks end their ranks too, even inside a collective.

    Args:
        timeout_s: the time without a heartbeat after which a rank is overdue; 0 for no limit.
        runtime: this rank.
        folder: where a hanging run writes stacks_rank_N.txt, and flight_recorder_rank_N.json with the last
            collective operations; None: the stacks go only to stderr.
    """

    def __init__(self, timeout_s: float, runtime: Runtime, folder: str | None = None) -> None:
        self._timeout_s = timeout_s or math.inf
        self._poll_s = min(_POLL_S, self._timeout_s / 10)
        self._runtime, self._folder = runtime, folder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._num_published = itertools.count()
        self._last_seen: dict[int, tuple[int, float]] = {}  # by rank: the last number, and when it was first seen

    def __enter__(self) -> Watchdog:
        self._store = _connect_to_store(f"watch_{restart_count()}_{next(_WATCHDOG_COUNTER)}")
        heartbeat("starting")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if kind is not None and self._store is not None:
            first_line = str(error).partition("\n")[0]
            try:
                message = f"rank {self._runtime.rank} failed: {kind.__name__}: {first_line}"
                self._store.compare_set("failed", "", message)  # keep only the first failure, which is the cause
            except dist.DistError:
                pass  # the rank that hosts the store has already ended

    def _watch(self) -> None:
        while not self._done.wait(self._poll_s):
            status = self._local_status()
            report = None
            try:
                report = self._publish(status)
            except dist.DistError:
                self._store = None  # the rank that hosts the store has ended; continue to watch this rank only
            if report is None and self._store is None and status.remaining_s <= 0:
                report = self._hang_report({self._runtime.rank: status})
            if report is not None:
                self._end_process(report)

    def _local_status(self) -> RankStatus:
        remaining_s = self._timeout_s + _progress.extra_time_s - (time.monotonic() - _progress.time)
        return RankStatus(next(self._num_published), _progress.step, _progress.phase, remaining_s)

    def _publish(self, status: RankStatus) -> str | None:
        """Publish this rank's status; return the report of the hang if the run hangs."""
        if self._store is None:
            return None
        # Without a time limit the remaining time is infinite; only `_statuses` reads it.
        self._store.set(f"status/{self._runtime.rank}", json.dumps(asdict(status), allow_nan=True))
        if self._store.check(["failed"]):
            self._end_after_failure(self._store.get("failed").decode())
        if not self._store.check(["hung"]) and status.remaining_s <= self._timeout_s / 2:
            statuses = self._statuses()
            if all(status.remaining_s <= 0 for status in statuses.values()):
                self._store.compare_set("hung", "", self._hang_report(statuses))
        return self._store.get("hung").decode() if self._store.check(["hung"]) else None

    def _statuses(self) -> dict[int, RankStatus]:
        """Return the statuses of all ranks; a rank whose watchdog does not respond runs out of time too."""
        assert self._store is not None
        statuses = {}
        for rank in range(self._runtime.world_size):
            key, now = f"status/{rank}", time.monotonic()
            if self._store.check([key]):
                status = RankStatus(**json.loads(self._store.get(key)))
            else:
                status = RankStatus(-1, 0, "not started", math.inf)
            number, since = self._last_seen.get(rank, (None, now))
            if number != status.number:
                since = now
            self._last_seen[rank] = status.number, since
            silent_s = now - since
            if silent_s > 5 * self._poll_s:
                remaining_s = min(status.remaining_s, self._timeout_s) - silent_s
                status = RankStatus(status.number, status.step, f"{status.phase}; not responding", remaining_s)
            statuses[rank] = status
        return statuses

    def _hang_report(self, statuses: Mapping[int, RankStatus]) -> str:
        """Describe the progress of all ranks, the smallest group of ranks first."""
        groups: dict[tuple[int, str], list[int]] = {}
        for rank, status in sorted(statuses.items()):
            groups.setdefault((status.step, status.phase), []).append(rank)
        positions = [
            f"{_format_ranks(ranks)} at step {step} ({phase})"
            for (step, phase), ranks in sorted(groups.items(), key=lambda item: len(item[1]))
        ]
        stacks = f"; the stacks and the last collective operations are in {self._folder}" if self._folder else ""
        return (
            f"the run hangs: no rank made progress for {self._timeout_s:g} s (--hang-timeout). Last progress: "
            f"{', '.join(positions)}{stacks}"
        )

    def _end_process(self, report: str) -> NoReturn:
        """Write this rank's stacks and exit.

        The main thread may hold any lock. Therefore nothing here uses logging or sys.stderr, and whatever could block
        runs in a thread with a time limit.
        """
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = f"rank {self._runtime.rank}, {_progress.phase}, step {_progress.step}\n{file.read().decode()}"
        os.write(2, f"{stacks}error: {report}\n".encode("utf-8", ESCAPE_ERRORS))
        writer = threading.Thread(target=self._write_diagnostics, args=(f"{report}\n\n{stacks}",), daemon=True)
        writer.start()
        writer.join(_GRACE_S)
        os._exit(WATCHDOG_EXIT_CODE)

    def _write_diagnostics(self, text: str) -> None:
        """Write the files of the folder and wait until all ranks have: a launcher ends all ranks after the first."""
        if self._folder is not None:
            rank = self._runtime.rank
            stacks = storage.join(self._folder, f"stacks_rank_{rank}.txt")
            storage.write_text(stacks, text)  # first: the recorder may hang too
            records = flight_recorder.read_records()
            path = storage.join(self._folder, f"flight_recorder_rank_{rank}.json")
            storage.write_text(path, to_json(records, indent=1))
            if lines := flight_recorder.describe_pending(records):
                storage.write_text(stacks, "\n".join([text, "Collective operations", *lines, ""]))
            if (record := flight_recorder.nccl_record()) is not None:
                storage.write_bytes(storage.join(self._folder, f"nccl_trace_rank_{rank}"), record)
        if self._store is not None:
            written = self._store.add("written", 1)
            while written < self._runtime.world_size:
                time.sleep(_POLL_S / 10)
                written = self._store.add("written", 0)

    def _end_after_failure(self, failure: str) -> None:
        """Exit after another rank has failed, unless this rank ends on its own or by its launcher in time."""
        if not self._done.wait(_GRACE_S):
            os.write(2, f"error: {failure}; rank {self._runtime.rank} ends too\n".encode("utf-8", ESCAPE_ERRORS))
            os._exit(1)


def _connect_to_store(prefix: str) -> dist.Store | None:
    """Open a separate connection to the process group's store; return None if there is no store shared by processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    connection = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    return dist.PrefixStore(prefix, connection)


def _format_ranks(ranks: list[int]) -> str:
    """Format ranks as "rank 3" or "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][-1:] = [rank] if len(runs[-1]) > 1 else [runs[-1][0], rank]
        else:
            runs.append([rank])
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join("-".join(map(str, run)) for run in runs)
