"""A tiny run from raw text, with validation, a task and samples, and a paper."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tokenizer_helpers import write_tokenizer

from open_lm.datapreprocess import make_2048
from open_lm.main import main

STEPS, BATCH, SEQ_LEN = 6, 4, 32
SENTENCES = ("The river {} flows past the old mill.", "A list of {} names follows.", "Nobody knew what {} meant.")
PARAGRAPH = (
    "We train a very small language model from raw text and measure how its loss changes. The model reads bytes, so "
    "its vocabulary is tiny, and the whole experiment ends within seconds on a single processor. We report all numbers "
    "that the training program has written, and describe the data, the settings and the evaluation in detail. "
)


def write_raw(folder: Path, documents: int, seed: int) -> Path:
    """Write documents as JSON lines."""
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"text": " ".join(text.format(seed * 1000 + number) for text in SENTENCES)})
        for number in range(documents)
    ]
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_mixture(root: Path) -> Path:
    """Write raw/web/text.jsonl and raw/my books/data.arrow, and a mixture that uses the second one 1.5 times."""
    import pyarrow as pa

    web, books = write_raw(root / "raw" / "web", 80, 1), root / "raw" / "my books"
    texts = [json.loads(line)["text"] for line in write_raw(books, 40, 3).read_text().splitlines()]
    (books / "text.jsonl").unlink()
    with pa.ipc.new_stream(books / "data.arrow", pa.schema({"text": pa.string()})) as file:
        file.write_table(pa.table({"text": texts}))
    sources = [{"source": "web", "inputs": [str(web)]}, {"source": "books", "inputs": [str(books)]}]
    path = root / "mixture.yaml"
    path.write_text(json.dumps({"sources": sources, "sampling_frequencies": {"books": 1.5}}))
    return path


def make_run(root: Path) -> Path:
    """Preprocess raw text and train on it in `root`; return the run folder. Its settings have private paths."""
    write_raw(root / "valid", 20, 2)
    write_tokenizer(root / "tokenizer.json")
    inputs = {"raw": ["--mixture", str(write_mixture(root))], "valid": ["--input-files", str(root / "valid")]}
    for name, flags in inputs.items():
        make_2048.main([
            *flags, "--output-dir", str(root / f"{name}_shards"), "--seqlen", str(SEQ_LEN),
            "--tokenizer", str(root / "tokenizer.json"), "--seed", "3", "--num-workers", "1",
        ])  # fmt: skip
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": 258}
    shape |= {"post_embed_norm": False, "weight_tying": False}
    (root / "model.json").write_text(json.dumps(shape))
    (root / "prompts.txt").write_text("The river\n")
    task = {"query": "A list", "gold": 0, "choices": ["of names", "meant"]}
    (root / "tasks").mkdir()
    (root / "tasks" / "lists.jsonl").write_text("".join(json.dumps(task) + "\n" for _ in range(4)))
    (root / "tasks.yaml").write_text(
        "icl_tasks:\n- label: lists\n  dataset_uri: ${data_dir}/lists.jsonl\n  num_fewshot: [0]\n"
        "  icl_task_type: multiple_choice\n  random_baseline: 0.5\n"
    )
    shards = f"{SEQ_LEN}-v1/0"
    main([
        "--model", str(root / "model.json"), "--dataset-manifest", str(root / "raw_shards" / shards / "manifest.jsonl"),
        "--data-key", "npy", "--train-num-samples", str(STEPS * BATCH * SEQ_LEN // 2), "--epochs", "2",
        "--global-batch-size", str(BATCH), "--lr", "1e-2", "--warmup", "1", "--precision", "fp32", "--workers", "0",
        "--log-every-n-steps", "1", "--val-data", str(root / "valid_shards" / shards / "manifest.jsonl"),
        "--icl-yaml", str(root / "tasks.yaml"), "--icl-data-dir", str(root / "tasks"),
        "--sample-prompts", str(root / "prompts.txt"), "--sample-max-tokens", "4", "--seed", "7",
        "--name", "tiny", "--logs", str(root / "logs"), "--report", "none",
        "--copy-codebase",
    ])  # fmt: skip
    return root / "logs" / "tiny"


def write_paper(path: Path) -> Path:
    """Write a paper in Markdown."""
    path.write_text("# A very small model\n\n" + PARAGRAPH * 6)
    return path


def private_text() -> str:
    """Return a path that no bundle may have."""
    return os.path.expanduser("~/private/keys")
