"""Only one process at a time uses a run's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm.errors import ConfigError
from open_lm.monitor import run_folder
from open_lm.monitor.run_folder import RunPaths

pytestmark = pytest.mark.processes

HOLD_LOCK = """
import sys
from open_lm.monitor.run_folder import RunPaths
with RunPaths(sys.argv[1], "run").lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    run_paths = RunPaths(str(tmp_path), "run")
    run_paths.prepare(None)
    return run_paths


def hold_lock(paths: RunPaths) -> subprocess.Popen[str]:
    """Start a process that holds the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, paths.logs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_the_error_names_the_process_that_holds_the_lock(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_WAIT_S", 0.0)
    with hold_lock(paths) as process:
        message = f"--name run: process {process.pid} on .* is using {paths.root}"
        with pytest.raises(ConfigError, match=message), paths.lock():
            pass
        process.kill()
    with paths.lock():
        pass


def test_lock_waits_for_a_process_that_is_about_to_end(paths: RunPaths) -> None:
    with hold_lock(paths) as process:
        assert process.stdin is not None
        process.stdin.close()  # the process ends before or while the next line waits
        with paths.lock():
            assert os.listdir(paths.root)
    assert process.returncode == 0


def test_forked_children_do_not_inherit_the_lock(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_WAIT_S", 0.0)
    reader, writer = os.pipe()
    with paths.lock():
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)  # until the parent closes the pipe
            os._exit(0)
    holder = hold_lock(paths)
    holder.kill()
    holder.communicate()
    os.close(reader)
    os.close(writer)
    os.waitpid(child, 0)


def test_a_run_without_logs_creates_no_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunPaths("none", "run").lock():
        assert not list(tmp_path.iterdir())
