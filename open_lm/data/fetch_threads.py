"""Background threads that fetch the parts of shards."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from open_lm.storage import run_in_background

T = TypeVar("T")


class FetchThreads:
    """At most `limit` daemon threads that run actions in the order of their submission, and end when none is left."""

    def __init__(self, limit: int) -> None:
        self._limit, self._num_running, self._lock = limit, 0, threading.Lock()
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def __reduce__(self) -> tuple[Any, ...]:
        """Send only the limit to another process, which starts its own threads."""
        return FetchThreads, (self._limit,)

    def submit(self, action: Callable[[], T], *, first: bool = False) -> Future[T]:
        """Run an action after those submitted before, or `first` of those that wait, and return its future."""
        future = Future[T]()
        with self._lock:
            (self._queue.appendleft if first else self._queue.append)((future, action))
            if self._num_running == self._limit:
                return future
            self._num_running += 1
        run_in_background(self._run)
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._num_running -= 1
                    return
                future, action = self._queue.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action())
                except BaseException as error:
                    future.set_exception(error)
            del future, action  # they may refer to an open shard
