"""Write a run's report.html while it trains and when it ends, without an effect on the training."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time

from open_lm import storage
from open_lm.report import REPORT_FILE, write_report

# A refresh starts only if the CPU time of all refreshes stays below this share of the time of one core. The first one
# counts like one of `_FIRST_REFRESH_S`, so that short runs write their report only once, when they end.
TIME_SHARE = 0.02
_FIRST_REFRESH_S = 1.0
_STOP_S = 5.0  # time for a refresh to remove its temporary file
_POLL_S = 0.5
# The modules of the refresh are those of this process, whatever the working directory has.
_COMMAND = (
    "import sys; sys.path[:] = sys.argv[3:]\n"
    "from open_lm.report.refresh import main; main(sys.argv[1], int(sys.argv[2]))"
)


class RunReport:
    """The report of a run.

    Refreshes are processes of low priority: parsing a long metrics.jsonl in a thread would hold the interpreter's lock.

    Args:
        folder: the run's folder; None for a run or a rank that writes no report.
        time_share: share of the time of a core that refreshes may take.
    """

    def __init__(self, folder: str | None, time_share: float = TIME_SHARE) -> None:
        self._folder, self._time_share = folder, time_share
        self._process: subprocess.Popen[bytes] | None = None
        self._last_start, self._last_s = time.monotonic(), _FIRST_REFRESH_S

    def refresh(self) -> None:
        """Start to write the report in the background, unless that is too early. Returns immediately; never fails."""
        if self._folder is None or self._is_running():
            return
        if time.monotonic() - self._last_start < self._last_s / self._time_share:
            return
        null = subprocess.DEVNULL
        command = [sys.executable, "-c", _COMMAND, self._folder, str(os.getpid()), *sys.path]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._last_start = time.monotonic()
        try:
            self._process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, env=environment)
        except OSError as error:
            logging.warning(f"cannot refresh the report in {self._folder}: {error}")

    def finish(self) -> None:
        """Write the final report; a refresh that still runs ends without a result. Never fails."""
        if self._folder is None:
            return
        if self._is_running():
            self._stop()
        refresh_report(self._folder)

    def _is_running(self) -> bool:
        """Return whether a refresh is running; of one that has ended, read the CPU time."""
        if self._process is None:
            return False
        try:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        except ChildProcessError:  # another part of this process has waited for it
            self._process, self._last_s = None, time.monotonic() - self._last_start
            return False
        if pid == 0:
            return True
        self._last_s = usage.ru_utime + usage.ru_stime
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._process = None
        return False

    def _stop(self) -> None:
        assert self._process is not None
        for stop in (self._process.terminate, self._process.kill):
            stop()
            try:
                self._process.wait(_STOP_S)
                return
            except subprocess.TimeoutExpired:
                continue  # such as a process that waits for a disk


def refresh_report(folder: str) -> None:
    """Write report.html in the folder of a run. Never raises: a problem is logged as one warning."""
    try:
        write_report([folder], storage.join(folder, REPORT_FILE))
    except Exception as error:  # the run is complete without its report
        logging.warning(f"cannot write the report in {folder}: {type(error).__name__}: {error}")


def main(folder: str, trainer: int) -> None:
    """Write the report of a run at low priority. End together with the process `trainer`, without a half file."""
    os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the trainer, which ends this process
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    threading.Thread(target=_watch, args=(trainer,), daemon=True).start()
    refresh_report(folder)


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)  # unlike the default action, removes the temporary file


def _watch(trainer: int) -> None:
    while os.getppid() == trainer:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
