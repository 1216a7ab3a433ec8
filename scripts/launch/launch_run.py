"""The nodes of a run as launch.py sees them: their connections, their output, which failed first, and how all end."""

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

from launch_node import MARK, SILENCE_S

from open_lm.errors import ConfigError, join_problems

LOST = 255  # the exit code where the connection to a node is lost, as ssh's
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
Output = Literal["all", "first"]
_CONNECT_S = 60.0
_SIGN_OF_LIFE_S = SILENCE_S / 10
_OWN_END_S = 15.0  # what nodes get to end by themselves after one has failed: their ranks notice, and say so
_BACKSTOP_S = 15.0  # beyond the grace time, for a node that does not answer
_KILL_S = 2.0  # what a connection gets that leads nowhere yet
_KEPT_LINES = 1000  # of a node's output that is shown only if it fails first
_LAST_WORDS = 20


@dataclass(eq=False)
class Node:
    """A node and the process that leads to it.

    Attributes:
        code: the run's exit code there, once it is told. gone: the process has ended.
        failed_at: when its first rank failed, by the clock of this process.
        kept: lines not shown so far, as (is_error, line). dropped: how many more there were.
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
    last_errors: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_WORDS))

    def order(self, line: str) -> None:
        """Send a line to the node's program; nothing where it has gone."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def keep(self, is_error: bool, line: bytes) -> None:
        self.kept.append((is_error, line))
        if len(self.kept) > _KEPT_LINES:
            self.kept.popleft()
            self.dropped += 1


class Nodes:
    """All nodes of a run. In a `with` block, which takes the stop signals; nothing is left running after it."""

    def __init__(self, commands: Sequence[tuple[str, Sequence[str]]], output: Output, grace_s: float) -> None:
        """commands: each node's name in the output and what leads to it, rank 0's first."""
        self._commands, self._output, self._grace_s = commands, output, grace_s
        self._events: SimpleQueue[tuple[str, Node | None, Any]] = SimpleQueue()
        self._nodes: list[Node] = []
        self._failed: Node | None = None
        self._noticed_at = 0.0
        self._asked = False  # the others to end, after a failure
        self._started = False
        self._signals: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Nodes:
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self._nodes:  # at the end of their input, the nodes' programs end what they have started
            assert node.process.stdin is not None
            with suppress(OSError):
                node.process.stdin.close()
        for node in self._nodes:
            try:
                node.process.wait(self._grace_s + _BACKSTOP_S if self._started else _KILL_S)
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._events.put(("signal", None, number))

    # --- the connections
    def connect(self) -> list[int]:
        """Reach all nodes at once: a free port of each. ConfigError that names those that cannot be reached, with what
        their connection said. KeyboardInterrupt at a signal."""
        for name, command in self._commands:
            self._nodes.append(Node(name, _start(command)))
            threading.Thread(target=self._follow, args=(self._nodes[-1],), daemon=True).start()
        deadline = time.monotonic() + _CONNECT_S
        while (left_s := deadline - time.monotonic()) > 0 and any(n.port is None and not n.gone for n in self._nodes):
            self._take(min(left_s, _SIGN_OF_LIFE_S))
            if self._signals:
                raise KeyboardInterrupt
        problems = [_unreached(node) for node in self._nodes if node.port is None]
        if problems:
            raise ConfigError(join_problems(problems, "hosts cannot be reached"))
        return [node.port for node in self._nodes if node.port is not None]

    def _follow(self, node: Node) -> None:
        """Read what comes from a node until its process ends; in a thread of its own."""
        readers = [
            threading.Thread(target=self._read, args=(node, stream, stream is node.process.stderr), daemon=True)
            for stream in (node.process.stdout, node.process.stderr)
        ]
        for reader in readers:
            reader.start()
        node.process.wait()
        for reader in readers:  # what the node leaves behind may hold its output open
            reader.join(timeout=1)
        self._events.put(("gone", node, None))

    def _read(self, node: Node, stream: IO[bytes], is_error: bool) -> None:
        mark = MARK.encode()
        for line in stream:
            text, found, told = (line, b"", b"") if is_error else line.partition(mark)
            if text:
                self._events.put(
                    ("error" if is_error else "line", node, text if text.endswith(b"\n") else text + b"\n")
                )
            if found:
                self._events.put(("told", node, json.loads(told)))

    # --- the run
    def run(self, jobs: Sequence[Mapping[str, Any]]) -> int:
        """Give each node its job and stay until all have ended; the exit code of the one that failed first, or 0."""
        self._started = True
        for node, job in zip(self._nodes, jobs, strict=True):
            node.order(json.dumps(dict(job)))
        next_sign = time.monotonic() + _SIGN_OF_LIFE_S
        while not all(node.gone for node in self._nodes):
            self._take(0.5)
            if time.monotonic() >= next_sign:
                next_sign += _SIGN_OF_LIFE_S
                for node in self._living():
                    node.order("")
            if self._failed is not None:
                self._end_others(time.monotonic() - self._noticed_at)
        return self._conclude()

    def _living(self) -> list[Node]:
        return [node for node in self._nodes if node.code is None and not node.gone]

    def _take(self, wait_s: float) -> None:
        """Act on the next event, if one comes."""
        try:
            kind, node, value = self._events.get(timeout=wait_s)
        except Empty:
            return
        if node is None:
            self._hand_on(value)
        elif kind in ("line", "error"):
            self._show(node, kind == "error", value)
        elif kind == "told":
            node.port, node.code = value.get("port", node.port), value.get("code", node.code)
            node.problem = value.get("problem")
            if node.code or node.problem is not None:
                self._fails(node, value.get("ago_s", 0.0))
        else:
            node.gone = True
            if node.code is None:
                self._fails(node)

    def _hand_on(self, number: int) -> None:
        """A signal: the first asks the run to stop, the next ends it."""
        self._signals.append(number)
        if not self._started:
            return
        order = "end 0" if len(self._signals) > 1 else f"signal {_as_stop(number)}"
        for node in self._living():
            node.order(order)
        done = "are ended" if len(self._signals) > 1 else "save and stop; a second signal ends them at once"
        print(f"{signal.Signals(number).name}: the nodes {done}", file=sys.stderr, flush=True)

    def _fails(self, node: Node, ago_s: float = 0.0) -> None:
        """A node has failed; the first that is heard of need not be the first, which `_conclude` finds."""
        node.failed_at = min(node.failed_at, time.monotonic() - ago_s)
        if self._failed is None:
            self._failed, self._noticed_at = node, time.monotonic()
            self._show_kept(node)

    def _end_others(self, since_s: float) -> None:
        own_s = min(_OWN_END_S, self._grace_s / 2)
        if since_s > own_s and not self._asked:
            self._asked = True
            for node in self._living():
                node.order(f"end {self._grace_s - own_s}")
        if since_s > self._grace_s + _BACKSTOP_S:
            for node in self._nodes:
                node.process.kill()

    # --- the output
    def _show(self, node: Node, is_error: bool, line: bytes) -> None:
        """Print a line at once or keep it: after a failure the node that failed speaks first."""
        if is_error:
            node.last_errors.append(line.decode(errors="replace").rstrip())
        hidden = node.port is None or (self._output == "first" and node is not self._nodes[0])
        if node is self._failed or (self._failed is None and not hidden):
            self._print(node, is_error, line)
        elif node.port is not None:
            node.keep(is_error, line)

    def _show_kept(self, node: Node) -> None:
        if node.dropped:
            self._print(node, True, f"({node.dropped} lines before these are left out)\n".encode())
        for is_error, line in node.kept:
            self._print(node, is_error, line)
        node.kept.clear()

    def _print(self, node: Node, is_error: bool, line: bytes) -> None:
        stream = (sys.stderr if is_error else sys.stdout).buffer
        prefix = b"" if len(self._nodes) == 1 else f"[{node.name}] ".encode()
        stream.write(prefix + line)
        stream.flush()

    def _conclude(self) -> int:
        """Say which node failed first, then what the others said after that; the exit code."""
        if self._failed is None:
            return 0
        self._failed = failed = min(self._nodes, key=lambda node: node.failed_at)
        self._show_kept(failed)
        code = LOST if failed.code is None else failed.code
        problems = [f"{node.name}: {node.problem}" for node in self._nodes if node.problem is not None]
        if problems:
            raise ConfigError(join_problems(problems, "the run cannot be started"))
        if failed.code is None:
            said = "the connection to it was lost before its run ended"
            print(f"error: {failed.name}: {said}; the other nodes were ended", file=sys.stderr, flush=True)
        elif code != 2 and len(self._nodes) > 1:  # a mistake has been told by the run itself
            print(f"error: {failed.name} failed first, with exit code {code}", file=sys.stderr, flush=True)
        held = sum(len(node.kept) + node.dropped for node in self._nodes)
        if held and (code == 2 or self._output == "first"):
            print(f"({held} lines of the other nodes are left out)", file=sys.stderr, flush=True)
        elif held:
            print("what the other nodes said after that:", file=sys.stderr, flush=True)
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
            start_new_session=True,  # an interrupt at the terminal reaches this process alone
        )
    except OSError as error:
        said = f"{command[0]} cannot be run here ({error.strerror})"
        raise ConfigError(f"{said}; --ssh and --python name other commands") from error


def _as_stop(number: int) -> int:
    """What the ranks are sent: an interrupt would end them without saving."""
    return int(signal.SIGTERM if number == signal.SIGINT else number)


def _unreached(node: Node) -> str:
    words = "\n".join(node.last_errors)
    if not node.gone:
        words = f"no answer in {_CONNECT_S:.0f} s. {words}".strip()
    return f"{node.name}: {words or f'its connection ended with exit status {node.process.returncode}'}"
