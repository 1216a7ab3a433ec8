"""Small training runs in this process, and what their logs record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import SEQ_LEN, VOCAB_SIZE

from open_lm.main import main
from open_lm.training.trainer import Trainer

BATCH = 4


def tiny_flags(folder: Path, logs: Path) -> list[str]:
    """Return the flags of a tiny model, whose JSON file is written to `folder`; tests add the data."""
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE}
    (folder / "model.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    return [
        "--model", str(folder / "model.json"), "--data-key", "npy", "--global-batch-size", str(BATCH),
        "--warmup", "2", "--precision", "fp32", "--log-every-n-steps", "1", "--lr", "3e-2", "--workers", "0",
        "--logs", str(logs),
    ]  # fmt: skip


def tokens(steps: int) -> str:
    return str(steps * BATCH * SEQ_LEN)


def train(flags: list[str], data: str, steps: int, *more: str, epochs: int = 1) -> None:
    main([*flags, "--dataset-manifest", data, "--train-num-samples", tokens(steps), "--epochs", str(epochs), *more])


def train_rows(run: Path) -> list[dict[str, Any]]:
    """Return the training lines of metrics.jsonl."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "train/loss" in row]


def before_step(step: int, do: Callable[[], None], patches: pytest.MonkeyPatch) -> None:
    """Call `do` before a step of the trainer, as long as `patches` apply."""
    original = Trainer._train_step

    def train_step(trainer: Trainer, batch: Any) -> Any:
        if trainer.step == step:
            do()
        return original(trainer, batch)

    patches.setattr(Trainer, "_train_step", train_step)
