"""Run a small quickstart: from the text of the Python installation to a trained and evaluated model."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--text-mb", "0.4", "--tokens", "20000", "--epochs", "2", "--vocab-size", "512"]


def quickstart(python: str, folder: Path, *arguments: str, code: int = 0) -> str:
    command = [python, str(ROOT / "scripts" / "quickstart.py"), "--dir", "qs", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def test_quickstart_trains_a_model_and_skips_finished_steps(tmp_path: Path, forked_python: str) -> None:
    printed = quickstart(forked_python, tmp_path, *SMALL)
    folder = tmp_path / "qs"
    before, after = (json.loads((folder / f"evaluation-{name}.json").read_text()) for name in ("before", "after"))
    assert after["loss"] < before["loss"] - 0.3
    assert after["loss_sequences_lower_95"] < after["loss"] < after["loss_sequences_upper_95"]
    assert f"{before['loss']:.3f} before, {after['loss']:.3f} after training" in printed
    # Training started from the same weights as those of the first evaluation.
    first = json.loads((folder / "logs" / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["train/loss"] - before["loss"]) < 0.1
    assert list((folder / "logs" / "run" / "tensorboard").iterdir())
    assert len(json.loads((folder / "samples-after.json").read_text())) == 3
    assert " tokens/s on average" in printed

    (folder / "evaluation-after.json").unlink()  # simulate an interruption before this step
    again = quickstart(forked_python, tmp_path, *SMALL)
    assert again.count("already done") == 8 and "Evaluate the trained model\n" in again
    assert json.loads((folder / "evaluation-after.json").read_text())["loss"] == after["loss"]
    assert "vocab_size 512 -> 600" in quickstart(forked_python, tmp_path, *SMALL[:-1], "600", code=2)


def test_training_speed_is_the_average_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    quickstart_module = runpy.run_path(str(ROOT / "scripts" / "quickstart.py"))
    slow = {"step": 1, "tokens": 100, "train/batch_time": 7.0, "train/tokens_per_second": 100 / 7}
    fast = {"step": 4, "tokens": 400, "train/batch_time": 1.0, "train/tokens_per_second": 100.0}
    assert quickstart_module["average_speed"]([slow, fast]) == 400 / (7 + 3 * 1)


def test_python_docs_writes_disjoint_splits_of_the_requested_size(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "python_docs.py"), "--output-dir", str(tmp_path), "--max-mb", "1"]
    counts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    sources: dict[str, set[str]] = {"train": set(), "valid": set()}
    num_bytes = {"train": 0, "valid": 0}
    for path in tmp_path.glob("*.jsonl.zst"):
        split = "train" if path.name.startswith("train") else "valid"
        for line in zstandard.decompress(path.read_bytes()).splitlines():
            document = json.loads(line)
            sources[split].add(document["meta"]["source"])
            num_bytes[split] += len(document["text"].encode())
    assert sources["train"].isdisjoint(sources["valid"])
    assert (num_bytes["train"], num_bytes["valid"]) == (counts["train_bytes"], counts["valid_bytes"])
    assert 0.5e6 < sum(num_bytes.values()) <= 1e6
