"""Manage the nodes of a run for launch.py: connections, output, signals and failures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import IO, Any, Literal

from open_lm.cli.launch_node import MARK, SILENCE_S
from open_lm.errors import STOP_SIGNALS, ConfigError, join_problems

LOST = 255  # exit code for a lost connection, like that of ssh
Output = Literal["all", "first"]
_CONNECT_S = 60.0
_HEARTBEAT_S = SILENCE_S / 10
_SELF_STOP_S = 15.0  # after a failure, time for the other ranks to detect it, report it and exit
_UNRESPONSIVE_S = 15.0  # time after the grace period until an unresponsive node is killed
_KILL_S = 2.0  # time for a connection to close if no run has started
_MAX_KEPT_LINES = 1000  # of the output of each hidden node, which is printed only if the node fails first
_MAX_ERROR_LINES = 20


@dataclass(eq=False)
class Node:
    """A node and the local process that connects to it.

    Attributes:
        code: exit code of the run on the node, once received. gone: whether the local process has exited.
        failed_at: time of the first rank's failure, on the monotonic clock of this process.
        kept: lines that are not printed yet, as (is_error, line). dropped: number of older lines that were discarded.
    """

    name: str
    process: subprocess.Popen[bytes]
    port: int | None = None
    problem: str | None = None
    code: int | None = None
    gone: bool = False
    failed_at: float = float("inf")
    kept: deque[tuple[bool, bytes]] = field(default_factory=deque)
    dropped: int = 0
    last_errors: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_ERROR_LINES))

    def send(self, line: str) -> None:
        """Send a line to launch_node.py; do nothing if its process has exited."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def keep(self, is_error: bool, line: bytes) -> None:
        self.kept.append((is_error, line))
        if len(self.kept) > _MAX_KEPT_LINES:
            self.kept.popleft()
            self.dropped += 1


class Nodes:
    """All nodes of a run, as a context manager that handles the stop signals and stops everything on exit."""

    def __init__(self, commands: Sequence[tuple[str, Sequence[str]]], output: Output, grace_s: float) -> None:
        """Take (name in the output, command that starts launch_node.py) of each node, in rank order."""
        self._commands, self._output, self._grace_s = commands, output, grace_s
        self._events: SimpleQueue[tuple[str, Node | None, Any]] = SimpleQueue()
        self._nodes: list[Node] = []
        self._failed: Node | None = None
        self._detected_at = 0.0
        self._stopping_others = False  # whether the other nodes were asked to stop after a failure
        self._started = False
        self._signals: list[int] = []
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Nodes:
        self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self._nodes:  # launch_node.py stops its run when its input ends
            assert node.process.stdin is not None
            with suppress(OSError):
                node.process.stdin.close()
        for node in self._nodes:
            try:
                node.process.wait(self._grace_s + _UNRESPONSIVE_S if self._started else _KILL_S)
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._events.put(("signal", None, number))

    # --- connections
    def connect(self) -> list[int]:
        """Connect to all nodes in parallel, and return a free port of each.

        Raise ConfigError with the error output of every node that cannot be reached, and KeyboardInterrupt on a signal.
        """
        for name, command in self._commands:
            self._nodes.append(Node(name, _start(command)))
            threading.Thread(target=self._follow, args=(self._nodes[-1],), daemon=True).start()
        deadline = time.monotonic() + _CONNECT_S
        while (rest_s := deadline - time.monotonic()) > 0 and any(n.port is None and not n.gone for n in self._nodes):
            self._handle_event(min(rest_s, _HEARTBEAT_S))
            if self._signals:
                raise KeyboardInterrupt
        problems = [_connection_problem(node) for node in self._nodes if node.port is None]
        if problems:
            raise ConfigError(join_problems(problems, "cannot connect to hosts"))
        return [node.port for node in self._nodes if node.port is not None]

    def _follow(self, node: Node) -> None:
        """Read the output of a node until its process exits. Runs in a thread."""
        readers = [
            threading.Thread(target=self._read, args=(node, stream, stream is node.process.stderr), daemon=True)
            for stream in (node.process.stdout, node.process.stderr)
        ]
        for reader in readers:
            reader.start()
        node.process.wait()
        for reader in readers:  # a leftover process on the node may keep the output open
            reader.join(timeout=1)
        self._events.put(("gone", node, None))

    def _read(self, node: Node, stream: IO[bytes], is_error: bool) -> None:
        mark = MARK.encode()
        for line in stream:
            text, separator, values = (line, b"", b"") if is_error else line.partition(mark)
            if text:
                self._events.put(
                    ("error" if is_error else "line", node, text if text.endswith(b"\n") else text + b"\n")
                )
            if separator:
                self._events.put(("values", node, json.loads(values)))

    # --- the run
    def run(self, jobs: Sequence[Mapping[str, Any]]) -> int:
        """Send each node its job and wait for all. Return the exit code of the node that failed first, or 0."""
        self._started = True
        for node, job in zip(self._nodes, jobs, strict=True):
            node.send(json.dumps(dict(job), allow_nan=False))
        next_heartbeat = time.monotonic() + _HEARTBEAT_S
        while not all(node.gone for node in self._nodes):
            self._handle_event(0.5)
            if time.monotonic() >= next_heartbeat:
                next_heartbeat += _HEARTBEAT_S
                for node in self._running():
                    node.send("")
            if self._failed is not None:
                self._stop_others(time.monotonic() - self._detected_at)
        return self._conclude()

    def _running(self) -> list[Node]:
        return [node for node in self._nodes if node.code is None and not node.gone]

    def _handle_event(self, wait_s: float) -> None:
        """Handle the next event that arrives within `wait_s`."""
        try:
            kind, node, value = self._events.get(timeout=wait_s)
        except Empty:
            return
        if node is None:
            self._forward_signal(value)
        elif kind in ("line", "error"):
            self._show(node, kind == "error", value)
        elif kind == "values":
            node.port, node.code = value.get("port", node.port), value.get("code", node.code)
            node.problem = value.get("problem")
            if node.code or node.problem is not None:
                self._record_failure(node, value.get("ago_s", 0.0))
        else:
            node.gone = True
            if node.code is None:
                self._record_failure(node)

    def _forward_signal(self, number: int) -> None:
        """Ask the run to stop at the first signal, and kill it at the second."""
        self._signals.append(number)
        if not self._started:
            return
        command = "end 0" if len(self._signals) > 1 else f"signal {_stop_signal(number)}"
        for node in self._running():
            node.send(command)
        action = (
            "killing all nodes" if len(self._signals) > 1 else "asking all nodes to save and stop; repeat to kill them"
        )
        print(f"{signal.Signals(number).name}: {action}", file=sys.stderr, flush=True)

    def _record_failure(self, node: Node, ago_s: float = 0.0) -> None:
        """Record a failure. The first reported failure may not be the first in time; `_conclude` finds that one."""
        node.failed_at = min(node.failed_at, time.monotonic() - ago_s)
        if self._failed is None:
            self._failed, self._detected_at = node, time.monotonic()
            self._show_kept(node)

    def _stop_others(self, since_s: float) -> None:
        self_stop_s = min(_SELF_STOP_S, self._grace_s / 2)
        if since_s > self_stop_s and not self._stopping_others:
            self._stopping_others = True
            for node in self._running():
                node.send(f"end {self._grace_s - self_stop_s}")
        if since_s > self._grace_s + _UNRESPONSIVE_S:
            for node in self._nodes:
                node.process.kill()

    # --- output
    def _show(self, node: Node, is_error: bool, line: bytes) -> None:
        """Print a line or keep it. After a failure, print the lines of the failed node before those of the others."""
        if is_error:
            node.last_errors.append(line.decode(errors="replace").rstrip())
        hidden = node.port is None or (self._output == "first" and node is not self._nodes[0])
        if node is self._failed or (self._failed is None and not hidden):
            self._print(node, is_error, line)
        elif node.port is not None:
            node.keep(is_error, line)

    def _show_kept(self, node: Node) -> None:
        if node.dropped:
            self._print(node, True, f"({node.dropped} earlier lines omitted)\n".encode())
        for is_error, line in node.kept:
            self._print(node, is_error, line)
        node.kept.clear()

    def _print(self, node: Node, is_error: bool, line: bytes) -> None:
        stream = (sys.stderr if is_error else sys.stdout).buffer
        prefix = b"" if len(self._nodes) == 1 else f"[{node.name}] ".encode()
        stream.write(prefix + line)
        stream.flush()

    def _conclude(self) -> int:
        """Report the node that failed first, print the kept output of the others, and return the exit code."""
        if self._failed is None:
            return 0
        self._failed = failed = min(self._nodes, key=lambda node: node.failed_at)
        self._show_kept(failed)
        code = LOST if failed.code is None else failed.code
        problems = [f"{node.name}: {node.problem}" for node in self._nodes if node.problem is not None]
        if problems:
            raise ConfigError(join_problems(problems, "cannot start the run"))
        if failed.code is None:
            message = "lost the connection before the run finished; stopped the other nodes"
            print(f"error: {failed.name}: {message}", file=sys.stderr, flush=True)
        elif code != 2 and len(self._nodes) > 1:  # with code 2, the run itself has printed the error
            print(f"error: {failed.name} failed first, with exit code {code}", file=sys.stderr, flush=True)
        num_hidden = sum(len(node.kept) + node.dropped for node in self._nodes)
        if num_hidden and (code == 2 or self._output == "first"):
            print(f"({num_hidden} lines of the other nodes omitted)", file=sys.stderr, flush=True)
        elif num_hidden:
            print("later output of the other nodes:", file=sys.stderr, flush=True)
            for node in self._nodes:
                self._show_kept(node)
        return code


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that an interrupt at the terminal reaches only the launcher
        )
    except OSError as error:
        raise ConfigError(
            f"cannot run {command[0]} on this machine ({error.strerror}); use --ssh or --python to set another command"
        ) from error


def _stop_signal(number: int) -> int:
    """Return the signal to send to the ranks: SIGTERM instead of SIGINT, which would stop them without saving."""
    return int(signal.SIGTERM if number == signal.SIGINT else number)


def _connection_problem(node: Node) -> str:
    errors = "\n".join(node.last_errors)
    if not node.gone:
        errors = f"no answer within {_CONNECT_S:.0f} s. {errors}".strip()
    return f"{node.name}: {errors or f'the connection command exited with code {node.process.returncode}'}"
