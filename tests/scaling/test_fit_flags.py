"""Defaults and combinations of flags of `fit`, and the text that it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from open_lm.errors import ConfigError
from open_lm.scaling import command
from open_lm.scaling.fitting import fit_runs
from open_lm.scaling.report_text import fit_text
from open_lm.scaling.runs import parse_run
from open_lm.scaling.settings import Settings

FAST = ("--law", "over-training", "--resamples", "20")


def run_of(params: float, multiplier: float) -> dict[str, Any]:
    loss = 1.8 + 170 * params**-0.27 + 290 * (params * multiplier) ** -0.27
    return {"params": int(params), "tokens": int(params * multiplier), "losses": {"val": loss}}


RUNS = [run_of(params, multiplier) for params in (1e7, 5e7, 2e8) for multiplier in (10, 20, 80)]


def test_a_table_with_one_validation_set_needs_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(RUNS), encoding="utf-8")
    outputs = []
    for name in ((), ("--loss", "val")):
        command.main(["fit", str(path), *name, *FAST])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith("loss on val, fitted to 9 runs")
    path.write_text(json.dumps([run | {"losses": {"a": 3.0, "b": 3.0}} for run in RUNS]), encoding="utf-8")
    with pytest.raises(ConfigError, match="--loss: found 'c4_val', expected one of a, b"):
        command.main(["fit", str(path), *FAST])
    with pytest.raises(ConfigError, match="--max-flops has no effect with --points paper"):
        command.main(["fit", str(path), "--points", "paper", "--max-flops", "1e20"])
    with pytest.raises(ConfigError, match="--error-tasks: found an empty name, which no run has"):
        command.main(["fit", str(path), "--error-tasks", ""])


def test_an_error_outside_of_0_to_1_is_no_prediction() -> None:
    law = {"coefficients": {"k": 1.0}, "at_bounds": [], "errors": [0.25, -3.0]}
    fit = fit_runs([parse_run(run) for run in RUNS], Settings("val", law="over-training", resamples=20))
    assert fit_text(fit, [], {"copa": law}).endswith("predicted 0.2500 (outside of 0 to 1)")


def test_a_solved_task_gives_finite_errors_and_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def solved(run: dict[str, Any]) -> dict[str, Any]:
        loss = run["losses"]["val"]
        return run | {"accuracy": {"easy": 1.0 if run["params"] == 2e8 else min(1.0, 4 - loss / 2)}}

    path, stored = tmp_path / "runs.json", tmp_path / "fit.json"
    path.write_text(json.dumps([solved(run) for run in RUNS]), encoding="utf-8")
    flags = ("--error-tasks", "easy", "--predict", "4e8:8e9", "--output", str(stored))
    command.main(["fit", str(path), *FAST, *flags])
    assert "null" not in json.dumps(json.loads(stored.read_text(encoding="utf-8"))["error"])
    capsys.readouterr()
    command.main(["predict", str(stored), "--json"])
    (prediction,) = json.loads(capsys.readouterr().out)["predictions"]
    assert all(value is not None for value in prediction["error_interval"])
