"""Test messages with several problems, and the exit of a process."""

from __future__ import annotations

import subprocess
import sys

from open_lm.errors import join_problems


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
