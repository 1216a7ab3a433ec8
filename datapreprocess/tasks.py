"""Tasks of a run and their executors: threads of this process and Ray workers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from open_lm.errors import DataError, UserError

_MAX_QUEUED_ITEMS = 3  # items of a feed that were generated but not yet consumed
_WAIT_S, _SHORT_WAIT_S = 1.0, 0.1  # wait for a result; the short wait applies while both executors are busy
T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One task: a function, which the worker must be able to import, and its arguments."""

    function: Callable[..., T]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Feed(Generic[T]):
    """A generator task; each item that it yields becomes the last argument of a separate `consumer` task."""

    generator: Callable[..., Iterator[Any]]
    args: tuple[Any, ...]
    consumer: Callable[..., T]
    consumer_args: tuple[Any, ...]


class Queue(Generic[T]):
    """Tasks in order. A feed is passed to Ray as one task, or item by item once this process has started it."""

    def __init__(self, tasks: Iterable[Call[T] | Feed[T]]) -> None:
        self._tasks = iter(tasks)
        self._started: tuple[Feed[T], Iterator[Any]] | None = None

    def next(self) -> Call[T] | Feed[T] | None:
        """Return the next task for Ray, or None at the end."""
        call = self._next_item()
        return call or next(self._tasks, None)

    def next_call(self) -> Call[T] | None:
        """Return the next task for this process, or None at the end."""
        task = self.next()
        while isinstance(task, Feed):
            self._started = (task, task.generator(*task.args))
            task = self.next()
        return task

    def _next_item(self) -> Call[T] | None:
        if self._started is None:
            return None
        feed, items = self._started
        for item in items:
            return Call(feed.consumer, (*feed.consumer_args, item))
        self._started = None
        return None


class TaskAbandoned(Exception):
    """A task whose result is not needed, because the run was interrupted or has failed."""


_thread_state = threading.local()


def raise_if_abandoned() -> None:
    """Raise TaskAbandoned in a thread whose executor is closing. Long tasks must call this regularly."""
    closing: threading.Event | None = getattr(_thread_state, "closing", None)
    if closing is not None and closing.is_set():
        raise TaskAbandoned


class Threads(Generic[T]):
    """An executor with threads of this process; decompression, the tokenizer and numpy release the GIL."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(
            count, thread_name_prefix="unit", initializer=setattr, initargs=(_thread_state, "closing", self._closing)
        )
        self._running: set[Future[T]] = set()

    @property
    def busy(self) -> bool:
        """Whether tasks are running."""
        return bool(self._running)

    def fill(self, queue: Queue[T]) -> None:
        """Start tasks until all threads are busy."""
        while len(self._running) < self._count and (call := queue.next_call()) is not None:
            self._running.add(self._pool.submit(call.function, *call.args))

    def results(self, timeout_s: float) -> Iterator[T]:
        """Yield the results that are ready, after waiting at most `timeout_s` for the first."""
        done, self._running = wait(self._running, timeout_s, FIRST_COMPLETED)
        for future in done:
            yield future.result()

    def close(self) -> None:
        """Abandon the running tasks and wait for their threads."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)


class Session(Generic[T]):
    """An executor with Ray workers. `warming` is true until the first result arrives."""

    def __init__(self, workers: int, cpus: float, *, warming: bool) -> None:
        self._workers, self._cpus, self.warming = workers, cpus, warming
        self._running: list[Any] = []
        self._feeds: dict[Any, Feed[T]] = {}  # running generator -> its feed
        self._items: deque[tuple[Feed[T], Any]] = deque()
        self._remotes: dict[Any, Any] = {}

    @property
    def busy(self) -> bool:
        """Whether tasks are running."""
        return bool(self._running or self._feeds)

    def fill(self, queue: Queue[T]) -> None:
        """Start tasks until all workers are busy."""
        while len(self._running) < self._workers:
            if self._items:
                feed, item = self._items.popleft()
                self._submit(feed.consumer, (*feed.consumer_args, item))
            elif len(self._feeds) > self._workers // 4 or (task := queue.next()) is None:
                break
            elif isinstance(task, Call):
                self._submit(task.function, task.args)
            else:
                self._start_feed(task)

    def results(self, timeout_s: float) -> Iterator[T]:
        """Yield a result if one is ready within `timeout_s`; items of feeds are queued for their consumers."""
        import ray

        feeds = self._feeds if len(self._items) < self._workers else ()
        ready, _ = ray.wait([*self._running, *feeds], num_returns=1, timeout=timeout_s)
        for reference in ready:
            if reference in self._feeds:
                self._receive_item(reference)
            else:
                self._running.remove(reference)
                self.warming = False
                yield _result(reference)

    def close(self) -> None:
        """Cancel the running tasks."""
        import ray

        for reference in [*self._running, *self._feeds]:
            ray.cancel(reference, force=True)

    def _submit(self, function: Callable[..., T], args: tuple[Any, ...]) -> None:
        import ray

        if function not in self._remotes:
            self._remotes[function] = ray.remote(num_cpus=self._cpus, max_retries=5)(function)
        self._running.append(self._remotes[function].remote(*args))

    def _start_feed(self, feed: Feed[T]) -> None:
        import ray

        options = {"num_cpus": 0, "max_retries": 5, "num_returns": "streaming"}
        remote = ray.remote(**options, _generator_backpressure_num_objects=_MAX_QUEUED_ITEMS)(feed.generator)
        self._feeds[remote.remote(*feed.args)] = feed

    def _receive_item(self, generator: Any) -> None:
        try:
            self._items.append((self._feeds[generator], next(generator)))
        except StopIteration:
            del self._feeds[generator]


def ready_results(threads: Threads[T], session: Session[T] | None) -> Iterator[T]:
    """Yield the results of both executors that are ready, after a short wait if there are none."""
    on_ray = session is not None and session.busy
    if threads.busy:
        yield from threads.results(0.0 if on_ray else _SHORT_WAIT_S)
    if session is not None and on_ray:
        yield from session.results(_SHORT_WAIT_S if threads.busy else _WAIT_S)


def _result(reference: Any) -> Any:
    """Return the result of a Ray task; raise a UserError of the task unchanged."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError) as error:
        raise DataError(
            f"a worker process died repeatedly ({type(error).__name__}), most likely because it ran out of memory: "
            "use fewer workers, a lower --memory-limit or a machine with more memory; finished work is kept, and the "
            "same command resumes it"
        ) from error
