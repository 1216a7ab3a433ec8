"""Ray at arm's length: start or join it, run plain functions on it with a bounded number in flight, leave it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import open_lm
from open_lm.errors import ConfigError, DataError, UserError

_logger = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 256 << 20  # data goes through the work folder; the store only holds tokenizer and small results
_KNOCK_S = 10.0
T = TypeVar("T")


class Cluster:
    """A Ray session: the running one of this process, the one at `address`, or a local one of our own.

    What was started here is stopped at the end of the `with`, also after an error; what was found is left as it was.
    """

    def __init__(self, workers: int | None, address: str | None = None, options: dict[str, Any] | None = None) -> None:
        self._wanted, self._address, self._options = workers, address, dict(options or {})
        self._owned = False
        self.workers = 1

    def __enter__(self) -> Cluster:
        import ray

        if not ray.is_initialized():
            self._owned = True
            try:
                self._start()
            except BaseException:
                ray.shutdown()
                raise
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.workers = min(self._wanted or cpus, cpus)
        return self

    def _start(self) -> None:
        import ray

        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address:
            _knock(self._address)
            environment = {"env_vars": {"PYTHONPATH": _python_path()}}
            try:
                ray.init(self._address, runtime_env=environment, **common)
            except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
                raise _no_cluster(self._address, str(error).strip().partition("\n")[0]) from error
            return
        workers = local_workers(self._wanted)
        _logger.info("starting Ray on this machine with %d workers", workers)
        defaults = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        # The processes of a local Ray inherit the environment, which spares them Ray's slower way of setting it.
        with _environment(
            PYTHONPATH=_python_path(), RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"
        ):
            ray.init(address="local", **{**defaults, **common, **self._options})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        if self._owned:
            ray.shutdown()

    def share(self, value: object) -> Any:
        """Put a value where every worker can read it; the handle goes into `run`."""
        import ray

        return ray.put(value)

    def get(self, reference: Any) -> Any:
        """The value behind what an actor's method returned."""
        return _result(reference)

    def actor(self, kind: type) -> Any:
        """A process of its own around an object of class `kind`; its methods are called as Ray's."""
        import ray

        return ray.remote(num_cpus=0)(kind).remote()

    def run(
        self, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], tick: Callable[[], None] | None = None
    ) -> Iterator[T]:
        """Call the function with each tuple of arguments, as many at a time as there are workers.

        Results come as they are ready. `tick` is called about every second. A UserError of a worker is raised as it
        was; tasks whose worker died are tried again by Ray.
        """
        import ray

        remote = ray.remote(num_cpus=1, max_retries=3)(function)
        waiting = iter(tasks)
        running: list[Any] = []
        try:
            while True:
                while len(running) < self.workers and (task := next(waiting, None)) is not None:
                    running.append(remote.remote(*task))
                if not running:
                    return
                ready, running = ray.wait(running, num_returns=1, timeout=1.0)
                if tick:
                    tick()
                for reference in ready:
                    yield _result(reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


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
        "or leave the flag out to have a local Ray started"
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
            "use fewer workers or a machine with more memory; finished work is kept, the same command goes on with it"
        ) from error


def local_workers(wanted: int | None) -> int:
    """Worker processes on this machine: as many as wanted, but no more than it has processors to offer."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted and wanted > available:
        _logger.info("%d workers are asked for; %d processors are there, so %d are used", wanted, available, available)
    return min(wanted or available, available)
