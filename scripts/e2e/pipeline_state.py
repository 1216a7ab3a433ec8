"""State of the pipeline in its folder: finished stages with their settings, a lock, and running one command."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from open_lm import storage
from open_lm.errors import STOP_SIGNALS, ConfigError, DataError, StorageError, UserError
from open_lm.storage.strict_json import to_json

STOPPED_EXIT_CODE = 130
_LIBC = ctypes.CDLL(None)  # loaded here, because loading between fork and exec is unsafe
_PR_SET_PDEATHSIG = 1
_LOCK_WAIT_S, _LOCK_POLL_S = 300.0, 0.2  # a training that has lost its parent saves and ends within this time


class Stamps:
    """A JSON file for each stage that has started, with `settings`, `finished`, `seconds` and `cpu_seconds`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, stage: str) -> Path:
        return self.folder / f"{stage}.json"

    def read(self, stage: str) -> dict[str, Any] | None:
        """Return the stamp of a stage, None if it has not started. Raise DataError for a damaged file."""
        path = self.path(stage)
        if not path.exists():
            return None
        try:
            stamp = json.loads(storage.read_text(path))
            return {"settings": dict(stamp["settings"]), **stamp}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: expected the JSON of a stage ({error}); delete the file to run this stage again"
            ) from error

    def begin(self, stage: str, settings: Mapping[str, Any]) -> None:
        """Record the settings with which a stage starts; the time of earlier attempts is kept."""
        earlier = self.read(stage) or {}
        times = {name: earlier.get(name, 0.0) for name in ("seconds", "cpu_seconds")}
        self._write(stage, {"settings": settings, "finished": False, **times})

    def end(self, stage: str, seconds: float, cpu_seconds: float, finished: bool) -> None:
        """Add the time of an attempt, and record whether the stage is finished."""
        stamp = self.read(stage) or {"settings": {}, "seconds": 0.0, "cpu_seconds": 0.0}
        times = {"seconds": stamp["seconds"] + seconds, "cpu_seconds": stamp["cpu_seconds"] + cpu_seconds}
        self._write(stage, {**stamp, "finished": finished, **{name: round(time, 1) for name, time in times.items()}})

    def remove(self, stage: str) -> None:
        self.path(stage).unlink(missing_ok=True)

    def _write(self, stage: str, stamp: Mapping[str, Any]) -> None:
        storage.write_text(self.path(stage), to_json(stamp, indent=1) + "\n")


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return "key old -> new" for each setting that differs, with dots for nested settings."""
    changes = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += changed_settings(before, after, f"{prefix}{name}.")
        elif before != after:
            changes.append(f"{prefix}{name} {to_json(before)} -> {to_json(after)}")
    return changes


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Lock a work folder and yield the lock, which the commands of stages inherit.

    So the folder stays locked until the last process of a killed pipeline has ended, for which this function waits.

    Raises:
        StorageError: the folder cannot be written.
        ConfigError: another pipeline uses the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"--work-dir {folder}: cannot be written ({reason}); use another folder") from error
    with file as lock:
        _acquire(lock, folder)
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock


def _acquire(lock: IO[str], folder: Path) -> None:
    deadline, announced = time.monotonic() + _LOCK_WAIT_S, False
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        lock.seek(0)
        owner = lock.read().strip()
        if (owner.isdecimal() and _is_alive(int(owner))) or time.monotonic() > deadline:
            raise ConfigError(
                f"--work-dir {folder}: another pipeline (process {owner or 'unknown'}) or one of its commands uses it; "
                "wait until it ends, or use another folder"
            )
        if not announced:
            print("Waiting for the commands of a pipeline that was killed", flush=True)
            announced = True
        time.sleep(_LOCK_POLL_S)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Stopped(Exception):
    """A stop signal arrived; the current command has saved what it has and ended."""


class StopSignals:
    """Handler of the signals that ask to stop: forward them to the current command. A second signal kills it."""

    def __init__(self) -> None:
        self.received = False
        self._process: subprocess.Popen[str] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                if self.received:
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
        self.received = True

    def check(self) -> None:
        """Raise Stopped after a signal."""
        if self.received:
            raise Stopped

    @contextmanager
    def forwarded_to(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """Forward signals to a process, also one that has arrived while it was being started."""
        self._process = process
        if self.received:
            process.send_signal(signal.SIGTERM)
        try:
            yield
        finally:
            self._process = None


def run_command(
    command: Sequence[str], log: Path, lock: IO[str], signals: StopSignals, environment: Mapping[str, str]
) -> None:
    """Run a command, and copy its output to the console and to the end of a log file.

    Signals that ask to stop are forwarded. If this process is killed, the kernel sends the command SIGTERM.

    Raises:
        Stopped: after a stop signal.
        UserError: the command failed.
    """
    signals.check()
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=(lock.fileno(),),
            preexec_fn=_terminate_with_parent,  # noqa: PLW1509
            encoding="utf-8", errors="backslashreplace",
        )  # fmt: skip
        with signals.forwarded_to(process):
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(f"  {line}", end="", flush=True)
            code = process.wait()
    signals.check()
    if code != 0:
        raise UserError(f"the command failed with exit code {code} (its output: {log}): {shlex.join(command)}")


def _terminate_with_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
