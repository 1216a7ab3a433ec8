"""The ladder of tiny models in its shortest form: the prediction is written before its target is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "e2e" / "ladder_tiny.sh"
SHORT = {
    "SIZES": "2e4 8e4 2e5", "RUN_TOKENS": "1e3 2e3 4e3", "TARGET": "5e5:4e3", "SEQ_LEN": "32", "TEXT_MB": "0.1",
    "VALID_KB": "4", "RESAMPLES": "40", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def run(folder: Path) -> list[str]:
    text = folder.parent / "text.txt"
    numbers = (n * n % 97 for n in range(3000))
    lines = (f"This line of text has the number {number} and its square {number**2}.\n" for number in numbers)
    text.write_text("".join(lines), encoding="utf-8")
    environment = {**os.environ, **SHORT, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    command = [SCRIPT, str(folder), "--data", str(text)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.processes
def test_the_target_is_predicted_before_it_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "ladder of a test"
    lines = run(folder)
    assert any(line.startswith("estimate: ") for line in lines)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    (prediction,) = result["predictions"]
    measured = prediction["measured"]
    assert result["created"] <= measured["started"] <= measured["ended"]
    assert measured["loss_difference"] == pytest.approx(prediction["loss"] / measured["loss"] - 1)
    assert len(json.loads((folder / "runs.json").read_text(encoding="utf-8"))) == 9
    assert f"{measured['loss']:.4f}" in (folder / "report.html").read_text(encoding="utf-8")
    assert run(folder) == lines[-3:]  # no step is repeated
