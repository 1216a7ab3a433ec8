"""Write text, a tokenizer and tasks from the Python installation, for the pipeline without a network.

    python scripts/e2e/offline_data.py FOLDER [--text-mb 4] [--vocab-size 2048]

FOLDER/text has train-*.jsonl.zst and valid.jsonl.zst (see scripts/python_docs.py), FOLDER/tokenizer.json a byte-level
BPE trained on the training text, and FOLDER/tasks a task of HellaSwag's kind: which of four continuations follows a
passage of the validation text? The wrong ones are from other documents.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from python_docs import gather, train_tokenizer  # noqa: E402

from open_lm.errors import DataError, run_cli  # noqa: E402
from open_lm.storage import split_lines, write_text  # noqa: E402
from open_lm.storage.strict_json import to_json  # noqa: E402
from open_lm.system.names import user_file  # noqa: E402

TASK = "continuations"
TASKS = f"""icl_tasks:
- label: {TASK}
  dataset_uri: ${{data_dir}}/{TASK}.jsonl
  num_fewshot: [0]
  icl_task_type: multiple_choice
"""
CONTEXT_WORDS, ENDING_WORDS, NUM_CHOICES, MAX_EXAMPLES = 24, 10, 4, 100


def validation_texts(folder: Path) -> Iterator[str]:
    for line in split_lines(zstandard.decompress((folder / "valid.jsonl.zst").read_bytes()).decode()):
        yield json.loads(line)["text"]


def examples(texts: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """Return multiple-choice examples: a passage, its continuation, and three continuations of other documents."""
    passages = []
    for document, text in enumerate(texts):
        words = text.split()
        length = CONTEXT_WORDS + ENDING_WORDS
        for start in range(0, len(words) - length, 2 * length):
            middle = start + CONTEXT_WORDS
            passages.append((document, " ".join(words[start:middle]), " ".join(words[middle : start + length])))
    rng.shuffle(passages)
    rows = []
    for document, context, ending in passages[:MAX_EXAMPLES]:
        others = sorted({other for source, _, other in passages if source != document and other != ending})
        if len(others) < NUM_CHOICES - 1:
            continue
        choices = rng.sample([ending, *rng.sample(others, NUM_CHOICES - 1)], NUM_CHOICES)
        rows.append({"query": context, "choices": choices, "gold": choices.index(ending)})
    return rows


def write_data(folder: Path, text_mb: float, vocab_size: int) -> None:
    """Write all files. They are the same for the same arguments and the same Python installation.

    Raises:
        DataError: too little text for a task.
    """
    counts = gather(str(folder / "text"), text_mb)
    train_tokenizer(sorted((folder / "text").glob("train-*.jsonl.zst")), folder / "tokenizer.json", vocab_size)
    rows = examples(list(validation_texts(folder / "text")), random.Random(0))
    if not rows:
        raise DataError(f"--text-mb {text_mb}: the validation text is too short for the task; use more text")
    write_text(folder / "tasks" / f"{TASK}.jsonl", "".join(f"{to_json(row)}\n" for row in rows))
    write_text(folder / "tasks" / "tasks.yaml", TASKS)
    print(f"{counts['train_bytes'] / 1e6:.1f} MB of training text, {counts['valid_bytes'] / 1e6:.1f} MB for validation")
    print(f"{len(rows)} examples of the task {TASK}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="offline_data.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=user_file, help="folder to write")
    parser.add_argument("--text-mb", type=float, default=4, help="maximum megabytes of text (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="ids of the tokenizer (default: %(default)s)")
    args = parser.parse_args(argv)
    write_data(args.folder, args.text_mb, args.vocab_size)


if __name__ == "__main__":
    sys.exit(run_cli(main))
