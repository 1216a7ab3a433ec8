"""Ray at arm's length: start or join it, run plain functions on it with a bounded number in flight, leave it."""

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
from open_lm.datapreprocess.tasks import Call, Feed, Queue, Session, Threads, finished
from open_lm.errors import ConfigError

_logger = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 256 << 20  # sequences go through the work folder; the store holds only what is fed to tasks
_KNOCK_S = 10.0
_LOCAL = "local"  # Ray's own word for a session of this machine
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # in a worker, which has one processor
T = TypeVar("T")


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


class _LocalRay:
    """A Ray of this process's own, started and stopped beside the main thread.

    Ray's processes end with the thread that started them, so that thread lives as long as they are needed. It does not
    keep the process alive: an interrupt need not wait for a start to come to its end.
    """

    _threads: ClassVar[list[threading.Thread]] = []

    @classmethod
    def wait_for_interrupted(cls) -> None:
        """Until what an interrupted run of this process had begun to start is stopped again."""
        while cls._threads:
            cls._threads.pop().join()

    def __init__(self, workers: int, options: dict[str, Any]) -> None:
        self._workers, self._options = workers, options
        self._started: Future[None] = Future()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._live, name="ray", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the start is over; what made it fail is raised here."""
        if self._started.done():
            self._started.result()
        return self._started.done()

    def stop(self, *, at_once: bool) -> None:
        """End Ray and wait for that; `at_once`: do not wait for a start that is still going on."""
        self._leave.set()
        if self._started.done() or not at_once:
            self._thread.join()
        else:
            self._threads.append(self._thread)

    def _live(self) -> None:
        try:
            self._start()
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            self._started.set_exception(
                ConfigError(
                    f"Ray could not be started on this machine ({reason}); look for room in its temporary folder and "
                    "for its logs there. Finished work is kept, the same command goes on with it"
                )
            )
        else:
            self._started.set_result(None)
            self._leave.wait()
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
        # The processes of a local Ray inherit the environment, which spares them Ray's slower way of setting it.
        with _environment(
            PYTHONPATH=_python_path(),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
            **_ONE_THREAD,
        ):
            ray.init(address=_LOCAL, **{**defaults, **self._options})


class Cluster:
    """A Ray session: the running one of this process, the one at `address`, or a local one of our own.

    A local Ray takes seconds to start; it does so beside this thread, and until it is there and warm `run` works in
    threads of this process. With `alone` and no address it is not started at all, and all is done in threads: for work
    that takes less time than the start. What was started here is stopped at the end of the `with`, also after an error;
    what was found is left as it was.
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
        self._local: _LocalRay | None = None
        self._cpus_per_task = 1.0
        self.workers = 1
        self.workers_per_node = 1

    def __enter__(self) -> Cluster:
        _LocalRay.wait_for_interrupted()
        self.workers = self.workers_per_node = local_workers(self._wanted)
        if _initialized():
            self._alone = False
        elif self._address not in (None, _LOCAL):
            self._alone, self._owned = False, True
            self._join(str(self._address))
        elif not self._alone or self._address == _LOCAL:
            self._alone, self._owned = False, True
            _logger.info("starting Ray on this machine with %d workers", self.workers)
            self._local = _LocalRay(self.workers, self._options)
            return self
        if not self._alone:
            import ray

            machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            self.workers = min(self._wanted or sum(machines), max(1, sum(machines)))
            self.workers_per_node = min(self.workers, max(1, *machines))
        return self

    @property
    def runs_threads_during_startup(self) -> bool:
        """Whether threads of this process work beside Ray's workers, for as long as these warm up."""
        return self._local is not None

    def limit_workers(self, per_machine: int) -> None:
        """Run no more tasks than this at a time on any machine."""
        share = self.workers_per_node / per_machine
        self._cpus_per_task *= share
        self.workers, self.workers_per_node = max(1, int(self.workers / share)), per_machine

    def _join(self, address: str) -> None:
        import ray

        _knock(address)
        environment = {"env_vars": {"PYTHONPATH": _python_path(), **_ONE_THREAD}}
        try:
            ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            ray.shutdown()
            raise _no_cluster(address, str(error).strip().partition("\n")[0]) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._local:
            self._local.stop(at_once=isinstance(error, KeyboardInterrupt))
        elif self._owned:
            import ray

            ray.shutdown()

    @property
    def _ready(self) -> bool:
        """Whether tasks can go to Ray."""
        return not self._alone and (self._local is None or self._local.ready)

    def run(self, tasks: Iterable[Call[T] | Feed[T]], tick: Callable[[], None] | None = None) -> Iterator[T]:
        """Do all tasks, as many at a time as there are workers; results come as they are ready.

        `tick` is called at least every second. A UserError of a worker is raised as it was; tasks whose worker or node
        died are tried again.
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
                yield from finished(threads, session)
                if tick:
                    tick()
        finally:
            threads.close()
            if session:
                session.close()


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


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_workers(wanted: int | None) -> int:
    """Worker processes on this machine: as many as wanted, but no more than it has processors to offer."""
    available = available_cpus()
    if wanted and wanted > available:
        _logger.info("%d workers are asked for; %d processors are there, so %d are used", wanted, available, available)
    return min(wanted or available, available)
