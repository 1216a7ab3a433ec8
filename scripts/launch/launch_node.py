"""One node's part of launch.py: starts the run's torchrun here, hands signals on to it, and leaves no process behind.

Started by launch.py, on another machine by its remote shell; needs nothing but Python. Lines of standard input say what
to do; the first is a JSON object with command, directory, environment and grace_s, later ones are `signal NUMBER`,
`end SECONDS` (SIGTERM, and after so many seconds SIGKILL) or nothing, a sign of life. Where that input ends or falls
silent, the launcher or the way to it is lost: the run is ended as by `end grace_s`. So environment variables stand in
no command line, and a connection that breaks leaves nothing running.

What the run prints goes to this process's own output. Between it, a line that begins with MARK is JSON for the
launcher: first {"port": …}, a port that is free here, or {"problem": …}; last {"code": …, "ago_s": …}, the exit code of
the run, and how long ago its first rank failed: torchrun ends some time after that, when the others of its node have.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARK = "\x1elaunch "
FAILURE_FILE = "OPEN_LM_FAILURE_FILE"  # as in open_lm.utils.torchrun
SILENCE_S = 60.0  # without a sign of life from the launcher, of which there is one every few seconds
_POLL_S = 0.1
_KILL_S = 10.0  # what processes may take to die of SIGKILL; one that the kernel holds takes longer
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def tell(**values: Any) -> None:
    """A line for the launcher. It begins anew where the run has not ended its own."""
    os.write(1, f"{MARK}{json.dumps(values)}\n".encode())


class Orders:
    """Lines from the launcher."""

    def __init__(self) -> None:
        self._bytes = b""
        self._heard = time.monotonic()
        self.lost = False

    def take(self, wait_s: float) -> list[str]:
        """The lines that have come within `wait_s`; sets `lost` at the end of the input or after silence."""
        if self.lost:
            time.sleep(wait_s)
            return []
        if select.select([0], [], [], wait_s)[0]:
            read = os.read(0, 1 << 16)
            self._bytes += read
            self._heard, self.lost = time.monotonic(), not read
        elif time.monotonic() - self._heard > SILENCE_S:
            self.lost = True
        *lines, self._bytes = self._bytes.split(b"\n")
        return [line.decode() for line in lines if line]


class Run:
    """The run's command with all that it starts."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._failure = tempfile.NamedTemporaryFile("r", prefix="failure-")  # noqa: SIM115 (as long as the run)
        self.process = subprocess.Popen(
            job["command"],
            cwd=job["directory"],
            env={**os.environ, **job["environment"], FAILURE_FILE: self._failure.name},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt at a terminal is the launcher's to hand on
            preexec_fn=_end_with_parent,  # noqa: PLW1509 (this process has one thread)
        )
        self._kill_at = float("inf")

    def failed_ago_s(self) -> float:
        """Seconds since its first rank failed, 0 where torchrun has not said."""
        said = self._failure.read()
        return time.time() - float(said) if said else 0.0

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self, grace_s: float) -> None:
        """Ask it to end; `code` sees to it that it has after the grace time."""
        self.send(signal.SIGTERM)
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)

    def code(self) -> int | None:
        """The exit code, as a shell puts it, or None while it runs."""
        killed = time.monotonic() >= self._kill_at
        if killed:
            end_descendants()
        code = self.process.poll()
        if code is None and killed:
            return 128 + signal.SIGKILL
        return 128 - code if code is not None and code < 0 else code


_LIBC = ctypes.CDLL(None)  # not loaded in a child between fork and exec


def _end_with_parent() -> None:
    """In a new child: get SIGTERM when this process is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _LIBC.prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """The processes that this one has started, and those started by them. Linux; elsewhere none are found."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(folder.name))
    found, unread = [], [os.getpid()]
    while unread:
        more = children.get(unread.pop(), [])
        found += more
        unread += more
    return found


def end_descendants() -> None:
    """Kill all that are left, also those that are born meanwhile."""
    deadline = time.monotonic() + _KILL_S
    while (left := descendants()) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(_POLL_S / 10)


def problem_of(job: dict[str, Any]) -> str | None:
    """Why this job cannot be started here."""
    if not os.path.isdir(job["directory"]):
        return f"the working directory {job['directory']} does not exist there; --directory names another"
    if shutil.which(job["command"][0]) is None:
        return f"{job['command'][0]} does not exist there or cannot be run; --python names another"
    return None


def serve() -> int:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # ranks whose torchrun has gone are still found
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    tell(port=port)
    orders = Orders()
    waiting: list[str] = []
    while not waiting:
        if orders.lost:
            return 1
        waiting = orders.take(_POLL_S)
    job = json.loads(waiting.pop(0))
    problem = problem_of(job)
    if problem is not None:
        tell(problem=problem)
        return 2
    run = Run(job)
    was_lost = False
    while (code := run.code()) is None:
        for order in waiting:
            word, _, value = order.partition(" ")
            if word == "signal":
                run.send(int(value))
            else:
                run.end(float(value))
        waiting = orders.take(_POLL_S)
        if orders.lost and not was_lost:
            was_lost = True
            run.end(job["grace_s"])
    end_descendants()
    if not was_lost:
        tell(code=code, ago_s=run.failed_ago_s())
    return code


if __name__ == "__main__":
    sys.exit(serve())
