"""The end-to-end pipeline: settings, state, and the debug form offline, interrupted and continued."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
E2E = ROOT / "scripts" / "e2e"
SMALL = {
    "text.offline_mb": 0.4, "text.offline_vocab_size": 512, "preprocess.ray-address": "null", "launcher": "''",
    "model.hidden_dim": 32, "model.n_layers": 2, "model.n_heads": 2, "model.ffn_dim": 128, "model.seq_len": 64,
    "train.train-num-samples": 4096, "train.epochs": 2, "train.global-batch-size": 8, "train.warmup": 2,
    "train.icl-max-examples": 8, "train.icl-every-n-steps": 8, "train.log-every-n-steps": 1,
    "train.save-every-n-steps": 4, "train.fsdp": "false", "train.workers": 0,
}  # fmt: skip
pytestmark = pytest.mark.processes


def small_flags(**changes: object) -> list[str]:
    values = {**SMALL, **{name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}}
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def start(folder: Path, *flags: str, script: str = "run_pre_training_e2e_debug.sh") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OPEN_LM_EVAL_PYTHON": "/nowhere"}
    command = [str(ROOT / "scripts" / script), "--offline", "--work-dir", str(folder), *flags]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(folder: Path, *flags: str, code: int = 0, script: str = "run_pre_training_e2e_debug.sh") -> str:
    with start(folder, *flags, script=script) as process:
        output, _ = process.communicate()
    assert process.returncode == code, output[-6000:]
    return output


def test_dry_run_prints_every_command_of_the_full_form(tmp_path: Path) -> None:
    output = subprocess.run(
        [str(ROOT / "scripts" / "run_pre_training_e2e.sh"), "--dry-run", "--work-dir", str(tmp_path / "work")],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "HuggingFaceFW/fineweb-edu" in output and "--subset sample-10BT" in output
    assert "open_lm.utils.torchrun --nproc-per-node gpu -m open_lm.main" in output
    assert "hellaswag.yaml" in output and "hf.convert export" in output
