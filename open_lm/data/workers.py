"""Worker processes of a torch DataLoader: signals, and the death of a worker or of the main process."""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import TypeVar

from torch.utils.data import DataLoader

from open_lm.errors import STOP_SIGNALS, DataError

_PARENT_POLL_S = 2.0
_UNKNOWN_SENDER_GRACE_S = 60.0  # time for the main process to save and end after a signal to all processes
T = TypeVar("T")


class _SharedFlag:
    """The part of multiprocessing.Event that torch uses to end its workers, without a lock.

    A worker that is killed while it holds the lock of an Event never releases it, and the main process waits forever.
    """

    def __init__(self, context: BaseContext) -> None:
        self._value = context.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


def _worker_context() -> BaseContext:
    """Return the default multiprocessing context with events that have no lock."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = lambda: _SharedFlag(context)  # type: ignore[assignment, method-assign, return-value]
    return context


def iterate_workers(loader: DataLoader[T]) -> Iterator[T]:
    """Yield the loader's results. DataError for a worker that died, when its result is awaited.

    torch would raise from a signal handler, at any point of the main process. Its loader also checks its workers every
    few seconds, which is soon enough.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    if loader.num_workers:
        loader.multiprocessing_context = _worker_context()
    with _blocked_signals():
        iterator = iter(loader)
    if in_main_thread and loader.num_workers:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    death = ""
    while not death:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            death = str(error)
    del iterator  # ends the other workers; an error raised from its frames would keep it alive
    raise DataError(
        f"{death}: a data-loading process was killed from outside; if memory ran out (the kernel log names the "
        "processes it kills for that), use fewer --workers or smaller shards"
    )


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Start processes that ignore the signals that ask a run to save and stop.

    A scheduler may send those signals to every process of the job, but only the main process handles them. Its own
    signals are delivered when the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_with_parent(_worker: int) -> None:
    """End this worker on a SIGTERM from the main process, or when the main process dies.

    The worker's signals are blocked, and without a main process it would wait forever to send its next batch.
    """
    main = multiprocessing.parent_process()
    assert main is not None and main.pid is not None
    wait = _wait_for_sigterm if hasattr(signal, "sigtimedwait") else _poll_for_sigterm

    def exit_after(parent: int) -> None:
        wait(parent)
        os._exit(0)

    threading.Thread(target=exit_after, args=(main.pid,), daemon=True).start()


def _wait_for_sigterm(parent: int) -> None:
    """Return after a SIGTERM from the parent, or when it has died; ignore those of other processes."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _PARENT_POLL_S)
        if received is not None and received.si_pid == parent:
            return


def _poll_for_sigterm(parent: int) -> None:
    """Do the same on macOS, which does not tell the sender of a blocked signal.

    If it is not the parent, the parent received the signal too. It then ends by itself, usually within the grace time.
    """
    end = math.inf
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(_PARENT_POLL_S)
        if signal.SIGTERM in signal.sigpending():
            end = min(end, time.monotonic() + _UNKNOWN_SENDER_GRACE_S)
