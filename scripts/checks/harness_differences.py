"""Measure how the scores of a checkpoint differ between evaluation harnesses, on the same examples and prompts.

    python scripts/checks/harness_differences.py --checkpoint logs/ex --data-dir FOLDER

Prints a table with the accuracy of multiple-choice tasks without examples in the prompt. The columns differ in how
context and choice become tokens, and in how the log-probabilities of choices of different lengths are made comparable.
docs/evaluation_harnesses.md explains them. Needs the extra lm-eval.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm.errors import run_cli
from open_lm.system.names import user_path

# (task, its file, text between context and choice, OLMES' normalization)
TASKS = (
    ("arc_easy", "arc_easy.jsonl", "\nAnswer: ", "characters"),
    ("arc_challenge", "arc_challenge.jsonl", "\nAnswer: ", "PMI"),
    ("hellaswag", "hellaswag.jsonl", " ", "characters"),
    ("piqa", "piqa.jsonl", "\nAnswer: ", "characters"),
    ("openbook_qa", "openbook_qa.jsonl", " ", "PMI"),
    ("copa", "copa.jsonl", " ", "characters"),
)
HEADER = (
    "task", "n", "chance", "separate, per token", "joint, per token", "joint, sum (acc)", "per character (acc_norm)",
    "per byte (acc_bytes)", "per character, after BOS", "OLMES",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A context, its choices without a space in front, and the index of the correct one."""

    context: str
    choices: Sequence[str]
    gold: int


def build_parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=user_path, required=True, help="any checkpoint of eval_openlm_ckpt.py")
    parser.add_argument("--data-dir", type=user_path, required=True, help="folder of llm-foundry's .jsonl files")
    parser.add_argument("--model", type=user_path, help="model configuration, for weights without a run")
    parser.add_argument("--tokenizer", type=user_path, help="tokenizer, for runs that do not record theirs")
    parser.add_argument("--max-examples", type=int, default=1000, help="examples of a task (default: %(default)s)")
    return parser


def main(argv: list[str]) -> None:
    """Print the table as Markdown.

    Raises:
        UserError: unusable arguments or data.
    """
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from open_lm.evaluate.lm_eval.model import OpenLM

    model = OpenLM(checkpoint=args.checkpoint, model=args.model, tokenizer=args.tokenizer)
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for name, file, delimiter, normalization in TASKS:
        questions = read_questions(Path(args.data_dir) / file, delimiter, args.max_examples)
        scores = measure(model, questions, normalization)
        with tempfile.TemporaryDirectory() as folder:
            harness = lm_eval_scores(model, questions, Path(folder))
        native = native_score(model, Path(args.data_dir) / file, delimiter, args.max_examples)
        chance = sum(1 / len(question.choices) for question in questions) / len(questions)
        values = (chance, native, scores["token"], *harness, scores["bos"])
        label = f"{scores['olmes']:.3f} ({normalization})"
        print(
            f"| {name} | {len(questions)} | {' | '.join(f'{value:.3f}' for value in values)} | {label} |",
            flush=True,
        )


def read_questions(path: Path, delimiter: str, count: int) -> list[Question]:
    """Return the first examples of a file, with the context that the native engine and llm-foundry give them."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    questions = []
    for row in rows:
        context = f"{row['query'].strip()}{delimiter}".rstrip()
        questions.append(Question(context, [choice.strip() for choice in row["choices"]], row["gold"]))
    return questions


def native_score(model: Any, path: Path, delimiter: str, count: int) -> float:
    """Return the score of the native engine, which is that of llm-foundry."""
    from open_lm.evaluate.icl import EvaluatorOptions, IclEvaluator, Task

    config = {"continuation_delimiter": delimiter}
    task = Task(path.stem, "multiple_choice", [0], str(path), config)
    evaluator = IclEvaluator(model.text_tokenizer, EvaluatorOptions(device=model.device, max_examples=count))
    return float(evaluator.evaluate_task(model.model, task, 0, model.max_length).score or 0.0)


def measure(model: Any, questions: Sequence[Question], normalization: str) -> dict[str, float]:
    """Return the accuracies that lm-eval does not report, with its token ids."""
    from open_lm.evaluate.lm_eval.scoring import Pair

    def sums(prefix: Sequence[int], context: Callable[[Question], str]) -> tuple[list[list[float]], list[list[int]]]:
        groups = [model.encoder.pairs([(context(q), f" {choice}") for choice in q.choices]) for q in questions]
        pairs = [[Pair([*prefix, *pair.context], pair.continuation) for pair in group] for group in groups]
        values: list[list[float]] = [[] for _ in pairs]
        for index, scores in model.engine.score(pairs):
            values[index] = [score.log_prob for score in scores]
        return values, [[len(pair.continuation) for pair in group] for group in groups]

    plain, tokens = sums([], lambda question: question.context)
    after_bos, _ = sums([model.prefix_token_id], lambda question: question.context)
    lengths = [[len(choice) for choice in question.choices] for question in questions]
    if normalization == "PMI":
        unconditional, _ = sums([], lambda question: "Answer:")
        olmes = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(plain, unconditional, strict=True)]
    else:
        olmes = _divided(plain, lengths)
    return {
        "token": _accuracy(_divided(plain, tokens), questions),
        "bos": _accuracy(_divided(after_bos, lengths), questions),
        "olmes": _accuracy(olmes, questions),
    }


def _divided(values: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> list[list[float]]:
    return [[v / n for v, n in zip(row, sizes, strict=True)] for row, sizes in zip(values, lengths, strict=True)]


def _accuracy(values: Sequence[Sequence[float]], questions: Sequence[Question]) -> float:
    hits = [max(range(len(row)), key=row.__getitem__) == q.gold for row, q in zip(values, questions, strict=True)]
    return sum(hits) / len(hits)


def lm_eval_scores(model: Any, questions: Sequence[Question], folder: Path) -> tuple[float, float, float]:
    """Return acc, acc_norm and acc_bytes of lm-eval for a task with these prompts."""
    import yaml

    from open_lm.evaluate.lm_eval.results import check_task_names, evaluate

    rows = [{"context": q.context, "choices": list(q.choices), "gold": q.gold} for q in questions]
    (folder / "data.jsonl").write_text(
        "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows), encoding="utf-8"
    )
    metrics = ("acc", "acc_norm", "acc_bytes")
    task = {
        "task": "open_lm_differences", "dataset_path": "json", "validation_split": "validation",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "data.jsonl")}, "cache_dir": str(folder)},
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}", "target_delimiter": " ",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
    }  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    results = evaluate(model, [str(task["task"])], check_task_names([str(task["task"])], str(folder)))
    assert results is not None
    values = results["results"][task["task"]]
    acc, acc_norm, acc_bytes = (float(values[f"{metric},none"]) for metric in metrics)
    return acc, acc_norm, acc_bytes


if __name__ == "__main__":
    sys.exit(run_cli(main))
