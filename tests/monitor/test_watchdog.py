"""A run that hangs ends with the stacks of all ranks; one whose rank fails or dies ends with that rank's own error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fault_helpers
import pytest

from open_lm.distributed.processes import Runtime
from open_lm.errors import HUNG
from open_lm.monitor import watchdog
from open_lm.monitor.watchdog import Stand, Watchdog

ALONE = """
import sys, threading
from open_lm.monitor import watchdog
from open_lm.distributed.processes import Runtime
with watchdog.Watchdog(0.5, Runtime(), sys.argv[1]):
    watchdog.beat("reading", 3)
    {}
"""


def test_a_hanging_rank_is_found_by_all(tmp_path: Path) -> None:
    code, said = fault_helpers.run(tmp_path, "hang")
    assert code == HUNG, said
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "no rank got on for 3 s" in line
    assert "rank 0 at step 3 (step)" in line and "rank 1 at step 3 (waiting for data)" in line
    stacks = {rank: (tmp_path / f"stacks/rank_{rank}.txt").read_text() for rank in range(2)}
    assert " in barrier" in stacks[0] and " in barrier" not in stacks[1]
    assert all(
        "the run hangs" in text and " in hang" in text and text.splitlines()[-1] in said for text in stacks.values()
    )


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("threading.Event().wait()", HUNG),
        (
            "with watchdog.long_operation('compiling'): threading.Event().wait(1)\n"
            "    for _ in range(8): watchdog.beat('validating'); threading.Event().wait(0.1)\n"
            "    watchdog.heartbeat('first step', extra_time_s=60); threading.Event().wait(1)",
            0,
        ),
    ],
)
def test_a_single_process_is_watched_too(tmp_path: Path, then: str, code: int) -> None:
    command = [sys.executable, "-c", ALONE.format(then), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert result.returncode == code, result.stderr
    assert (tmp_path / "rank_0.txt").exists() == (code == HUNG)
    assert ("rank 0 at step 3 (reading)" in result.stderr) == (code == HUNG)


def test_those_who_stand_elsewhere_come_first() -> None:
    dog = Watchdog(60, Runtime(world_size=6))
    stands = {rank: Stand(1, 12, "step", 0.0) for rank in range(6)} | {3: Stand(1, 12, "waiting for data", 0.0)}
    assert "Standing: rank 3 at step 12 (waiting for data), ranks 0-2, 4-5 at step 12 (step)" in dog._verdict(stands)


def test_a_silent_rank_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = Watchdog(60, Runtime(world_size=2))

    class Store(dict[str, str]):
        def check(self, keys: list[str]) -> bool:
            return all(key in self for key in keys)

    dog._store = Store({"stand/0": '{"number": 4, "step": 1, "phase": "step", "left_s": 50}'})  # type: ignore[assignment]
    assert dog._stands()[0].remaining_s == 50
    now[0] = 59.0
    assert dog._stands()[0] == Stand(4, 1, "step; its process is silent", -9.0)
    assert dog._stands()[1].phase == "not started; its process is silent"


def test_a_rank_that_fails_has_the_first_word_and_a_restart_its_name(tmp_path: Path) -> None:
    code, said = fault_helpers.run(tmp_path, "fail", "--max-restarts", "1")
    assert code == 0, said
    assert said[said.index("Traceback") :].partition("Error")[0].count("Traceback") == 1
    assert "ZeroDivisionError: the cause" in said and "gloo/transport" not in said
    names = {path.name: path.read_text() for path in tmp_path.glob("name_*")}
    assert len(names) == 4 and len(set(names.values())) == 1


def test_a_rank_that_is_killed_ends_all(tmp_path: Path) -> None:
    code, said = fault_helpers.run(tmp_path, "die")
    assert code == 1
    assert "Signal 9 (SIGKILL)" in said and "gloo/transport" not in said
