"""Test what DCLM's evaluation script uses of this package in the environment of llm-foundry."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from eval_environment import EVAL_PYTHON, ROOT, needs_eval_environment

pytestmark = [pytest.mark.processes, needs_eval_environment]


def test_perplexity_sets_of_dclm(shared_dir: Path) -> None:
    """get_data and evaluate_loop give the losses that the original code gave for the same checkpoint."""
    run = shared_dir / "compat" / "run"
    command = [EVAL_PYTHON, str(ROOT / "tests" / "helpers" / "dclm_perplexity.py"), str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout.splitlines()[-1])
    lines = (run / "logs/upstream/checkpoints/results.jsonl").read_text().splitlines()
    for actual, golden in zip(results, json.loads(lines[-1]), strict=True):
        assert actual["loss"] == pytest.approx(golden["loss"], abs=1e-4)
        assert (actual["sequences"], actual["tokens"]) == (golden["sequences"], golden["tokens"])
        assert actual["loss_tokens_lower_95"] < actual["loss"] < actual["loss_tokens_upper_95"]
        assert actual["loss_sequences_lower_95"] < actual["loss"] < actual["loss_sequences_upper_95"]
