"""Tasks of a run and what does them: threads of this process, and Ray's workers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from open_lm.errors import DataError, UserError

_WAITING_ITEMS = 3  # of a feed, between the task that makes them and the tasks that take them
_TICK_S, _GLANCE_S = 1.0, 0.1  # how long to wait for one of them, and for one where the other may have something too
T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One task: a plain function, which must be importable where it runs, and its arguments."""

    function: Callable[..., T]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Feed(Generic[T]):
    """A task that yields items, each of which becomes the last argument of a task of its own."""

    generator: Callable[..., Iterator[Any]]
    args: tuple[Any, ...]
    consumer: Callable[..., T]
    consumer_args: tuple[Any, ...]


class Queue(Generic[T]):
    """Tasks in their order. A feed is given out whole to Ray, or item by item once it was begun in this process."""

    def __init__(self, tasks: Iterable[Call[T] | Feed[T]]) -> None:
        self._tasks = iter(tasks)
        self._begun: tuple[Feed[T], Iterator[Any]] | None = None

    def next(self) -> Call[T] | Feed[T] | None:
        """The next task, for Ray."""
        call = self._next_item()
        return call or next(self._tasks, None)

    def next_call(self) -> Call[T] | None:
        """The next task, for this process."""
        task = self.next()
        while isinstance(task, Feed):
            self._begun = (task, task.generator(*task.args))
            task = self.next()
        return task

    def _next_item(self) -> Call[T] | None:
        if self._begun is None:
            return None
        feed, items = self._begun
        for item in items:
            return Call(feed.consumer, (*feed.consumer_args, item))
        self._begun = None
        return None


class TaskAbandoned(Exception):
    """Nobody waits any more for what this thread does."""


_of_thread = threading.local()


def raise_if_abandoned() -> None:
    """For tasks to call now and then: ends them, in a thread whose run was interrupted or has failed elsewhere."""
    closing: threading.Event | None = getattr(_of_thread, "closing", None)
    if closing is not None and closing.is_set():
        raise TaskAbandoned


class Threads(Generic[T]):
    """Tasks in threads of this process: what takes time in them (decompression, tokenizer, numpy) lets others run."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(
            count, thread_name_prefix="unit", initializer=setattr, initargs=(_of_thread, "closing", self._closing)
        )
        self._running: set[Future[T]] = set()

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def fill(self, queue: Queue[T]) -> None:
        while len(self._running) < self._count and (call := queue.next_call()) is not None:
            self._running.add(self._pool.submit(call.function, *call.args))

    def results(self, timeout_s: float) -> Iterator[T]:
        done, self._running = wait(self._running, timeout_s, FIRST_COMPLETED)
        for future in done:
            yield future.result()

    def close(self) -> None:
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)


class Session(Generic[T]):
    """Tasks on Ray. It is warming until the first result of a worker comes."""

    def __init__(self, workers: int, cpus: float, *, warming: bool) -> None:
        self._workers, self._cpus, self.warming = workers, cpus, warming
        self._running: list[Any] = []
        self._feeds: dict[Any, Feed[T]] = {}  # what yields items -> whom they are for
        self._fed: deque[tuple[Feed[T], Any]] = deque()
        self._remotes: dict[Any, Any] = {}

    @property
    def busy(self) -> bool:
        return bool(self._running or self._feeds)

    def fill(self, queue: Queue[T]) -> None:
        """Start tasks while workers are free."""
        while len(self._running) < self._workers:
            if self._fed:
                feed, item = self._fed.popleft()
                self._submit(feed.consumer, (*feed.consumer_args, item))
            elif len(self._feeds) > self._workers // 4 or (task := queue.next()) is None:
                break
            elif isinstance(task, Call):
                self._submit(task.function, task.args)
            else:
                self._open(task)

    def results(self, timeout_s: float) -> Iterator[T]:
        import ray

        feeds = self._feeds if len(self._fed) < self._workers else ()
        ready, _ = ray.wait([*self._running, *feeds], num_returns=1, timeout=timeout_s)
        for reference in ready:
            if reference in self._feeds:
                self._take_item(reference)
            else:
                self._running.remove(reference)
                self.warming = False
                yield _result(reference)

    def close(self) -> None:
        import ray

        for reference in [*self._running, *self._feeds]:
            ray.cancel(reference, force=True)

    def _submit(self, function: Callable[..., T], args: tuple[Any, ...]) -> None:
        import ray

        if function not in self._remotes:
            self._remotes[function] = ray.remote(num_cpus=self._cpus, max_retries=5)(function)
        self._running.append(self._remotes[function].remote(*args))

    def _open(self, feed: Feed[T]) -> None:
        import ray

        options = {"num_cpus": 0, "max_retries": 5, "num_returns": "streaming"}
        remote = ray.remote(**options, _generator_backpressure_num_objects=_WAITING_ITEMS)(feed.generator)
        self._feeds[remote.remote(*feed.args)] = feed

    def _take_item(self, generator: Any) -> None:
        try:
            self._fed.append((self._feeds[generator], next(generator)))
        except StopIteration:
            del self._feeds[generator]


def finished(threads: Threads[T], session: Session[T] | None) -> Iterator[T]:
    """The results that are ready, after a moment's wait if none is."""
    on_ray = session is not None and session.busy
    if threads.busy:
        yield from threads.results(0.0 if on_ray else _GLANCE_S)
    if session is not None and on_ray:
        yield from session.results(_GLANCE_S if threads.busy else _TICK_S)


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError) as error:
        raise DataError(
            f"a worker process died again and again ({type(error).__name__}), most likely for want of memory: "
            "use fewer workers, a lower --memory-limit or a machine with more memory; finished work is kept, the same "
            "command goes on with it"
        ) from error
