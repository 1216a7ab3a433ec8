"""A hanging run ends with the stacks of all ranks; a run with a failed or killed rank ends with that rank's error."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import fault_helpers
import pytest
import torch.distributed as dist

from open_lm.distributed.processes import Runtime
from open_lm.errors import WATCHDOG_EXIT_CODE
from open_lm.monitor import watchdog
from open_lm.monitor.watchdog import RankStatus, Watchdog

pytestmark = pytest.mark.processes

SINGLE_PROCESS = """
import sys, threading
from open_lm.monitor import watchdog
from open_lm.distributed.processes import Runtime
with watchdog.Watchdog(0.5, Runtime(), sys.argv[1]):
    watchdog.heartbeat("reading", 3)
    {}
"""


def test_a_hang_is_reported_with_all_ranks(tmp_path: Path) -> None:
    code, output = fault_helpers.run(tmp_path, "hang")
    assert code == WATCHDOG_EXIT_CODE, output
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "no rank made progress for 3 s" in line
    assert "rank 0 at step 3 (step)" in line and "rank 1 at step 3 (waiting for data)" in line
    stacks = {rank: (tmp_path / f"stacks/stacks_rank_{rank}.txt").read_text() for rank in range(2)}
    assert " in barrier" in stacks[0] and " in barrier" not in stacks[1]
    assert all("the run hangs" in text and " in hang" in text for text in stacks.values())
    assert all(line in output for text in stacks.values() for line in text.partition("Collective")[0].splitlines())
    records = [json.loads((tmp_path / f"stacks/flight_recorder_rank_{rank}.json").read_text()) for rank in range(2)]
    numbers = [[entry["collective_seq_id"] for entry in record["gloo"]["entries"]] for record in records]
    assert len(numbers[0]) == len(numbers[1]) + 1, "rank 1 has not called the operation in which rank 0 waits"
    assert f"not complete: gloo:barrier number {max(numbers[0])} of group" in stacks[0]


@pytest.mark.parametrize(
    ("statements", "code"),
    [
        ("threading.Event().wait()", WATCHDOG_EXIT_CODE),
        (
            "with watchdog.long_operation('compiling'): threading.Event().wait(1)\n"
            "    for _ in range(8): watchdog.heartbeat('validating'); threading.Event().wait(0.1)\n"
            "    watchdog.heartbeat('first step', extra_time_s=60); threading.Event().wait(1)",
            0,
        ),
    ],
)
def test_a_single_process_is_watched(tmp_path: Path, statements: str, code: int) -> None:
    command = [sys.executable, "-c", SINGLE_PROCESS.format(statements), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert result.returncode == code, result.stderr
    assert (tmp_path / "stacks_rank_0.txt").exists() == (code == WATCHDOG_EXIT_CODE)
    assert ("rank 0 at step 3 (reading)" in result.stderr) == (code == WATCHDOG_EXIT_CODE)


def test_the_report_starts_with_the_smallest_group_of_ranks() -> None:
    statuses = {rank: RankStatus(1, 12, "step", 0.0) for rank in range(6)}
    statuses[3] = RankStatus(1, 12, "waiting for data", 0.0)
    report = Watchdog(60, Runtime(world_size=6))._hang_report(statuses)
    assert "Last progress: rank 3 at step 12 (waiting for data), ranks 0-2, 4-5 at step 12 (step)" in report


def test_a_rank_that_does_not_respond_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = Watchdog(60, Runtime(world_size=2))

    class Store(dict[str, str]):
        def check(self, keys: list[str]) -> bool:
            return all(key in self for key in keys)

    published = '{"number": 4, "step": 1, "phase": "step", "remaining_s": 50}'
    dog._store = Store({"status/0": published})  # type: ignore[assignment]
    assert dog._statuses()[0].remaining_s == 50
    now[0] = 59.0
    assert dog._statuses()[0] == RankStatus(4, 1, "step; not responding", -9.0)
    assert dog._statuses()[1].phase == "not started; not responding"


def test_ranks_without_a_time_limit_exchange_their_statuses() -> None:
    dog = Watchdog(0, Runtime(world_size=2))
    dog._store = dist.HashStore()
    assert dog._publish(dog._local_status()) is None
    assert dog._statuses()[0].remaining_s == math.inf


def test_a_failed_rank_reports_its_error_first_and_a_restart_keeps_the_name(tmp_path: Path) -> None:
    code, output = fault_helpers.run(tmp_path, "fail", "--max-restarts", "1")
    assert code == 0, output
    assert output[output.index("Traceback") :].partition("Error")[0].count("Traceback") == 1
    assert "ZeroDivisionError: the cause" in output and "gloo/transport" not in output
    names = {path.name: path.read_text() for path in tmp_path.glob("name_*")}
    assert len(names) == 4 and len(set(names.values())) == 1


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    code, output = fault_helpers.run(tmp_path, "die")
    assert code == 1
    assert "Signal 9 (SIGKILL)" in output and "gloo/transport" not in output
