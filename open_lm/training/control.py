"""Requests to a running training: stop (signals, Ctrl-C) and save (clock).

Ranks notice a request at different moments. Each rank adds its requests to the sum over ranks that every step makes
anyway; all ranks see the same result and act at the same step.
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

from open_lm.errors import STOP_SIGNALS

_INTERRUPTED = b"interrupted: saving and stopping after this step; interrupt again (Ctrl-C) to end without saving\n"


@dataclass(frozen=True)
class Decision:
    """What all ranks decided after a step: stop the run, save, or roll back to the newest checkpoint."""

    stop: bool = False
    save: bool = False
    rollback: bool = False


class RunControl:
    """A receiver of stop signals inside its `with` block, which also reports due saves.

    Installs signal handlers only in the main thread and restores the previous ones at exit. The end of the torchrun
    process that started this rank counts as a stop signal: torchrun would have ended the rank.

    A first interrupt (Ctrl-C) is a stop signal too; a second one ends the process at once.

    Args:
        save_every_minutes: 0 for never. Only the master's clock counts.
        clock: monotonic time in seconds.
    """

    def __init__(
        self, is_master: bool = True, save_every_minutes: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._is_master = is_master
        self._interval_s = 60 * save_every_minutes if is_master else 0.0
        self._clock, self._last_save = clock, clock()
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._received: int | None = None
        self._announced = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> RunControl:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # Only set a flag: the handler interrupts the main thread anywhere, even while it writes to the log.
        if self._received is None:
            self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # also ends a process that waits for other ranks
            if self._is_master:
                os.write(2, _INTERRUPTED)  # not through the log or a buffered stream, which this may interrupt

    def is_stopped(self) -> bool:
        """Return whether this rank has received a stop signal."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        return orphaned or self._received is not None

    def requests(self) -> tuple[int, int]:
        """Return this rank's requests before a step: (stop, save), each 0 or 1.

        Reporting a due save restarts the clock.
        """
        stop = self.is_stopped()
        if stop and not self._announced:
            self._announced = True
            name = None if self._received is None else signal.Signals(self._received).name
            reason = "the launcher has exited" if name is None else f"received {name}"
            logging.info(f"{reason}: saving and stopping after this step")
        save = self._interval_s > 0 and self._clock() - self._last_save >= self._interval_s
        if save:
            self._last_save = self._clock()
        return int(stop), int(save)
