"""A `python` whose programs are forked from the fork server of the test process, which has imported the package.

A program starts in a few hundredths of a second instead of the seconds that importing torch and the package takes. It
is otherwise the program of a new process: with its own arguments, folder, environment variables, streams and signals,
and with this `python` as sys.executable, so that the programs that it starts (the ranks of torchrun too) are forked as
well. Not for tests of start-up itself, or of processes that are found by their parent or environment in /proc.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
from io import TextIOWrapper
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

words, flags = sys.argv[1:], []
while words[:1] == ["-u"]:
    flags.append(words.pop(0))
if not words or (words[0] != "-m" and not words[0].endswith(".py")):
    os.execv({python!r}, [{python!r}, *flags, *words])  # code, a version, a worker of multiprocessing
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = {{"words": words, "folder": os.getcwd(), "variables": dict(os.environ), "unbuffered": bool(flags)}}
content = json.dumps(request).encode()
socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
server.sendall(content)
answers = server.makefile("rb")
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.kill(process, number))
code = int(answers.readline() or -9)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class ForkedPython:
    """A thread that starts the programs, and the path of the `python` that asks it to."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "python"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen(64)
        self.path.write_text(CLIENT.format(python=sys.executable, address=str(folder / "socket")))
        self.path.chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._start, args=(client,), daemon=True).start()

    def _start(self, client: socket.socket) -> None:
        """Start the program of a client and send its exit code; end the program if the client is killed."""
        with client:
            size, descriptors, _, _ = socket.recv_fds(client, 8, 3)
            request = json.loads(client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
            streams = [Connection(descriptor) for descriptor in descriptors]  # can be sent to a process
            context = multiprocessing.get_context("forkserver")
            process = context.Process(target=_run_program, args=(request, str(self.path), streams))
            process.start()
            for stream in streams:
                stream.close()
            client.sendall(f"{process.pid}\n".encode())
            if process.sentinel not in wait([process.sentinel, client]):
                process.kill()
            process.join()
            with contextlib.suppress(OSError):  # the client was killed
                client.sendall(f"{process.exitcode}\n".encode())


def _run_program(request: dict[str, Any], python: str, streams: list[Connection]) -> None:
    """Run `python words` in this forked process."""
    for descriptor, stream in enumerate(streams):
        os.dup2(stream.fileno(), descriptor)
        stream.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        TextIOWrapper(open(number, "wb", closefd=False), "utf-8", errors, line_buffering=is_immediate)  # noqa: SIM115
        for number, errors, is_immediate in ((1, "strict", request["unbuffered"]), (2, "backslashreplace", True))
    )
    os.environ.clear()
    os.environ.update(request["variables"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # as in a new process
    sys.executable = python
    words = request["words"]
    is_module = words[0] == "-m"
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    start = os.getcwd() if is_module else str(Path(words[0]).resolve().parent)
    sys.path[:] = [start, *given, *(path for path in sys.path if not _is_of_tests(path))]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        if is_module:
            sys.argv[:] = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing calls os._exit


def _is_of_tests(path: str) -> bool:
    """Return whether pytest has added this entry to sys.path."""
    return not path or (Path(path).is_relative_to(ROOT) and "site-packages" not in path)
