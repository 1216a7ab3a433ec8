"""Run functions on Ray with a limited number of tasks in flight; join a Ray session, or start and stop one."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

import open_lm
from open_lm.datapreprocess.tasks import Call, Feed, Queue, Session, Threads, ready_results
from open_lm.errors import ConfigError
from open_lm.system.cpus import available_cpus

_logger = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 256 << 20  # only for feed items and shared values; sequences are exchanged in the work folder
_CONNECT_TIMEOUT_S = 10.0
_LOCAL = "local"  # Ray's address for starting a session on this machine
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # a worker has one CPU
T = TypeVar("T")


class Shared(Generic[T]):
    """A value that many tasks use. It is sent to each worker process once instead of with every task."""

    _received: ClassVar[dict[str, Any]] = {}

    def __init__(self, value: T) -> None:
        self._value = value
        self._key = uuid.uuid4().hex
        self._reference: Any = None

    def get(self) -> T:
        """Return the value."""
        return self._value

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import ray

        if self._reference is None:
            self._reference = ray.put(self._value)
        return _receive, (self._key, [self._reference])


def _receive(key: str, reference: list[Any]) -> Shared[Any]:
    """Return a worker's copy of a Shared; the first task that uses it fetches the value."""
    import ray

    if key not in Shared._received:
        shared = Shared(ray.get(reference[0]))
        shared._key = key
        Shared._received[key] = shared
    received: Shared[Any] = Shared._received[key]
    return received


class _LocalRay:
    """A Ray session on this machine, started and stopped in a background thread.

    Ray's processes end with the thread that started them, so the thread lives as long as the session. It is a daemon:
    an interrupted process can exit without waiting for a start to complete.
    """

    _threads: ClassVar[list[threading.Thread]] = []

    @classmethod
    def join_interrupted(cls) -> None:
        """Wait until the sessions that interrupted runs of this process were starting are stopped."""
        while cls._threads:
            cls._threads.pop().join()

    def __init__(self, workers: int, options: dict[str, Any]) -> None:
        self._workers, self._options = workers, options
        self._started: Future[None] = Future()
        self._stop_requested = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the start is complete; raises the error if it failed."""
        if self._started.done():
            self._started.result()
        return self._started.done()

    def stop(self, *, wait_for_start: bool) -> None:
        """Stop Ray and wait for that. If Ray is still starting and `wait_for_start` is false, return at once."""
        self._stop_requested.set()
        if self._started.done() or wait_for_start:
            self._thread.join()
        else:
            self._threads.append(self._thread)

    def _run(self) -> None:
        try:
            self._start()
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            self._started.set_exception(
                ConfigError(
                    f"Ray could not be started on this machine ({reason}); check the free space of its temporary "
                    "folder and the logs there. Finished work is kept, and the same command resumes it"
                )
            )
        else:
            self._started.set_result(None)
            self._stop_requested.wait()
        finally:
            if _initialized():
                sys.modules["ray"].shutdown()

    def _start(self) -> None:
        import ray

        defaults: dict[str, Any] = {
            "num_cpus": self._workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        # The processes of a local Ray inherit the environment, which is faster than a Ray runtime environment.
        with _environment(
            PYTHONPATH=_python_path(),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
            **_ONE_THREAD,
        ):
            ray.init(address=_LOCAL, **{**defaults, **self._options})


class Cluster:
    """A Ray session: the existing one of this process, the one at `address`, or a new local one.

    A local Ray takes seconds to start. It starts in the background, and `run` uses threads of this process until Ray
    returns its first result. With `threads_only` and no address Ray is not started and all tasks run in threads, which
    is faster for jobs that take less time than the start. On exit, also after an error, a session that was started or
    joined here is closed; an existing one stays open.
    """

    def __init__(
        self,
        workers: int | None,
        address: str | None = None,
        options: dict[str, Any] | None = None,
        *,
        threads_only: bool = False,
    ) -> None:
        self._requested, self._address, self._options = workers, address, dict(options or {})
        self._threads_only = threads_only
        self._owned = False
        self._local: _LocalRay | None = None
        self._cpus_per_task = 1.0
        self.workers = 1
        self.workers_per_node = 1

    def __enter__(self) -> Cluster:
        _LocalRay.join_interrupted()
        self.workers = self.workers_per_node = local_workers(self._requested)
        if _initialized():
            self._threads_only = False
        elif self._address not in (None, _LOCAL):
            self._threads_only, self._owned = False, True
            self._join(str(self._address))
        elif not self._threads_only or self._address == _LOCAL:
            self._threads_only, self._owned = False, True
            _logger.info("starting Ray on this machine with %d workers", self.workers)
            self._local = _LocalRay(self.workers, self._options)
            return self
        if not self._threads_only:
            import ray

            node_cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            self.workers = min(self._requested or sum(node_cpus), max(1, sum(node_cpus)))
            self.workers_per_node = min(self.workers, max(1, *node_cpus))
        return self

    @property
    def runs_threads_during_startup(self) -> bool:
        """Whether threads of this process run tasks at the same time as Ray workers, while the workers warm up."""
        return self._local is not None

    def limit_workers(self, per_node: int) -> None:
        """Limit the number of concurrent tasks on every node."""
        ratio = self.workers_per_node / per_node
        self._cpus_per_task *= ratio
        self.workers, self.workers_per_node = max(1, int(self.workers / ratio)), per_node

    def _join(self, address: str) -> None:
        import ray

        _check_connection(address)
        environment = {"env_vars": {"PYTHONPATH": _python_path(), **_ONE_THREAD}}
        try:
            ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            ray.shutdown()
            raise _no_cluster_error(address, str(error).strip().partition("\n")[0]) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._local:
            self._local.stop(wait_for_start=not isinstance(error, KeyboardInterrupt))
        elif self._owned:
            import ray

            ray.shutdown()

    @property
    def _ready(self) -> bool:
        """Whether Ray accepts tasks."""
        return not self._threads_only and (self._local is None or self._local.ready)

    def run(self, tasks: Iterable[Call[T] | Feed[T]], tick: Callable[[], None] | None = None) -> Iterator[T]:
        """Run all tasks, at most one per worker at a time, and yield their results as they complete.

        `tick` is called at least every second. A UserError of a worker is raised unchanged. Tasks whose worker or node
        died are retried.
        """
        queue = Queue(tasks)
        threads: Threads[T] = Threads(self.workers_per_node)
        session: Session[T] | None = None
        try:
            while True:
                if session is None and self._ready:
                    session = Session(self.workers, self._cpus_per_task, warming=self._local is not None)
                if session:
                    session.fill(queue)
                if session is None or session.warming:
                    threads.fill(queue)
                if not threads.busy and not (session and session.busy):
                    return
                yield from ready_results(threads, session)
                if tick:
                    tick()
        finally:
            threads.close()
            if session:
                session.close()


def _initialized() -> bool:
    """Return whether this process has a Ray session, without importing Ray, which takes a second."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _check_connection(address: str) -> None:
    """Raise ConfigError if the port does not accept connections; Ray itself retries for minutes before it fails."""
    match = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match.group(1), int(match.group(2))), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster_error(address, str(error)) from error


def _no_cluster_error(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"--ray-address {address}: no Ray cluster answers at this address ({reason}); start one with "
        "`ray start --head`, or omit the flag to start a local Ray. To join a cluster that requires a token, set "
        "RAY_AUTH_MODE=token in the environment"
    )


def _python_path() -> str:
    """Return a PYTHONPATH with which workers import the same open_lm package as this process."""
    root = str(Path(open_lm.__file__).resolve().parents[1])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables inside a `with` block."""
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


def local_workers(requested: int | None) -> int:
    """Return the number of workers on this machine: as requested, but at most one per available CPU."""
    cpus = available_cpus()
    if requested and requested > cpus:
        _logger.info("%d workers were requested, but only %d CPUs are available; using %d", requested, cpus, cpus)
    return min(requested or cpus, cpus)
