"""The report of a run in progress: refreshes in the background, and the final report."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from open_lm.distributed.processes import Runtime
from open_lm.monitor.run_folder import RunPaths
from open_lm.report import refresh
from open_lm.report.refresh import RunReport
from open_lm.report.run_records import RunRecords

# A refresh that holds the file "lock" until it ends, and waits inside the write of the report.
SLOW = """
import fcntl, sys, time
sys.path[:] = sys.argv[3:]
from open_lm import storage
from open_lm.report import refresh

def write(runs, out):
    lock = open(f"{runs[0]}/lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with storage.atomic_write(out) as file:
        file.write(b"half")
        open(f"{runs[0]}/started", "w").close()
        time.sleep(600)

refresh.write_report = write
refresh.main(sys.argv[1], int(sys.argv[2]))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run whose refreshes are SLOW."""
    monkeypatch.setattr(refresh, "_COMMAND", SLOW)
    folder = tmp_path / "run"
    folder.mkdir()
    os.mkfifo(folder / "started")
    return folder


def wait_until_started(run: Path) -> None:
    with open(run / "started"):  # waits for the writer
        return


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()} - {"lock", "started"}


def test_the_report_is_written_at_the_end_and_a_failure_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(refresh, "write_report", lambda runs, out: written.append(out))
    paths = RunPaths(str(tmp_path), "run")
    paths.prepare(None)
    for report in ("html", "none"):
        records = RunRecords(paths, Runtime(), SimpleNamespace(energy="none", report=report), step=0)
        records.update()
        assert len(written) == (report == "none"), "too early for a refresh"
        records.finish()
    assert written == [str(tmp_path / "run/report.html")]

    def fail(runs: list[str], out: str) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(refresh, "write_report", fail)
    RunReport(str(tmp_path)).finish()
    assert "cannot write the report" in caplog.text and "ValueError: broken" in caplog.text


def test_a_run_without_plotly_ends_without_a_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_lm.report import figures

    monkeypatch.setitem(sys.modules, "plotly", None)
    figures._plotly.cache_clear()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "tokens": 8, "train/loss": 2.0}\n')
    RunReport(str(tmp_path)).finish()
    assert len(caplog.records) == 1 and "the package plotly is not installed" in caplog.text
    assert names(tmp_path) == {"metrics.jsonl"}


@pytest.mark.processes
def test_refreshes_are_one_process_without_torch_and_with_a_limited_share_of_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "_COMMAND", f"import sys; sys.modules['torch'] = None\n{refresh._COMMAND}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "tokens": 8, "train/loss": 2.0}\n')
    report = RunReport(str(tmp_path), time_share=1e12)
    report.refresh()
    process = report._process
    assert process is not None
    report.refresh()
    assert report._process is process, "no second one"
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert names(tmp_path) == {"metrics.jsonl", "report.html"}
    report._time_share = 1e-12
    report.refresh()
    assert report._process is None and report._last_s > 0, "the share is used up"
    assert process.returncode == 0


@pytest.mark.processes
def test_the_end_of_the_run_ends_a_refresh_without_a_half_file(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = RunReport(str(run), time_share=1e12)
    report.refresh()
    wait_until_started(run)
    assert len(names(run)) == 1, "the temporary file"
    process = report._process
    report.finish()
    assert process is not None and process.returncode == 128 + signal.SIGTERM
    assert names(run) == set() and "expected the folder of a run" in caplog.text, "the final one ran afterwards"


@pytest.mark.processes
def test_a_refresh_ends_with_a_trainer_that_is_killed(run: Path) -> None:
    trainer = (
        "import sys\nfrom open_lm.report import refresh\nrefresh._COMMAND = sys.argv[2]\n"
        "refresh.RunReport(sys.argv[1], time_share=1e12).refresh()\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", trainer, str(run), SLOW]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_until_started(run)
        process.kill()
    with open(run / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits for the end of the refresh
    assert names(run) == set()
