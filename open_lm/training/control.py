"""What a run is asked from outside while it trains: to stop, by a signal; to save, by the clock.

Ranks learn it at different moments, so each puts what it knows into the sum over ranks that a step makes anyway; what
comes out is the same on all of them, and so is the step at which they act on it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a scheduler's or launcher's last word, and its early warning


@dataclass(frozen=True)
class Agreed:
    """What all ranks know alike after a step: the run is to stop, to save, or to go back to its newest checkpoint."""

    stop: bool = False
    save: bool = False
    rollback: bool = False


class RunControl:
    """Takes the stop signals while its `with` block lasts, if that is entered in the main thread; the handlers of
    before are back afterwards. That torchrun has gone, which would have ended its ranks, counts as such a signal.

    save_every_minutes: 0 for never; only the master's clock counts. clock: seconds, ever rising.
    """

    def __init__(
        self, is_master: bool = True, save_every_minutes: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = 60 * save_every_minutes if is_master else 0.0
        self._clock, self._last_save = clock, clock()
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._received: int | None = None
        self._announced = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> RunControl:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # Nothing more: a handler runs in the middle of whatever the main thread does, be it writing to the log.
        if self._received is None:
            self._received = number

    def wishes(self) -> tuple[int, int]:
        """(stop, save), each 0 or 1, as this rank knows it before a step. A due save is told once; the clock starts
        anew."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        stop = orphaned or self._received is not None
        if stop and not self._announced:
            self._announced = True
            why = "the launcher has gone" if self._received is None else f"received {_name(self._received)}"
            logging.info(f"{why}: saving and stopping after this step")
        save = self._interval_s > 0 and self._clock() - self._last_save >= self._interval_s
        if save:
            self._last_save = self._clock()
        return int(stop), int(save)


def _name(number: int) -> str:
    return signal.Signals(number).name
