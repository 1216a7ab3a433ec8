"""The chain of stages after pretraining, in its shortest form: each stage starts from the result of another."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "e2e" / "posttrain_tiny.sh"
SIZES = {"DOCUMENTS": 40, "PRETRAIN_TOKENS": 2048, "SFT_PASSES": 1, "DPO_PASSES": 0.1, "GRPO_STEPS": 1}


def run(folder: Path, python: str) -> list[str]:
    sizes = {name: str(value) for name, value in {**SIZES, "DISTIL_PASSES": 1, "OMP_NUM_THREADS": 1}.items()}
    environment = {**os.environ, **sizes, "PYTHON": python, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([SCRIPT, str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.processes
def test_every_stage_starts_from_the_previous_one_and_is_evaluated(tmp_path: Path, forked_python: str) -> None:
    lines = run(tmp_path, forked_python)
    assert lines[-7] == "| stage | exact_match | answer_format | counting | sums |"
    stages = [row["stage"] for row in json.loads((tmp_path / "stages.json").read_text())]
    assert stages == ["pretrain", "sft", "dpo", "grpo", "distil"] == [line.split()[1] for line in lines[-5:]]
    for name, start in {"sft": "pretrain", "dpo": "sft", "grpo": "dpo"}.items():
        assert f"pretrained: {tmp_path}/{start}" in (tmp_path / name / "params.txt").read_text()
    assert run(tmp_path, forked_python) == lines[-7:]  # no stage is repeated
