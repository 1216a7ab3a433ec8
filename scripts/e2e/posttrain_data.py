"""Write the data of posttrain_tiny.sh: a byte tokenizer, text, conversations, preference pairs, prompts and tasks.

    python scripts/e2e/posttrain_data.py FOLDER [--documents 2000] [--forms 2]

The conversations ask for sums of two digits. The assistant answers half of them as "#### 7", as GSM8K marks an answer,
and the others as "The sum is 7.". Preference pairs prefer the first style. The text only counts, so that sums are
learned from conversations and rewards.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from open_lm.errors import run_cli
from open_lm.storage import write_text
from open_lm.system.names import user_file

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
FORMS = ("{a}+{b}=?", "What is {a}+{b}?", "Add {a} and {b}.", "{a} plus {b}?")
SUMS = [(a, b) for a in range(10) for b in range(10)]
TASKS = """icl_tasks:
- label: counting
  dataset_uri: ${data_dir}/counting.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
  continuation_delimiter: ''
- label: sums
  dataset_uri: ${data_dir}/sums.jsonl
  num_fewshot: [0]
  icl_task_type: multiple_choice
  continuation_delimiter: ''
"""


def question(form: str, a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": form.format(a=a, b=b)}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def marked(a: int, b: int) -> str:
    return f"#### {a + b}"


def plain(a: int, b: int) -> str:
    return f"The sum is {a + b}."


def chat_prompt(a: int, b: int, form: str = FORMS[0]) -> str:
    """Return a question about a sum in the format chatml, up to the turn of the assistant."""
    return f"{TURN_START}user\n{form.format(a=a, b=b)}{TURN_END}\n{TURN_START}assistant\n"


def is_held_out(a: int, b: int) -> bool:
    """Return whether the pairs about a sum are for evaluation only: a fifth of all sums."""
    return (3 * a + b) % 5 == 0


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes and the special tokens of the format chatml."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (END_OF_TEXT, TURN_START, TURN_END)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", json.dumps(config, allow_nan=False) + "\n")


def document(rng: random.Random) -> str:
    """Return lines that count up and down, and name digits."""
    lines = []
    for _ in range(rng.randint(4, 12)):
        start, length = rng.randint(0, 18), rng.randint(3, 8)
        step = rng.choice((1, 1, 2, -1))
        lines.append(",".join(str(start + step * i) for i in range(length) if start + step * i >= 0))
    return "\n".join(lines)


def conversations(forms: Iterable[str], rng: random.Random) -> list[dict[str, Any]]:
    """Return a conversation for each sum and form, half of them in each style of answers."""
    rows = []
    for form in forms:
        for a, b in SUMS:
            style = rng.choice((marked, plain))
            rows.append({"messages": question(form, a, b) + answer(style(a, b))})
    rng.shuffle(rows)
    return rows


def pairs(forms: Iterable[str], held_out: bool) -> list[dict[str, Any]]:
    """Return preference pairs that prefer marked answers."""
    return [
        {"prompt": question(form, a, b), "chosen": answer(marked(a, b)), "rejected": answer(plain(a, b))}
        for form in forms
        for a, b in SUMS
        if is_held_out(a, b) == held_out
    ]


def tasks(rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Return the examples of two in-context tasks: the next number, and the right one of four answers."""
    counting = [
        {"context": ",".join(str(start + i) for i in range(4)), "continuation": f",{start + 4}"} for start in range(12)
    ]
    choices = []
    for a, b in SUMS:
        wrong = rng.sample([number for number in range(19) if number != a + b], 3)
        numbers = rng.sample([a + b, *wrong], 4)
        texts = [f"#### {number}{TURN_END}" for number in numbers]
        choices.append({"query": chat_prompt(a, b), "choices": texts, "gold": numbers.index(a + b)})
    return {"counting": counting, "sums": choices}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_data(folder: Path, documents: int, num_forms: int) -> None:
    """Write all files. They are the same for the same arguments."""
    rng = random.Random(0)
    write_tokenizer(folder / "tokenizer")
    write_rows(folder / "pretrain.jsonl", ({"text": document(rng)} for _ in range(documents)))
    forms = FORMS[:num_forms]
    write_rows(folder / "chats.jsonl", conversations(forms, rng))
    write_rows(folder / "pairs.jsonl", pairs(forms, held_out=False))
    write_rows(folder / "held_out_pairs.jsonl", pairs(forms, held_out=True))
    prompts = ({"prompt": question(FORMS[0], a, b), "answer": str(a + b)} for a, b in SUMS)
    write_rows(folder / "prompts.jsonl", prompts)
    for name, rows in tasks(rng).items():
        write_rows(folder / "tasks" / f"{name}.jsonl", rows)
    write_text(folder / "tasks" / "tasks.yaml", TASKS)
    shape = {"seq_len": 64, "vocab_size": 259, "post_embed_norm": False, "weight_tying": False, "qk_norm": True}
    for name, dim, layers in (("model", 128, 4), ("student", 64, 4)):
        config = {"hidden_dim": dim, "n_layers": layers, "n_heads": 4, **shape}
        write_text(folder / f"{name}.json", json.dumps(config, indent=2, allow_nan=False) + "\n")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="posttrain_data.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=user_file, help="folder to write")
    parser.add_argument("--documents", type=int, default=2000, help="documents of text (default: %(default)s)")
    parser.add_argument("--forms", type=int, default=2, help="forms of questions, 1 to 4 (default: %(default)s)")
    args = parser.parse_args(argv)
    write_data(args.folder, args.documents, args.forms)


if __name__ == "__main__":
    sys.exit(run_cli(main))
