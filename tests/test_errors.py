"""Test messages with several problems, and the exit of a process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm.errors import CLOSED_OUTPUT_EXIT_CODE, join_problems

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[1]


def test_nested_list_of_problems_is_indented() -> None:
    inner = join_problems(["one", "two"], "B is wrong")
    assert join_problems([inner]) == inner
    assert join_problems(["A is wrong", inner], "Found").splitlines() == [
        "Found (2):",
        "  1. A is wrong",
        "  2. B is wrong (2):",
        "     1. one",
        "     2. two",
    ]


def test_end_process_runs_exit_functions_and_returns_the_code() -> None:
    code = (
        "import atexit, sys; from open_lm.errors import end_process\n"
        "atexit.register(print, 'registered'); sys.stdout.write('written '); end_process(7)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (7, "written registered\n")


@pytest.mark.parametrize(
    ("command", "codes"),
    [
        (["open_lm.main", "--help"], (0, CLOSED_OUTPUT_EXIT_CODE)),
        (["open_lm.main", "--version"], (0, CLOSED_OUTPUT_EXIT_CODE)),
        (["open_lm.plan", "--model", "open_lm_11m"], (0, CLOSED_OUTPUT_EXIT_CODE)),
        (["open_lm.utils.inspect_shards", "no such folder"], (2,)),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_output_ends_a_command_without_a_traceback(
    command: list[str], codes: tuple[int, ...], unbuffered: str
) -> None:
    """The reader of the pipe has ended, like `head` after its lines."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(
            [sys.executable, "-m", *command],
            stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    finally:
        os.close(write_end)
    assert result.returncode in codes
    assert "BrokenPipe" not in result.stderr and "Traceback" not in result.stderr


def test_broken_connection_is_not_taken_for_a_closed_output() -> None:
    code = (
        "import socket; from open_lm.errors import run_cli\n"
        "def main(argv):\n"
        "    a, b = socket.socketpair(); b.close(); a.send(b'x')\n"
        "run_cli(main, [])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "BrokenPipeError" in result.stderr


def test_no_temporary_folder_is_one_line() -> None:
    """A process that may not write files finds no usable temporary folder, as on a full disk."""
    code = (
        "import sys, tempfile; from open_lm.errors import run_cli; sys.exit(run_cli(lambda _: tempfile.mkdtemp(), []))"
    )

    def forbid_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=forbid_files
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: no temporary folder can be written") and "set TMPDIR" in result.stderr
