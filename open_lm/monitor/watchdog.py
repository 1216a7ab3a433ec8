"""Ends a run that hangs, with the stacks of all ranks and a word on which of them stands where.

The main thread says `beat(phase)` wherever it gets on; a thread of each rank publishes that through a store of its own
connection, so that it works while the main thread is stuck in a collective, a read or a lock. A run hangs when no rank
gets on: as long as one does, the others may well be waiting for it.
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

import torch.distributed as dist

from open_lm import storage
from open_lm.distributed.processes import Runtime, restart_count
from open_lm.errors import HUNG

_POLL_S = 1.0
_STORE_TIMEOUT = timedelta(seconds=10)
_OTHERS_S = 10.0  # what a rank leaves the others to write their stacks, or to end by themselves after a failure
_WATCHES = itertools.count()  # several runs of a process share its store


@dataclass(frozen=True)
class Stand:
    """Where a rank stands. `number` counts what it has published, `remaining_s` until its next beat is overdue."""

    number: int
    step: int
    phase: str
    remaining_s: float


class _Progress:
    """The last beat of this process. Written by the main thread, read by the watchdog's."""

    def __init__(self) -> None:
        self.step, self.phase = 0, "starting"
        self.at, self.allowed_s = time.monotonic(), 0.0

    def heartbeat(self, phase: str, step: int | None, allowed_s: float = 0.0) -> None:
        self.step = self.step if step is None else step
        self.phase, self.allowed_s = phase, allowed_s
        self.at = time.monotonic()


_progress = _Progress()


def heartbeat(phase: str, step: int | None = None, extra_time_s: float = 0.0) -> None:
    """Say that this process gets on, with what it begins to do now and in which step (default: as before).

    allow_s: seconds that this may take beyond --hang-timeout. Costs nothing, also where no watchdog runs.
    """
    _progress.heartbeat(phase, step, extra_time_s)


@contextmanager
def long_operation(phase: str, extra_time_s: float = math.inf) -> Iterator[None]:
    """Something that may take a long time without a beat: for `extra_time_s` seconds beyond --hang-timeout it does not count
    as hanging."""
    before = _progress.phase
    _progress.heartbeat(phase, None, allowed_s=extra_time_s)
    try:
        yield
    finally:
        _progress.heartbeat(before, None)


class Watchdog:
    """Watches this rank while its `with` block lasts; every rank has one.

    timeout_s: without a beat, 0 for any. folder: gets rank_N.txt with the stacks of a hanging run; None: stderr alone.
    A block that ends with an error tells the other ranks, which then end too, be they in a collective.
    """

    def __init__(self, timeout_s: float, runtime: Runtime, folder: str | None = None) -> None:
        self._timeout_s = timeout_s or math.inf
        self._poll_s = min(_POLL_S, self._timeout_s / 10)
        self._runtime, self._folder = runtime, folder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._published = itertools.count()
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: the last number, and when it was first seen

    def __enter__(self) -> Watchdog:
        self._store = _own_store(f"watch_{restart_count()}_{next(_WATCHES)}")
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
                said = f"rank {self._runtime.rank} failed: {kind.__name__}: {first_line}"
                self._store.compare_set("failed", "", said)  # the first is the cause
            except dist.DistError:
                pass  # the rank that kept the store has ended before

    def _watch(self) -> None:
        while not self._done.wait(self._poll_s):
            own = self._stand()
            verdict = None
            try:
                verdict = self._exchange(own)
            except dist.DistError:
                self._store = None  # its host has left, well or not; each rank goes on watching itself
            if verdict is None and self._store is None and own.remaining_s <= 0:
                verdict = self._verdict({self._runtime.rank: own})
            if verdict is not None:
                self._end(verdict)

    def _stand(self) -> Stand:
        remaining_s = self._timeout_s + _progress.allowed_s - (time.monotonic() - _progress.at)
        return Stand(next(self._published), _progress.step, _progress.phase, remaining_s)

    def _exchange(self, own: Stand) -> str | None:
        """Publish `own` stand; what this run ends with, if it does."""
        if self._store is None:
            return None
        self._store.set(f"stand/{self._runtime.rank}", json.dumps(asdict(own)))
        if self._store.check(["failed"]):
            self._leave_after(self._store.get("failed").decode())
        if not self._store.check(["hung"]) and own.remaining_s <= self._timeout_s / 2:
            stands = self._stands()
            if all(stand.remaining_s <= 0 for stand in stands.values()):
                self._store.compare_set("hung", "", self._verdict(stands))
        return self._store.get("hung").decode() if self._store.check(["hung"]) else None

    def _stands(self) -> dict[int, Stand]:
        """All ranks' stands; one whose process is silent does not get on either, and its time runs out."""
        assert self._store is not None
        stands = {}
        for rank in range(self._runtime.world_size):
            key, now = f"stand/{rank}", time.monotonic()
            known = self._store.check([key])
            stand = Stand(**json.loads(self._store.get(key))) if known else Stand(-1, 0, "not started", math.inf)
            number, since = self._seen.get(rank, (None, now))
            if number != stand.number:
                since = now
            self._seen[rank] = stand.number, since
            silent_s = now - since
            remaining_s = min(stand.remaining_s, self._timeout_s) - silent_s if silent_s > 5 * self._poll_s else stand.remaining_s
            phase = f"{stand.phase}; its process is silent" if silent_s > 5 * self._poll_s else stand.phase
            stands[rank] = Stand(stand.number, stand.step, phase, remaining_s)
        return stands

    def _verdict(self, stands: Mapping[int, Stand]) -> str:
        """Who stands where, those first that are fewest."""
        groups: dict[tuple[int, str], list[int]] = {}
        for rank, stand in sorted(stands.items()):
            groups.setdefault((stand.step, stand.phase), []).append(rank)
        parts = [
            f"{_ranks(ranks)} at step {step} ({phase})"
            for (step, phase), ranks in sorted(groups.items(), key=lambda item: len(item[1]))
        ]
        where = f"; the stacks are in {self._folder}" if self._folder else ""
        return (
            f"the run hangs: no rank got on for {self._timeout_s:g} s (--hang-timeout). Standing: {', '.join(parts)}"
            f"{where}"
        )

    def _end(self, verdict: str) -> None:
        """Write this rank's stacks and leave. The main thread may hold any lock, so nothing here goes through logging
        or sys.stderr, and what could block has a thread and a limit."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = f"rank {self._runtime.rank}, {_progress.phase}, step {_progress.step}\n{file.read().decode()}"
        os.write(2, f"{stacks}error: {verdict}\n".encode())
        last = threading.Thread(target=self._keep, args=(f"{verdict}\n\n{stacks}",), daemon=True)
        last.start()
        last.join(_OTHERS_S)
        os._exit(HUNG)

    def _keep(self, text: str) -> None:
        """Write the stacks to the folder, and wait until all ranks have: a launcher ends all with the first."""
        if self._folder is not None:
            storage.write_text(storage.join(self._folder, f"rank_{self._runtime.rank}.txt"), text)
        if self._store is not None:
            written = self._store.add("written", 1)
            while written < self._runtime.world_size:
                time.sleep(_POLL_S / 10)
                written = self._store.add("written", 0)

    def _leave_after(self, failure: str) -> None:
        """Another rank has failed: end too, unless this one does so by itself, with an error of its own or by its
        launcher, in the time that is left to it."""
        if not self._done.wait(_OTHERS_S):
            os.write(2, f"error: {failure}; rank {self._runtime.rank} ends too\n".encode())
            os._exit(1)


def _own_store(prefix: str) -> dist.Store | None:
    """A connection of its own to the process group's store; None without a store that other processes see."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    own = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    return dist.PrefixStore(prefix, own)


def _ranks(ranks: list[int]) -> str:
    """ "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][-1:] = [rank] if len(runs[-1]) > 1 else [runs[-1][0], rank]
        else:
            runs.append([rank])
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join("-".join(map(str, run)) for run in runs)
