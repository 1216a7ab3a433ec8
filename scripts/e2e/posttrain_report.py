"""Evaluate the stages of posttrain_tiny.sh, and print a table of them.

    python scripts/e2e/posttrain_report.py FOLDER RUN [RUN ...]

Each run answers all 100 questions greedily, and is evaluated with the native in-context engine on FOLDER/tasks. The
results are also in FOLDER/stages.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from posttrain_data import FORMS, SUMS, TURN_END, answer, chat_prompt, question, write_rows

from open_lm.checkpoint import candidates_at
from open_lm.config.architecture import read_run_settings
from open_lm.config.sections import ModelConfig
from open_lm.data.tokenizers import choose_tokenizer
from open_lm.errors import run_cli
from open_lm.finetune.rewards import answer_format, exact_match
from open_lm.storage import write_text
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_file, user_path

ROOT = Path(__file__).resolve().parents[2]
MAX_NEW_TOKENS = 20


def generated_answers(checkpoint: str, form: str = FORMS[0]) -> list[str]:
    """Return the greedy answer of a checkpoint to the question about each sum, up to the end of the turn."""
    from open_lm.generate.sampling import Sampling, complete_texts, load_model_for_generation

    tokenizer = choose_tokenizer(checkpoint, None, None)
    section = ModelConfig.from_object(argparse.Namespace(**read_run_settings(checkpoint)))
    model = load_model_for_generation(checkpoint, section)
    (turn_end,) = tokenizer.encode(TURN_END)
    sampling = Sampling(MAX_NEW_TOKENS, temperature=0, stop_ids=(turn_end,))
    return complete_texts(model, tokenizer, [chat_prompt(a, b, form) for a, b in SUMS], sampling)


def check_answers(checkpoint: str) -> dict[str, float]:
    """Return the shares of answers that are marked, and that are marked and right."""
    texts = generated_answers(checkpoint)
    right = exact_match(texts, [str(a + b) for a, b in SUMS])
    formed = answer_format(texts)
    shares = {"exact_match": right, "answer_format": formed}
    return {name: sum(value or 0 for value in values) / len(values) for name, values in shares.items()}


def task_scores(folder: Path, checkpoint: str) -> dict[str, float]:
    """Return the score of each task, computed by the command that evaluates in-context learning."""
    from open_lm.evaluate.command import main as evaluate

    output = folder / "icl.json"
    flags = ["--engine", "native", "--device", "cpu", "--precision", "fp32", "--checkpoint", checkpoint]
    flags += ["--eval-yaml", str(folder / "tasks" / "tasks.yaml"), "--data-dir", str(folder / "tasks")]
    evaluate([*flags, "--output", str(output)])
    return {task["task"]: task["score"] for task in json.loads(output.read_text())["tasks"]}


def write_traces(checkpoint: str, path: Path) -> None:
    """Write conversations with the answers of a checkpoint to two forms of all questions."""
    rows = []
    for form in FORMS[:2]:
        texts = generated_answers(checkpoint, form)
        questions = [question(form, a, b) for a, b in SUMS]
        rows += [
            {"messages": asked + answer(text)} for asked, text in zip(questions, texts, strict=True) if text.strip()
        ]
    write_rows(path, rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the results of stages as a Markdown table, in percent."""
    names = [name for name in rows[0] if name != "stage"]
    print("| stage | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for row in rows:
        print(f"| {row['stage']} | " + " | ".join(f"{100 * row[name]:.0f} %" for name in names) + " |")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="posttrain_report.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=user_file, help="folder with the data")
    parser.add_argument("runs", type=user_path, nargs="+", help="run folders, whose names are the names of the stages")
    parser.add_argument("--output", type=user_file, help="file for the results (default: FOLDER/stages.json)")
    parser.add_argument(
        "--traces", type=user_file, help="only write the answers of the run to this file, as conversations"
    )
    args = parser.parse_args(argv)
    if args.traces is not None:
        write_traces(candidates_at(args.runs[-1])[0].url, args.traces)
        return
    rows = []
    for run in args.runs:
        checkpoint = candidates_at(run)[0].url
        stage = Path(run).name
        rows.append({"stage": stage, **check_answers(checkpoint), **task_scores(args.folder, checkpoint)})
    write_text(args.output or args.folder / "stages.json", to_json(rows) + "\n")
    print_table(rows)


if __name__ == "__main__":
    sys.exit(run_cli(main))
