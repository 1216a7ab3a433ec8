"""Write a run's report.html while it trains and when it ends, without an effect on the training."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

# A refresh starts only if all refreshes together stay below this share of the time of one CPU core. The first one
# counts like one of `_FIRST_REFRESH_S`, so that short runs write their report only once, when they end.
TIME_SHARE = 0.02
_FIRST_REFRESH_S = 1.0
# A process of low priority: parsing a long metrics.jsonl in a thread would hold the interpreter's lock.
_REFRESH = "import os, sys; os.nice(19); from open_lm.report import refresh_report; refresh_report(sys.argv[1])"


class RunReport:
    """The report of a run.

    Args:
        folder: the run's folder; None for a run or a rank that writes no report.
        write: writes the report of the folder that it gets; open_lm.report.refresh_report, imported when it is called.
        time_share: share of the time that refreshes may take.
    """

    def __init__(self, folder: str | None, write: Callable[[str], object], time_share: float = TIME_SHARE) -> None:
        self._folder, self._write, self._time_share = folder, write, time_share
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self._last_s, self._last_end = _FIRST_REFRESH_S, time.monotonic()

    def refresh(self) -> None:
        """Start to write the report in the background, unless that is too early. Returns immediately; never fails."""
        if self._folder is None or (self._watcher is not None and self._watcher.is_alive()):
            return
        if time.monotonic() - self._last_end < self._last_s / self._time_share:
            return
        null = subprocess.DEVNULL
        command = [sys.executable, "-c", _REFRESH, self._folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        try:
            self._process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, env=environment)
        except OSError as error:
            logging.warning(f"cannot refresh the report in {self._folder}: {error}")
            return
        self._watcher = threading.Thread(target=self._measure, args=(self._process,), daemon=True)
        self._watcher.start()

    def finish(self) -> None:
        """Write the final report; a refresh that still runs ends without a result. Never fails."""
        if self._folder is None:
            return
        if self._watcher is not None and self._process is not None:
            self._process.kill()
            self._watcher.join()
        try:
            self._write(self._folder)
        except Exception as error:  # the run is complete without its report
            logging.warning(f"cannot write the report in {self._folder}: {type(error).__name__}: {error}")

    def _measure(self, process: subprocess.Popen[bytes]) -> None:
        start = time.monotonic()
        process.wait()
        self._last_end = time.monotonic()
        self._last_s = self._last_end - start
