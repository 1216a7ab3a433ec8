"""Run torchrun on one node for launch.py: forward signals, and leave no processes behind.

launch.py starts this program, on other machines through ssh. It needs only Python. It reads commands from the lines of
standard input, so that environment variables do not appear on a command line:

    first line       JSON object with command, directory, environment and grace_s
    signal NUMBER    send the signal to the run
    end SECONDS      send SIGTERM, and SIGKILL after this many seconds
    empty line       heartbeat

If the input ends or no line arrives for SILENCE_S, the connection to the launcher is lost, and the program stops the
run like `end grace_s`.

The output of the run goes to the output of this program. Lines that start with MARK contain JSON for the launcher.
The first is {"port": …}, a free port on this machine, or {"problem": …}. The last is {"code": …, "ago_s": …}: the exit
code of the run and the seconds since its first rank failed. torchrun exits later, after all ranks on the node have.
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
SILENCE_S = 60.0  # the launcher sends a heartbeat every few seconds
_POLL_S = 0.1
_KILL_S = 10.0  # time for processes to exit after SIGKILL; one in an uninterruptible system call may take longer
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def send_to_launcher(**values: Any) -> None:
    """Write a line for the launcher. MARK separates it from an unfinished line of the run."""
    os.write(1, f"{MARK}{json.dumps(values, allow_nan=False)}\n".encode())


class CommandReader:
    """A reader of the launcher's commands on standard input."""

    def __init__(self) -> None:
        self._bytes = b""
        self._received_at = time.monotonic()
        self.lost = False

    def read(self, wait_s: float) -> list[str]:
        """Return the lines that arrive within `wait_s`. Set `lost` at the end of the input or after SILENCE_S."""
        if self.lost:
            time.sleep(wait_s)
            return []
        if select.select([0], [], [], wait_s)[0]:
            data = os.read(0, 1 << 16)
            self._bytes += data
            self._received_at, self.lost = time.monotonic(), not data
        elif time.monotonic() - self._received_at > SILENCE_S:
            self.lost = True
        *lines, self._bytes = self._bytes.split(b"\n")
        return [line.decode() for line in lines if line]


class RunningCommand:
    """The running command and all its descendants."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._failure = tempfile.NamedTemporaryFile("r", prefix="failure-")  # noqa: SIM115 (open during the run)
        self.process = subprocess.Popen(
            job["command"],
            cwd=job["directory"],
            env={**os.environ, **job["environment"], FAILURE_FILE: self._failure.name},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the launcher forwards an interrupt from the terminal
            preexec_fn=_terminate_with_parent,  # noqa: PLW1509 (this process has one thread)
        )
        self._kill_at = float("inf")

    def failed_ago_s(self) -> float:
        """Return the seconds since the first rank failed, or 0 if torchrun has not reported it."""
        failure_time = self._failure.read()
        return time.time() - float(failure_time) if failure_time else 0.0

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self, grace_s: float) -> None:
        """Send SIGTERM; `code` kills the run after the grace time."""
        self.send(signal.SIGTERM)
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)

    def code(self) -> int | None:
        """Return the exit code in the shell's convention, or None while the command is running."""
        killed = time.monotonic() >= self._kill_at
        if killed:
            kill_descendants()
        code = self.process.poll()
        if code is None and killed:
            return 128 + signal.SIGKILL
        return 128 - code if code is not None and code < 0 else code


_LIBC = ctypes.CDLL(None)  # loaded here, because loading between fork and exec is unsafe


def _terminate_with_parent() -> None:
    """Ask the kernel to send this child SIGTERM when its parent is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _LIBC.prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """Return all descendants of this process. Linux only; on other systems, return an empty list."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # the process has exited
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(folder.name))
    pids, parents = [], [os.getpid()]
    while parents:
        new = children.get(parents.pop(), [])
        pids += new
        parents += new
    return pids


def kill_descendants() -> None:
    """Kill all descendants, including processes that start in the meantime."""
    deadline = time.monotonic() + _KILL_S
    while (pids := descendants()) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(_POLL_S / 10)


def find_problem(job: dict[str, Any]) -> str | None:
    """Return why the job cannot start on this machine, or None."""
    if not os.path.isdir(job["directory"]):
        return f"the working directory {job['directory']} does not exist on this host; create it or set --directory"
    if shutil.which(job["command"][0]) is None:
        return f"{job['command'][0]} is not an executable on this host; set --python"
    return None


def main() -> int:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # adopt ranks whose torchrun has exited, so that `descendants` finds them
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    send_to_launcher(port=port)
    reader = CommandReader()
    lines: list[str] = []
    while not lines:
        if reader.lost:
            return 1
        lines = reader.read(_POLL_S)
    job = json.loads(lines.pop(0))
    problem = find_problem(job)
    if problem is not None:
        send_to_launcher(problem=problem)
        return 2
    run = RunningCommand(job)
    was_lost = False
    while (code := run.code()) is None:
        for line in lines:
            command, _, value = line.partition(" ")
            if command == "signal":
                run.send(int(value))
            else:
                run.end(float(value))
        lines = reader.read(_POLL_S)
        if reader.lost and not was_lost:
            was_lost = True
            run.end(job["grace_s"])
    kill_descendants()
    if not was_lost:
        send_to_launcher(code=code, ago_s=run.failed_ago_s())
    return code


if __name__ == "__main__":
    sys.exit(main())
