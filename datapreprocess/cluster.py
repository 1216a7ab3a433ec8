"""Ray at arm's length: start or join it, run plain functions on it with a bounded number in flight, leave it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

import open_lm
from open_lm.errors import ConfigError, DataError, UserError

_logger = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 256 << 20  # sequences go through the work folder; the store holds only what is fed to tasks
_WAITING_ITEMS = 3  # of a feed, between the task that makes them and the tasks that take them
_KNOCK_S = 10.0
_LOCAL = "local"  # Ray's own word for a session of this machine
_TICK_S = 1.0
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


class Shared(Generic[T]):
    """A value that many tasks need: it is sent to each worker process once, not with every task."""

    _received: ClassVar[dict[str, Any]] = {}

    def __init__(self, value: T) -> None:
        self._value = value
        self._key = uuid.uuid4().hex
        self._reference: Any = None

    def get(self) -> T:
        """The value."""
        return self._value

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import ray

        if self._reference is None:
            self._reference = ray.put(self._value)
        return _receive, (self._key, [self._reference])


def _receive(key: str, reference: list[Any]) -> Shared[Any]:
    """A Shared as a worker sees it; the value is fetched by the first task that brings it."""
    import ray

    if key not in Shared._received:
        shared = Shared(ray.get(reference[0]))
        shared._key = key
        Shared._received[key] = shared
    found: Shared[Any] = Shared._received[key]
    return found


class Cluster:
    """A Ray session: the running one of this process, the one at `address`, or a local one of our own.

    A local Ray takes seconds to start; it does so beside this thread, and until it is there `run` works in this
    process. With `alone` and no address it is not started at all, and all is done in this process: for work that takes
    less time than the start. What was started here is stopped at the end of the `with`, also after an error; what was
    found is left as it was.
    """

    def __init__(
        self,
        workers: int | None,
        address: str | None = None,
        options: dict[str, Any] | None = None,
        *,
        alone: bool = False,
    ) -> None:
        self._wanted, self._address, self._options, self._alone = workers, address, dict(options or {}), alone
        self._owned = False
        # Ray's processes end with the thread that started them, so that thread lives as long as they are needed.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._start: Future[Any] | None = None
        self._cpus_per_task = 1.0
        self.workers = 1
        self.workers_per_machine = 1

    def __enter__(self) -> Cluster:
        if _initialized():
            self._alone = False
        elif self._address not in (None, _LOCAL):
            self._alone, self._owned = False, True
            self._join(str(self._address))
        elif not self._alone or self._address == _LOCAL:
            self._alone, self._owned = False, True
            self.workers = self.workers_per_machine = local_workers(self._wanted)
            _logger.info("starting Ray on this machine with %d workers", self.workers)
            self._start = self._thread.submit(self._start_local)
            return self
        if not self._alone:
            import ray

            machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            self.workers = min(self._wanted or sum(machines), max(1, sum(machines)))
            self.workers_per_machine = min(self.workers, max(1, *machines))
        return self

    def limit_workers(self, per_machine: int) -> None:
        """Run no more tasks than this at a time on any machine."""
        share = self.workers_per_machine / per_machine
        self._cpus_per_task *= share
        self.workers, self.workers_per_machine = max(1, int(self.workers / share)), per_machine

    def _start_local(self) -> None:
        import ray

        defaults: dict[str, Any] = {
            "num_cpus": self.workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        # The processes of a local Ray inherit the environment, which spares them Ray's slower way of setting it.
        with _environment(
            PYTHONPATH=_python_path(), RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"
        ):
            ray.init(address=_LOCAL, **{**defaults, **self._options})

    def _join(self, address: str) -> None:
        import ray

        _knock(address)
        environment = {"env_vars": {"PYTHONPATH": _python_path()}}
        try:
            ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            ray.shutdown()
            raise _no_cluster(address, str(error).strip().partition("\n")[0]) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owned:
            import ray

            self._thread.submit(ray.shutdown).result()
        self._thread.shutdown()

    @property
    def _ready(self) -> bool:
        """Whether tasks can go to Ray."""
        return not self._alone and (self._start is None or self._start.done())

    def run(self, tasks: Iterable[Call[T] | Feed[T]], tick: Callable[[], None] | None = None) -> Iterator[T]:
        """Do all tasks, as many at a time as there are workers; results come as they are ready.

        `tick` is called about every second. A UserError of a worker is raised as it was; tasks whose worker or node
        died are tried again.
        """
        waiting = iter(tasks)
        for task in waiting:
            if self._ready or (not self._alone and isinstance(task, Feed)):
                if self._start:
                    self._start.result()
                session = _Session(
                    self.workers, self._cpus_per_task, _chain(task, waiting), tick, warming=self._start is not None
                )
                yield from session.results()
                return
            for result in _here(task):
                yield result
                if tick:
                    tick()


def _here(task: Call[T] | Feed[T]) -> Iterator[T]:
    """The results of a task that is done in this process."""
    if isinstance(task, Call):
        yield task.function(*task.args)
    else:
        for item in task.generator(*task.args):
            yield task.consumer(*task.consumer_args, item)


def _chain(first: T, rest: Iterator[T]) -> Iterator[T]:
    yield first
    yield from rest


class _Session(Generic[T]):
    """The tasks of one `run` on Ray; while its workers are `warming` up, this process goes on working too."""

    def __init__(
        self,
        workers: int,
        cpus: float,
        tasks: Iterator[Call[T] | Feed[T]],
        tick: Callable[[], None] | None,
        *,
        warming: bool,
    ) -> None:
        self._workers, self._cpus, self._tasks, self._tick, self._warming = workers, cpus, tasks, tick, warming
        self._running: list[Any] = []
        self._feeds: dict[Any, Feed[T]] = {}  # what yields items -> whom they are for
        self._fed: deque[tuple[Feed[T], Any]] = deque()
        self._remotes: dict[Any, Any] = {}

    def results(self) -> Iterator[T]:
        import ray

        try:
            while self._fill() or self._feeds:
                feeds = self._feeds if len(self._fed) < self._workers else ()
                timeout = 0 if self._warming else _TICK_S
                ready, _ = ray.wait([*self._running, *feeds], num_returns=1, timeout=timeout)
                if self._tick:
                    self._tick()
                if not ready and self._warming:
                    yield from self._next_here()
                for reference in ready:
                    if reference in self._feeds:
                        self._take_item(reference)
                    else:
                        self._running.remove(reference)
                        self._warming = False
                        yield _result(reference)
        finally:
            for reference in [*self._running, *self._feeds]:
                ray.cancel(reference, force=True)

    def _next_here(self) -> Iterator[T]:
        task = next(self._tasks, None)
        if isinstance(task, Call):
            yield from _here(task)
        else:
            self._warming = False
            if task:
                self._open(task)

    def _fill(self) -> bool:
        """Start tasks while workers are free; whether any runs."""
        while len(self._running) < self._workers:
            if self._fed:
                feed, item = self._fed.popleft()
                self._submit(feed.consumer, (*feed.consumer_args, item))
            elif len(self._feeds) > self._workers // 4 or (task := next(self._tasks, None)) is None:
                break
            elif isinstance(task, Call):
                self._submit(task.function, task.args)
            else:
                self._open(task)
        return bool(self._running)

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


def _initialized() -> bool:
    """Whether this process has a Ray session; importing Ray only to ask would take a second."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _knock(address: str) -> None:
    """Ray itself tries for minutes; a closed port is told at once."""
    match = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match.group(1), int(match.group(2))), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"--ray-address {address}: no Ray cluster answers there ({reason}); start one with `ray start --head`, "
        "or leave the flag out to have a local Ray started. A cluster that asks for tokens is joined with "
        "RAY_AUTH_MODE=token in the environment"
    )


def _python_path() -> str:
    """Where workers look for packages: where this process found this one, and then as it does."""
    root = str(Path(open_lm.__file__).resolve().parents[1])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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


def local_workers(wanted: int | None) -> int:
    """Worker processes on this machine: as many as wanted, but no more than it has processors to offer."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted and wanted > available:
        _logger.info("%d workers are asked for; %d processors are there, so %d are used", wanted, available, available)
    return min(wanted or available, available)
