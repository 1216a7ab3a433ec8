"""Check that the native evaluation engine agrees with llm-foundry, example by example.

    python scripts/checks/check_icl_agreement.py --data-dir FOLDER --tokenizer gpt-neox-20b.json llama2.model

For every task file of the folder, with each tokenizer and number of shots, both engines build the prompts: the ids
must be equal. llm-foundry's metrics then choose from logits that the model computes for llm-foundry's separate, padded
sequences. The chosen answers must be equal, and the mean log-likelihoods of continuations must agree within 1e-4 in
float32. To save time, logits are computed only where the metrics read them. Generated texts come from transformers'
generate(). Choices whose losses differ by less than 1e-5 are counted separately: rounding decides between them.

Runs in the environment of llm-foundry (`make install-eval`) and restarts itself there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from open_lm.storage.strict_json import to_json

REPOSITORY = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # of a mean log-likelihood
NEAR_TIE = 1e-5
BATCH = 8  # examples of a batch of llm-foundry
SMALL_MODEL = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 2048, "vocab_size": 50432}
SMALL_MODEL |= {"post_embed_norm": False, "weight_tying": False}


@dataclass
class Agreement:
    """The comparison of a task with one tokenizer and number of shots."""

    examples: int = 0
    prompts: int = 0
    id_mismatches: int = 0
    answer_mismatches: int = 0
    near_ties: int = 0
    max_difference: float = 0.0
    correct: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: Agreement) -> None:
        for name in ("examples", "prompts", "id_mismatches", "answer_mismatches", "near_ties", "correct"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_difference = max(self.max_difference, other.max_difference)
        self.problems += other.problems

    @property
    def agrees(self) -> bool:
        return not self.id_mismatches and not self.answer_mismatches and self.max_difference <= TOLERANCE


def main(argv: list[str]) -> int:
    from open_lm.system.names import user_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=user_path, required=True, help="folder of .jsonl files, with dclm_tasks.json if it has one"
    )
    parser.add_argument("--tokenizer", type=user_path, nargs="+", required=True, help="files of tokenizers")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 3], help="numbers of examples (default: 0 3)")
    parser.add_argument(
        "--max-examples", type=int, help="use only the first N examples of each file (of each category)"
    )
    parser.add_argument("--max-generated", type=int, help="generate answers for only the first N examples of each file")
    parser.add_argument("--tasks", nargs="+", help="labels of the tasks; default: all whose file is in the folder")
    parser.add_argument("--ids-only", action="store_true", help="compare only the token ids")
    args = parser.parse_args(argv)
    restart_in_eval_environment()
    return run(args)


def restart_in_eval_environment() -> None:
    """Restart this program with the Python of .venv-eval, unless llm-foundry is already available."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if importlib.util.find_spec("llmfoundry") is None:
        python = os.environ.get("OPEN_LM_EVAL_PYTHON") or str(REPOSITORY / ".venv-eval" / "bin" / "python")
        os.execve(python, [python, *sys.argv], {**os.environ, "PYTHONPATH": str(REPOSITORY)})


def run(args: argparse.Namespace) -> int:
    """Compare all tasks, print a line for each and the totals, and return the exit code."""
    import datasets
    from llmfoundry.eval.datasets import in_context_learning_evaluation as icl

    from open_lm.evaluate.icl.tasks import Task

    datasets.disable_progress_bars()
    icl.load_dataset = datasets.load_dataset = read_rows
    total = Agreement()
    start = time.monotonic()
    model = small_model()
    for spec in args.tokenizer:
        tokenizers = load_tokenizers(spec)
        for label, kind, file, options in find_tasks(args.data_dir, args.tasks):
            task = Task(label, kind, list(args.shots), file, {"label": label, "icl_task_type": kind, **options})
            for shots in args.shots:
                result = Comparison(task, shots, model, *tokenizers, args).run()
                total.add(result)
                print(f"{Path(spec).stem:14} {label:36} {shots:2}-shot {describe(result)}", flush=True)
    for problem in total.problems[:20]:
        print(problem)
    print(f"total: {describe(total)}, {time.monotonic() - start:.0f} s")
    return 0 if total.agrees and total.examples else 1


def describe(result: Agreement) -> str:
    return (
        f"{result.examples} examples, {result.prompts} prompts: {result.id_mismatches} with other ids, "
        f"{result.answer_mismatches} other answers, {result.near_ties} near ties, largest difference of a "
        f"log-likelihood {result.max_difference:.1e}, {result.correct} correct"
    )


def find_tasks(folder: str, only: Sequence[str] | None) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (label, type, file, options) of the tasks in a folder; files that no list names get default options."""
    listed: set[str] = set()
    entries = json.loads((Path(folder) / "dclm_tasks.json").read_text())
    for entry in entries:
        file = Path(folder) / entry["file"]
        is_new = entry["file"] not in listed
        listed.add(entry["file"])
        if file.exists() and (entry["label"] in only if only else is_new):
            yield entry["label"], entry["type"], str(file), entry["options"]
    for file in sorted(Path(folder).glob("*.jsonl")):
        if file.name not in listed and not only:
            yield file.stem, kind_of(file), str(file), {}


def kind_of(file: Path) -> str:
    """Return the type of task that a file's first line has the columns of."""
    with open(file, encoding="utf-8") as lines:
        row = json.loads(lines.readline())
    names = {"context_options": "schema", "choices": "multiple_choice", "answer": "generation_task_with_answers"}
    return next((kind for column, kind in names.items() if column in row), "language_modeling")


def small_model() -> Any:
    """Return a small model with weights of a fixed seed, scaled so that its choices differ by more than rounding."""
    import torch

    from open_lm.model.transformer import create_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.json"
        path.write_text(to_json(SMALL_MODEL))
        model = create_model(SimpleNamespace(model=str(path)))
    model.reset_parameters(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()


def load_tokenizers(spec: str) -> tuple[Any, Any]:
    """Return the package's tokenizer and the same one of transformers."""
    from open_lm.hf import load_hf_tokenizer
    from open_lm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    return tokenizer, load_hf_tokenizer(tokenizer)


class Comparison:
    """The comparison of a task with one tokenizer and number of shots."""

    def __init__(  # noqa: PLR0917 (the settings of the comparison)
        self, task: Any, shots: int, model: Any, tokenizer: Any, hf_tokenizer: Any, args: argparse.Namespace
    ) -> None:
        self.task, self.shots, self.model, self.args = task, shots, model, args
        self.tokenizer, self.hf_tokenizer = tokenizer, hf_tokenizer
        self.result = Agreement()
        self.generates = task.kind == "generation_task_with_answers"
        self.max_examples = args.max_examples
        if self.generates and args.max_generated is not None and not args.ids_only:
            self.max_examples = min(args.max_generated, args.max_examples or args.max_generated)

    def run(self) -> Agreement:
        from open_lm.evaluate.icl.prompts import build_prompts

        seq_len = self.model.seq_len
        prompts = build_prompts(self.task, self.shots, self.tokenizer, seq_len, self.max_examples)
        with tempfile.TemporaryDirectory() as folder:
            theirs = [pair for dataset in self.datasets(folder, seq_len) for pair in prepared(dataset)]
            self.result.examples, self.result.prompts = len(prompts.examples), prompts.num_sequences
            if len(theirs) != len(prompts.examples):
                self.result.id_mismatches += 1
                self.result.problems.append(f"{self.name}: {len(theirs)} examples, ours {len(prompts.examples)}")
                return self.result
            for (dataset, example), ours in zip(theirs, prompts.examples, strict=True):
                self.compare_ids(dataset, example, ours)
            if not self.args.ids_only:
                records = self.our_records(prompts, folder)
                for dataset, group in batches(theirs):
                    first, examples = group[0][0], [example for _, example in group]
                    self.compare_answers(dataset, examples, records[first : first + len(group)])
        return self.result

    @property
    def name(self) -> str:
        return f"{self.task.label} {self.shots}-shot {self.tokenizer.name}"

    def datasets(self, folder: str, seq_len: int) -> list[Any]:
        """Return llm-foundry's data sets of the task, one per category."""
        from llmfoundry.utils.builders import build_icl_evaluators

        from open_lm.evaluate.icl.tasks import first_examples

        data = Path(folder) / "source.jsonl"
        lines = first_examples(self.task, self.max_examples)
        data.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        config = {**self.task.config, "dataset_uri": str(data), "num_fewshot": [self.shots]}
        evaluators, _ = build_icl_evaluators([config], self.hf_tokenizer, seq_len, BATCH, destination_dir=folder)
        return [evaluator.dataloader.dataloader.dataset for evaluator in evaluators]

    # ----------------------------------------------------------------------------------------------- token ids
    def compare_ids(self, dataset: Any, example: dict[str, Any], ours: Any) -> None:
        """Count the prompts of an example whose ids differ."""
        if self.generates:
            padded = [int(i) for i in example[dataset.context_key]]
            ids = ours.choices[0].context.tolist()
            same = padded[len(padded) - len(ids) :] == ids
            same = same and set(padded[: len(padded) - len(ids)]) <= {dataset.pad_tok_id}
            # The metric strips the accepted answers, with and without normalization.
            same = same and {text.strip() for text in example["aliases"]} == {text.strip() for text in ours.answers}
            same = same and dataset.base_batch["generation_kwargs"]["max_new_tokens"] == ours.max_new_tokens
            self.count_ids(same)
            return
        contexts, spans = example[dataset.context_key], example["continuation_indices"]
        if self.task.kind == "language_modeling":
            contexts, spans = [contexts], [spans]
        if len(contexts) != len(ours.choices):
            self.count_ids(False)
        for padded, span, choice in zip(contexts, spans, ours.choices, strict=False):
            ids = padded[: int(span[-1]) + 1].tolist()
            same = ids == [*choice.context.tolist(), *choice.continuation.tolist()]
            self.count_ids(same and int(span[0]) == len(choice.context))

    def count_ids(self, same: bool) -> None:
        if not same:
            self.result.id_mismatches += 1
            self.result.problems.append(f"{self.name}: other token ids")

    # ------------------------------------------------------------------------------------------------- answers
    def our_records(self, prompts: Any, folder: str) -> list[dict[str, Any]]:
        """Return the results of our engine, in the order of the examples."""
        from open_lm.evaluate.icl import EvaluatorOptions, IclEvaluator, ResultStore

        store = ResultStore(str(Path(folder) / "results"), {})
        outcome = IclEvaluator(self.tokenizer, EvaluatorOptions(), store).evaluate(self.model, prompts)
        records = store.read(outcome.examples_file)
        return [records[index] for index in range(len(records))]

    def compare_answers(self, dataset: Any, examples: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
        """Compare the answers that llm-foundry's metric gives to a batch with our records."""
        batch = dataset.collate_fn(examples)
        if self.generates:
            self.compare_texts(batch, records)
            return
        labels = batch["labels"].roll(-1, dims=1)
        outputs = LogitsOnDemand(self.model, batch)
        metric = metric_of(self.task.kind)
        results = metric.update(batch, outputs, labels)
        losses = iter(mean_losses(outputs, batch, labels))
        for index, record in enumerate(records):
            self.result.correct += bool(record["correct"])
            theirs = [next(losses) for _ in record["nll"]]
            pairs = zip(theirs, record["nll"], strict=True)
            self.result.max_difference = max([self.result.max_difference, *(abs(a - b) for a, b in pairs)])
            if bool(results["result"][index]) == record["correct"] and (
                "prediction" not in record or results["selected_choice_idx"][index] == record["prediction"]
            ):
                continue
            ordered = sorted(theirs)
            if len(ordered) > 1 and ordered[1] - ordered[0] < NEAR_TIE:
                self.result.near_ties += 1
            else:
                self.result.answer_mismatches += 1
                self.result.problems.append(f"{self.name}: another answer to example {record['index']}")

    def compare_texts(self, batch: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Compare generated texts and their scores."""
        from open_lm.hf import OpenLMForCausalLM
        from open_lm.utils.llm_foundry_wrapper import SimpleComposerOpenLMCausalLM

        wrapped = SimpleComposerOpenLMCausalLM(OpenLMForCausalLM.from_open_lm(self.model), self.hf_tokenizer)
        labels = batch["labels"]
        texts = wrapped.eval_forward(batch)
        results = metric_of(self.task.kind).update(batch, texts, labels)
        for text, correct, record in zip(texts, results["result"], records, strict=True):
            self.result.correct += bool(record["correct"])
            # Our text ends at the first stop sequence; theirs when all prompts of the batch have ended.
            if not text.startswith(record["text"]) or bool(correct) != record["correct"]:
                self.result.answer_mismatches += 1
                self.result.problems.append(f"{self.name}: another text for example {record['index']}")


def read_rows(_format: str, data_files: str, **_settings: Any) -> Any:
    """Read a .jsonl file as `datasets.load_dataset` does, without its cache of converted files."""
    from datasets import Dataset

    from open_lm import storage

    return Dataset.from_list([json.loads(line) for line in storage.read_lines(data_files) if line.strip()])


def prepared(dataset: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield a data set with each of its examples, prepared as its first access prepares all of them, in order."""
    for index, example in enumerate(dataset.dataset):
        settings = (dataset.num_fewshot, dataset.prompt_string, dataset.fewshot_rng)
        yield dataset, dataset._prep_example(example, index, *settings)


def batches(pairs: list[tuple[Any, Any]]) -> Iterator[tuple[Any, list[tuple[int, Any]]]]:
    """Yield batches of (index, example) of one data set."""
    group: list[tuple[int, Any]] = []
    for index, (dataset, example) in enumerate(pairs):
        group.append((index, example))
        is_last = index + 1 == len(pairs) or pairs[index + 1][0] is not dataset
        if len(group) == BATCH or is_last:
            yield dataset, group
            group = []


def metric_of(kind: str) -> Any:
    from llmfoundry.eval import metrics

    from open_lm.evaluate.icl.task_types import TASK_TYPES

    return getattr(metrics, TASK_TYPES.get(kind).metric)()


def mean_losses(outputs: LogitsOnDemand, batch: dict[str, Any], labels: Any) -> list[float]:
    """Return the mean loss per token of each continuation, as llm-foundry's metric computes it."""
    import torch.nn.functional as F

    losses = []
    for row, span in enumerate(batch["continuation_indices"]):
        logits, targets = outputs[row].index_select(0, span - 1), labels[row].index_select(0, span - 1)
        losses.append(float(F.cross_entropy(logits, targets)))
    return losses


class LogitsOnDemand:
    """The logits (B,T,V) of a padded batch, of which a metric reads the rows of continuations.

    The model computes the hidden states of llm-foundry's sequences; the output layer computes only the rows.
    """

    def __init__(self, model: Any, batch: dict[str, Any]) -> None:
        import torch

        self.model = model
        length = max(int(span[-1]) + 1 for span in batch["continuation_indices"])
        with torch.no_grad():
            self.hidden = model(batch["input_ids"][:, :length], loss=_NoLogits())[1]

    def __getitem__(self, row: int) -> Any:
        return SimpleNamespace(index_select=lambda dim, index: self.rows(row, index))

    def rows(self, row: int, index: Any) -> Any:
        import torch

        with torch.no_grad():
            return self.model.logits(self.hidden[row][index])


class _NoLogits:
    """A `loss` with which a model computes only hidden states."""

    def from_hidden(self, hidden: Any, *_args: Any, **_settings: Any) -> Any:
        return hidden[..., 0]


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    sys.exit(main(sys.argv[1:]))
