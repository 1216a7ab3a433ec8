"""One process at a time works in a run's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm.errors import ConfigError
from open_lm.monitor import run_folder
from open_lm.monitor.run_folder import RunPaths

HOLD = """
import sys
from open_lm.monitor.run_folder import RunPaths
with RunPaths(sys.argv[1], "run").locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    made = RunPaths(str(tmp_path), "run")
    made.prepare(None)
    return made


def hold(paths: RunPaths) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, paths.logs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_is_there(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_WAIT_S", 0.0)
    with hold(paths) as process:
        told = f"--name run: process {process.pid} on .* is working in {paths.root}"
        with pytest.raises(ConfigError, match=told), paths.lock():
            pass
        process.kill()
    with paths.lock():
        pass


def test_one_that_is_about_to_end_is_waited_for(paths: RunPaths) -> None:
    with hold(paths) as process:
        assert process.stdin is not None
        process.stdin.close()  # it ends while the next line waits, or has just done so
        with paths.lock():
            assert os.listdir(paths.root)
    assert process.returncode == 0


def test_children_of_the_process_do_not_hold_it(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_WAIT_S", 0.0)
    reader, writer = os.pipe()
    with paths.lock():
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)  # until its parent lets it go
            os._exit(0)
    held = hold(paths)
    held.kill()
    held.communicate()
    os.close(reader)
    os.close(writer)
    os.waitpid(child, 0)


def test_a_run_that_writes_nothing_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunPaths("none", "run").lock():
        assert not list(tmp_path.iterdir())
