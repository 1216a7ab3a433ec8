"""Tiny runs that evaluate tasks and sample text while they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from open_lm.main import main

STEPS, BATCH, SEQ_LEN = 6, 4, 32
SHAPE = {
    "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": 512, "post_embed_norm": False,
    "weight_tying": False, "residual_dropout": 0.1,
}  # fmt: skip
TASKS = """
data_dir: .
icl_tasks:
  - {label: choose, dataset_uri: "${data_dir}/choose.jsonl", num_fewshot: [0, 1], icl_task_type: multiple_choice}
  - {label: continue, dataset_uri: "${data_dir}/continue.jsonl", num_fewshot: [0], icl_task_type: language_modeling}
  - label: answer
    dataset_uri: ${data_dir}/answer.jsonl
    num_fewshot: [1]
    icl_task_type: generation_task_with_answers
"""


def write_inputs(folder: Path) -> None:
    """Write the model, the tasks with their data, and a file with two prompts."""
    (folder / "model.json").write_text(json.dumps(SHAPE))
    (folder / "tasks.yaml").write_text(TASKS)
    rows: dict[str, list[dict[str, Any]]] = {
        "choose": [{"query": f"{n} and", "choices": [f"{n}", "no"], "gold": n % 2} for n in range(20)],
        "continue": [{"context": f"the number {n} is", "continuation": str(n)} for n in range(7)],
        "answer": [{"context": f"{n}+1", "answer": str(n + 1)} for n in range(5)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "prompts.txt").write_text("the first\u2028line\n\nand another\r\n", encoding="utf-8", newline="")


def train(folder: Path, name: str, *flags: str, steps: int = STEPS, epochs: int = 1) -> Path:
    """Train the model of `write_inputs` on random tokens; return the run's folder."""
    main([
        "--model", str(folder / "model.json"), "--dataset-type", "synthetic", "--global-batch-size", str(BATCH),
        "--train-num-samples", str(steps // epochs * BATCH * SEQ_LEN), "--epochs", str(epochs), "--warmup", "2",
        "--precision", "fp32", "--lr", "1e-2", "--workers", "0", "--log-every-n-steps", "1", "--logs", str(folder),
        "--name", name, *flags,
    ])  # fmt: skip
    return folder / name


def evaluating(folder: Path, tokenizer: str, every: int = 2) -> list[str]:
    """Return the flags that evaluate the tasks and continue the prompts."""
    return [
        "--icl-yaml", str(folder / "tasks.yaml"), "--icl-every-n-steps", str(every), "--tokenizer", tokenizer,
        "--sample-prompts", str(folder / "prompts.txt"), "--sample-every-n-steps", str(every),
        "--sample-temperature", "0", "0.9", "--sample-max-tokens", "5",
    ]  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of the training lines of metrics.jsonl."""
    lines = [row for row in rows(run / "metrics.jsonl") if "train/loss" in row]
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in lines]
