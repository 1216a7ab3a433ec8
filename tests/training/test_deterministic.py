"""--deterministic: bit-identical runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from open_lm.checkpoint.tensor_index import StoredTensors
from open_lm.config.command_line import parse_args
from open_lm.config.layout import MeshLayout
from open_lm.config.sections import Config
from open_lm.model import attention
from open_lm.training.build import _create_model

pytestmark = pytest.mark.processes

FLAGS = (
    *("--model", "open_lm_test_tiny", "--dataset-type", "synthetic", "--train-num-samples", "8192", "--epochs", "1"),
    *("--global-batch-size", "4", "--workers", "0", "--precision", "amp_bfloat16", "--log-every-n-steps", "1"),
    *("--lr", "1e-2", "--warmup", "2", "--deterministic", "--logs", "logs"),
)


def numbers(folder: Path) -> list[dict[str, float]]:
    """Return the values of each log line that do not depend on time or memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("train/loss", "train/grad_norm", "train/lr", "tokens")
    return [{name: line[name] for name in kept} for line in lines if "train/loss" in line]


def test_two_runs_on_two_ranks_are_bit_identical(ranks: Callable[..., object], tmp_path: Path) -> None:
    for name in ("one", "two"):
        ranks(2, "open_lm.main", *FLAGS, "--fsdp", "--name", name)
    one, two = (tmp_path / "logs" / name for name in ("one", "two"))
    assert len(numbers(one)) > 3 and numbers(one) == numbers(two)
    (first,), (second,) = (sorted((folder / "checkpoints").glob("step_*")) for folder in (one, two))
    stored, again = StoredTensors(str(first)), StoredTensors(str(second))
    names = stored.names("model/")
    assert names and all(torch.equal(stored.read(name), again.read(name)) for name in names)


def test_xformers_attention_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_xformers", lambda: True)
    chosen = []
    for flags in (["--deterministic"], []):
        config = Config.from_namespace(parse_args(["--model", "open_lm_test_tiny", *flags]))
        chosen.append(_create_model(config, MeshLayout()).params.attn_func)
    assert chosen == [attention.torch_attn, attention.auto_attn]


def test_deterministic_mode_of_torch_is_enabled_first() -> None:
    code = (
        "import torch; from open_lm.distributed.rng import make_deterministic; make_deterministic()\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "import os; assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
