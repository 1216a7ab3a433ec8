"""Tokenize the units of a text index in several processes of this machine, which end when this process ends."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import orjson

from open_lm import errors
from open_lm.data.text_folder import TextFolder
from open_lm.data.text_units import TextUnit, UnitReport
from open_lm.errors import DataError, UserError
from open_lm.system.names import escaped, unescaped

_BYTES_PER_PROCESS = 4 << 20  # of input; starting a process and its tokenizer takes a second or two
_MAX_PROCESSES = 64  # each needs about 200 MB
_POLL_S = 0.1
_STALL_S = 660.0  # how long a cache waits for another process that makes no progress with the same unit


class TextPool:
    """A context manager whose processes tokenize units.

    Attributes:
        done_bytes: input bytes of the units that are finished.
    """

    def __init__(self, folder: TextFolder, units: Sequence[TextUnit], cache: tuple[str, int], processes: int) -> None:
        """Tokenize `units` in at most `processes` processes; `cache` is (folder, limit in bytes) of their shards."""
        self._folder, self._cache = folder, cache
        self._units = queue.SimpleQueue[TextUnit]()
        for unit in units:
            self._units.put(unit)
        self._results = queue.SimpleQueue[tuple[TextUnit, UnitReport] | BaseException]()
        self._remaining, self.done_bytes = len(units), 0
        wanted = -(-sum(unit.num_bytes for unit in units) // _BYTES_PER_PROCESS)
        self._count = max(1, min(processes, _MAX_PROCESSES, len(units), wanted))
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TextPool:
        for _ in range(self._count if self._remaining else 0):
            process = self._start()
            self._processes.append(process)
            threading.Thread(target=self._serve, args=(process,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        # In a separate session, an interrupt from the keyboard does not reach the process, only the run.
        environment = {**os.environ, "RAYON_NUM_THREADS": "1"} if self._count > 1 else dict(os.environ)
        process = subprocess.Popen(
            [sys.executable, "-m", "open_lm.data.text_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )
        folder, limit = self._cache
        setup = {"folder": self._folder.path, "cache": folder, "cache_limit_bytes": limit, "stall_s": _STALL_S}
        _send(process, setup)
        return process

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Pass units to a process until none remain. Runs in a separate thread."""
        try:
            while True:
                unit = self._units.get_nowait()
                self._results.put((unit, _answer(process, unit)))
        except queue.Empty:
            process.stdin.close() if process.stdin is not None else None
        except BaseException as error:
            self._results.put(error)

    def work(self, seconds: float, is_stopped: Callable[[], bool] = lambda: False) -> list[UnitReport]:
        """Return the reports that arrive within `seconds`. Return earlier once all are done or `is_stopped()`.

        Raises:
            UserError: a process reported it.
            DataError: a process ended without an answer.
        """
        reports: list[UnitReport] = []
        end = time.monotonic() + seconds
        while self._remaining and time.monotonic() < end and not is_stopped():
            try:
                result = self._results.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(result, BaseException):
                raise result
            unit, report = result
            self._remaining -= 1
            self.done_bytes += unit.num_bytes
            reports.append(report)
        return reports


def _send(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(orjson.dumps(escaped(request), option=orjson.OPT_APPEND_NEWLINE))
        process.stdin.flush()
    except BrokenPipeError:
        pass  # `_answer` reports that the process ended


def _answer(process: subprocess.Popen[bytes], unit: TextUnit) -> UnitReport:
    _send(process, unit.to_json())
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        status = process.wait()
        files = ", ".join(dict.fromkeys(piece.url for piece in unit.pieces))
        raise DataError(
            f"{files}: the process that tokenized it ended with status {status}; see its messages above, or the kernel "
            "log if it was killed for memory. The same command continues the index"
        )
    answer = unescaped(orjson.loads(line))
    if "error" in answer:
        name, message = answer["error"]
        kind = getattr(errors, name, DataError)
        raise (kind if issubclass(kind, UserError) else DataError)(message)
    return UnitReport(**answer)
