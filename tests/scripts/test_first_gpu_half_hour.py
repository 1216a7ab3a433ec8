"""The half hour of checks on a GPU: its steps on a CPU, and what it does if steps fail or take too long."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import first_gpu_half_hour
import gpu_steps
import pytest
from first_gpu_half_hour import main, run_all
from gpu_steps import STEPS, Found, GpuStep, Machine, run_step

CPU = Machine(is_cpu=True)


def test_checks_run_on_a_cpu(tmp_path: Path) -> None:
    for name in ("device", "waits", "kernels"):
        found = run_step(name, CPU, tmp_path)
        assert found.ok is not False and found.text, name
    (tmp_path / "1b.json").write_text(json.dumps({"text": "", "ok": None, "values": {"memory_bytes": 1e9}}))
    (tmp_path / "11m.json").write_text(json.dumps({"text": "", "ok": None, "values": {"tokens_per_second": 10.0}}))
    assert "measured 1.00 GB" in run_step("planner", CPU, tmp_path).text
    assert "step 10" in run_step("loader", CPU, tmp_path).text


def test_a_measurement_is_compared_with_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bench_train.py has tests of its own; here its result is given."""

    def bench(command: list[str]) -> None:
        results = {"ours": {"speeds": [90.0, 100.0, 110.0], "memory_bytes": [5]}, "torchtitan": {"speeds": [80.0]}}
        entry = {"flops_per_token": 1.0, "results": results}
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"models": {"m": entry}}))

    monkeypatch.setattr(gpu_steps, "_run", bench)
    found = run_step("1b", CPU, tmp_path)
    assert found.values == {"tokens_per_second": 100.0, "memory_bytes": 5, "torchtitan": 80.0}
    assert "1.25 times torchtitan" in found.text and found.ok is True
    assert "1b has no result" in run_step("fp8", CPU, tmp_path).text
    (tmp_path / "1b.json").write_text(json.dumps({"text": "", "ok": None, "values": {"tokens_per_second": 50.0}}))
    assert "2.00 times 1b" in run_step("fp8", CPU, tmp_path).text


def test_failures_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, **_: object) -> subprocess.CompletedProcess[str]:
        name = command[command.index("--run") + 1]
        if name == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        if name != "broken":
            found = {"good": Found("1 | 2", True), "bad": Found("3", False), "open": Found("4")}[name]
            (tmp_path / f"{name}.json").write_text(json.dumps(vars(found)))
        return subprocess.CompletedProcess(command, int(name == "broken"))

    monkeypatch.setattr(first_gpu_half_hour.subprocess, "run", run)
    names = ("broken", "slow", "bad", "good", "open")
    for name in names:
        monkeypatch.setitem(STEPS, name, GpuStep(f"{name} result", 60, lambda machine, folder: Found("")))
    rows = run_all(tmp_path, names, CPU, 1000)
    assert [row.verdict for row in rows] == ["failed", "too slow", "differs", "as expected", "measured"]
    assert rows[0].found == "exit code 1, see broken.log"
    report = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in report["steps"]] == list(names)
    table = (tmp_path / "results.md").read_text().splitlines()
    assert len(table) == 2 + len(names) and table[2].startswith("| broken | broken result | exit code 1")
    assert "| 1 / 2 |" in table[5]
    (late,) = run_all(tmp_path, ["good"], CPU, 1)
    assert late.verdict == "no time left"
    with pytest.raises(SystemExit) as exit_status:
        main([str(tmp_path), "--cpu", "--only", "good;broken"])
    assert exit_status.value.code == 1
