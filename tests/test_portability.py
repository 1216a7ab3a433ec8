"""The package without the functions that only Linux has, as on macOS."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import write_source

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.processes
# Tests of the code that has a second way for other systems, and of locks, temporary files and processes.
TESTS = (
    "tests/data/test_cache.py",
    "tests/monitor/test_run_folder.py",
    "tests/storage/test_storage.py",
    "tests/datapreprocess/test_progress.py",
    "tests/utils/test_inspect_shards.py",
)
SLOW_OR_OF_LINUX = "not s3 and not kernel and not many_processes and not sources"


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tests/helpers/without_linux.py"), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def test_data_are_loaded_by_spawned_workers(tmp_path: Path) -> None:
    assert "equal batches" in run("loader", write_source(tmp_path, [40, 40]))


def test_all_modules_can_be_imported_and_selected_tests_pass() -> None:
    output = run("pytest", "-q", "-p", "no:cacheprovider", "-k", SLOW_OR_OF_LINUX, *TESTS)
    assert int(output.split()[0]) > 150 and "[100%]" in output
