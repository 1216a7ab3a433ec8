"""scripts/examples with a small random model on CPU ranks."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from run_helpers import train_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from open_lm.main import main

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "examples" / "llama2_7b_wikipedia.sh"
STEPS = 6
SETTINGS = {"STEPS": str(STEPS), "SAVE_EVERY": "1", "MILESTONE_EVERY": "3"}


@pytest.fixture(autouse=True)
def python(forked_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script and the ranks start without importing torch 15 times."""
    monkeypatch.setenv("PYTHON", forked_python)


def start(folder: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DIR": "wiki run", **settings}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finished(folder: Path, *arguments: str, code: int = 0, **settings: str) -> str:
    with start(folder, *arguments, **settings) as process:
        printed, _ = process.communicate()
    assert process.returncode == code, printed[-4000:]
    return printed


def test_llama2_7b_wikipedia(tmp_path: Path) -> None:
    """Stop the run on 8 ranks, continue it on one, and compare its losses with those of one process."""
    with start(tmp_path, "--tiny", **SETTINGS) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if f"Train Epoch: 0 [ 8/{8 * STEPS}" in line:  # step 1
                process.send_signal(signal.SIGTERM)
    printed = "".join(lines)
    assert process.returncode == 1 and "repeat the command to continue it" in printed, printed[-4000:]
    assert "total 8." in printed and "(epoch 0, step 0)" in printed
    folder = tmp_path / "wiki run"
    run = folder / "logs" / "run"
    steps_of_ranks = train_rows(run)[-1]["step"]
    assert 1 <= steps_of_ranks < STEPS

    alone = {"NPROC": "1", "MESH": "1,1,1", **SETTINGS}
    printed = finished(tmp_path, "--tiny", **alone)
    assert printed.count(": already done (") == 3 and "verified: the logits of" in printed
    rows = train_rows(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    checkpoints = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert checkpoints == {f"step_0000000{step}" for step in (3, 4, 5, 6)}  # milestones 3 and 6, the last two others
    assert finished(tmp_path, "--tiny", **alone).count(": already done (") == 5

    manifests = [str(folder / "data" / "64-v1" / name / "manifest.jsonl") for name in ("wiki", "cc_en")]
    main([
        "--model", str(folder / "model" / "model.json"), "--pretrained", str(folder / "model" / "epoch_0.pt"),
        "--dataset-manifest", *manifests, "--train-data-mix-weights", "90.91", "9.09", "--multiple-data-passes",
        "--data-key", "npy", "--workers", "0", "--train-num-samples", str(STEPS * 8 * 64), "--epochs", "1",
        "--global-batch-size", "8", "--lr", "1e-4", "--lr-cooldown-end", "1e-5", "--warmup", "1", "--eps", "1e-6",
        "--wd", "0.1", "--grad-clip-norm", "1", "--log-every-n-steps", "1", "--precision", "bf16",
        "--logs", str(tmp_path), "--name", "one",
    ])  # fmt: skip
    expected = [row["train/loss"] for row in train_rows(tmp_path / "one")]
    assert [row["train/loss"] for row in rows] == pytest.approx(expected, rel=1e-3)

    exported = folder / "exported"
    assert type(AutoModelForCausalLM.from_pretrained(exported)) is LlamaForCausalLM
    before, after = (load_file(path / "model.safetensors") for path in (folder / "llama", exported))
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    assert not torch.equal(after["lm_head.weight"].float(), before["lm_head.weight"].bfloat16().float())
    ids = [AutoTokenizer.from_pretrained(path)("A llama").input_ids for path in (folder / "llama", exported)]
    assert ids[0] == ids[1] and len(ids[0]) == 7


def test_files_of_the_mixture_are_required(tmp_path: Path) -> None:
    assert "WIKI: set it to the files of Wikipedia" in finished(tmp_path, code=1)
