"""Running tasks through llm-foundry's task builders and metrics and Composer's Trainer.

Everything here needs the environment of `make install-eval`, and a process group that `start_processes` has made.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from composer.core import Evaluator
from composer.trainer import Trainer
from composer.utils import dist, get_device, reproducibility
from datasets import disable_caching, disable_progress_bars
from icl_tasks import Settings, Task
from llmfoundry.eval.datasets import in_context_learning_evaluation as icl
from llmfoundry.utils.builders import build_icl_evaluators

from open_lm import storage
from open_lm.errors import ConfigError, DataError
from open_lm.utils.llm_foundry_wrapper import SimpleComposerOpenLMCausalLM

CHOICES_KEYS = {"multiple_choice": "choices", "schema": "context_options"}


@dataclass
class Outcome:
    """One task with one number of examples in the prompt.

    Attributes:
        score: from 0 to 1, for tasks with categories the mean over them; None where the task could not run (`problem`).
        metrics: every metric of the task by llm-foundry's name, score included.
        baseline: the score of guessing. n: examples that were scored.
        truncated: prompts (one for each choice) whose context was cut on the left to fit the model, of `sequences`.
        categories: the score of each.
    """

    task: str
    shots: int
    kind: str
    metric: str = ""
    score: float | None = None
    baseline: float = 0.0
    n: int = 0
    truncated: int = 0
    sequences: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    categories: dict[str, float] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Bench:
    """What all tasks are run with: sequences of `length` tokens, data below `folder`."""

    trainer: Trainer
    tokenizer: Any
    length: int
    batch_size: int
    folder: str


class DoesNotFit(Exception):
    """A task has an answer that leaves no room for any context in the model's sequence length."""


def start_processes(device: str, settings: Settings) -> str:
    """Join the process group (Composer's, also for a single process); returns Composer's name of the device.

    Args:
        device: cpu, cuda or auto. Under torchrun every process has one device.

    Raises:
        ConfigError: cuda where there is none, or a half precision on the CPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device; use --device cpu")
    name = "gpu" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if name == "cpu" and settings.precision != "fp32":
        raise ConfigError(f"precision is {settings.precision} in the YAML, but Composer offers only fp32 on the CPU")
    if "GROUP_RANK" in os.environ:
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])  # torchrun's name of what Composer reads
    dist.initialize_dist(get_device(name), timeout=1800.0)
    reproducibility.seed_all(settings.seed)
    return name


def run_tasks(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    device: str,
    *,
    max_examples: int | None = None,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Evaluate a model on every task; collective, with the same result on every process.

    Args:
        model: an `open_lm.hf.OpenLMForCausalLM`. tokenizer: of transformers.
        device: what `start_processes` gave.
        max_examples: use only the first so many examples of a task (of each category, if it has them).
        report: called with each outcome as it is known.
    """
    trainer = Trainer(
        model=SimpleComposerOpenLMCausalLM(model, tokenizer),
        device=device,
        precision=settings.precision,
        seed=settings.seed,
        progress_bar=False,
        log_to_console=False,
    )
    disable_progress_bars()
    disable_caching()  # prompts found in a cache would not be counted as truncated
    outcomes = []
    with _shared_folder() as folder:
        length = settings.max_seq_len or model.config.seq_len
        bench = Bench(trainer, tokenizer, length, settings.batch_size, folder)
        for task in settings.tasks:
            data = _local_data(task, folder, max_examples)
            for shots in task.shots:
                outcome = _run_task(bench, task, data, shots)
                report(outcome)
                outcomes.append(outcome)
    trainer.close()
    return outcomes


def _run_task(bench: Bench, task: Task, data: str, shots: int) -> Outcome:
    start = time.monotonic()
    config = {"batch_size": bench.batch_size, **copy.deepcopy(task.config)}
    length = min(config.get("max_seq_len") or bench.length, bench.length)
    config |= {"dataset_uri": data, "num_fewshot": [shots], "max_seq_len": length}
    outcome = Outcome(task.label, shots, task.kind)
    try:
        with _counted_truncation() as truncation:
            evaluators, _ = build_icl_evaluators(
                [config], bench.tokenizer, length, bench.batch_size, destination_dir=bench.folder
            )
            for evaluator in evaluators:
                _prepare(evaluator, length)
    except DoesNotFit as error:
        outcome.problem = str(error)
        return outcome
    scores = [_evaluate(bench.trainer, evaluator) for evaluator in evaluators]
    outcome.metric = _main_metric(scores[0][0])
    outcome.metrics = {name: _mean([metrics[name] for metrics, _ in scores]) for name in scores[0][0]}
    outcome.score = outcome.metrics[outcome.metric]
    if config.get("has_categories"):
        names = [str(evaluator.label).rsplit("/", 1)[-1] for evaluator in evaluators]
        outcome.categories = {name: metrics[outcome.metric] for name, (metrics, _) in zip(names, scores, strict=True)}
    outcome.baseline = task.baseline if task.baseline is not None else _mean([_guessing(e, task) for e in evaluators])
    outcome.n = sum(count for _, count in scores)
    outcome.truncated, outcome.sequences = truncation
    outcome.seconds = time.monotonic() - start
    return outcome


def _evaluate(trainer: Trainer, evaluator: Evaluator) -> tuple[dict[str, float], int]:
    """The evaluator's metrics and the number of examples they are over, on all processes together."""
    trainer.eval(eval_dataloader=[evaluator])
    metrics = trainer.state.eval_metrics[evaluator.label]
    counted = metrics[_main_metric(metrics)]
    total = (counted.total if hasattr(counted, "total") else counted.bucket_totals.sum()).detach().clone()
    dist.all_reduce(total)
    return {name: float(metric.compute()) for name, metric in metrics.items()}, int(total.item())


def _main_metric(metrics: Iterable[str]) -> str:
    """The name of the metric that is the task's score: an accuracy, if there is one."""
    names = list(metrics)
    return next((name for name in names if name.endswith("Accuracy")), names[0])


def _prepare(evaluator: Evaluator, length: int) -> None:
    """Let llm-foundry put the prompts together and tokenize them, which it does on first access."""
    dataset = _dataset(evaluator)
    if dataset.max_seq_len > length or dataset.padding_size < 1:
        longest = getattr(dataset, "max_answer_length", 0)
        raise DoesNotFit(f"its longest answer has {longest} tokens, the model takes {length} with the question")
    _ = dataset[0]


def _dataset(evaluator: Evaluator) -> Any:
    return evaluator.dataloader.dataloader.dataset


def _guessing(evaluator: Evaluator, task: Task) -> float:
    """The score of choosing at random: the mean of 1 / choices; 0 for tasks that are answered freely."""
    key = task.config.get("choices_key") or CHOICES_KEYS.get(task.kind)
    if key is None:
        return 0.0
    return _mean([1 / len(choices) for choices in _dataset(evaluator).dataset[key]])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def _counted_truncation() -> Iterator[list[int]]:
    """A list that counts the contexts that llm-foundry cuts to fit the model, and all of them.

    Its own function cuts silently, and keeps the whole context where the answer fills the sequence by itself.
    """
    original = icl.trim_context
    count = [0, 0]

    def trim(context: list[int], answer: list[int], max_seq_len: int) -> list[int]:
        if len(answer) >= max_seq_len:
            raise DoesNotFit(
                f"an answer has {len(answer)} tokens, which leaves no room for a context in the model's {max_seq_len}"
            )
        count[0] += len(context) + len(answer) > max_seq_len
        count[1] += 1
        return list(original(context, answer, max_seq_len))

    icl.trim_context = trim
    try:
        yield count
    finally:
        icl.trim_context = original


@contextmanager
def _shared_folder() -> Iterator[str]:
    """A temporary folder of the same name for all processes of a node, gone afterwards."""
    names = [uuid.uuid4().hex]
    dist.broadcast_object_list(names)
    folder = Path(tempfile.gettempdir()) / f"open_lm_eval_{names[0]}"
    folder.mkdir(exist_ok=True)
    dist.barrier()
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _local_data(task: Task, folder: str, max_examples: int | None) -> str:
    """Where llm-foundry shall read the task's data: a remote file is fetched, a part of a file written anew."""
    if task.is_hub or (max_examples is None and not storage.is_remote(task.data)):
        return task.data
    target = Path(folder) / f"{task.label}.source.jsonl"
    if dist.get_local_rank() == 0:
        lines = storage.read_text(task.data).splitlines(keepends=True)
        taken: dict[str, int] = {}
        with open(target, "w", encoding="utf-8") as out:
            for number, line in enumerate(lines, start=1):
                category = _category(line, task, number) if task.config.get("has_categories") else ""
                taken[category] = taken.get(category, 0) + 1
                if line.strip() and (max_examples is None or taken[category] <= max_examples):
                    out.write(line)
    dist.barrier()
    return str(target)


def _category(line: str, task: Task, number: int) -> str:
    try:
        return str(json.loads(line)["category"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{task.data}: line {number} has no category; expected JSON with that key") from error
