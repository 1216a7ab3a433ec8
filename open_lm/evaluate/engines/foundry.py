"""Run tasks with llm-foundry's task builders and metrics and Composer's Trainer.

Needs the environment of `make install-eval`, and the process group that `start_processes` initializes.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import Evaluator
from composer.trainer import Trainer
from composer.utils import dist, get_device, reproducibility
from datasets import disable_caching, disable_progress_bars
from llmfoundry.eval.datasets import in_context_learning_evaluation as icl
from llmfoundry.utils.builders import build_icl_evaluators

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.evaluate.engines.foundry_model import SimpleComposerOpenLMCausalLM
from open_lm.evaluate.icl import EvalSettings, Outcome, Task
from open_lm.evaluate.icl.metrics import accuracy_interval
from open_lm.evaluate.icl.tasks import first_examples

CHOICES_KEYS = {"multiple_choice": "choices", "schema": "context_options"}


@dataclass(frozen=True)
class EvalContext:
    """The objects and settings that all tasks share.

    Attributes:
        trainer: Composer's trainer with the model.
        tokenizer: a tokenizer of transformers.
        length: maximum sequence length in tokens.
        batch_size: sequences of a batch on each device.
        folder: temporary folder for task data.
    """

    trainer: Trainer
    tokenizer: Any
    length: int
    batch_size: int
    folder: str


class SequenceTooLong(Exception):
    """An answer that is so long that no context fits into the model's sequence length."""


def start_processes(device: str, settings: EvalSettings) -> str:
    """Initialize Composer's process group, also for a single process, and return Composer's name of the device.

    Args:
        device: cpu, cuda or auto. Under torchrun every process uses one device.
        settings: the evaluation settings.

    Raises:
        ConfigError: cuda without a CUDA device, or 16-bit precision on the CPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device; use --device cpu")
    name = "gpu" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if name == "cpu" and settings.precision != "fp32":
        raise ConfigError(f"precision is {settings.precision} in the YAML, but Composer supports only fp32 on the CPU")
    if "GROUP_RANK" in os.environ:
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])  # torchrun's name for Composer's NODE_RANK
    dist.initialize_dist(get_device(name), timeout=1800.0)
    reproducibility.seed_all(settings.seed)
    return name


def run_tasks(
    model: Any,
    tokenizer: Any,
    settings: EvalSettings,
    device: str,
    *,
    max_examples: int | None = None,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Evaluate a model on all tasks. Collective: all processes must call it, and all get the same result.

    Args:
        model: an `open_lm.hf.OpenLMForCausalLM`.
        tokenizer: a tokenizer of transformers.
        settings: tasks and evaluation settings.
        device: the result of `start_processes`.
        max_examples: use only the first N examples of a task (of each category, if it has categories).
        report: called with each outcome when it is available.
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
    disable_caching()  # truncation of cached prompts would not be counted
    outcomes = []
    with _shared_folder() as folder:
        length = settings.max_seq_len or model.config.seq_len
        context = EvalContext(trainer, tokenizer, length, settings.batch_size, folder)
        for task in settings.tasks:
            data = _local_data(task, folder, max_examples)
            for shots in task.shots:
                outcome = _run_task(context, task, data, shots)
                report(outcome)
                outcomes.append(outcome)
    trainer.close()
    return outcomes


def _run_task(context: EvalContext, task: Task, data: str, shots: int) -> Outcome:
    start = time.monotonic()
    config = {"batch_size": context.batch_size, **copy.deepcopy(task.config)}
    length = min(config.get("max_seq_len") or context.length, context.length)
    config |= {"dataset_uri": data, "num_fewshot": [shots], "max_seq_len": length}
    outcome = Outcome(task.label, shots, task.kind)
    try:
        with _count_truncation() as truncation:
            evaluators, _ = build_icl_evaluators(
                [config], context.tokenizer, length, context.batch_size, destination_dir=context.folder
            )
            for evaluator in evaluators:
                _prepare(evaluator, length)
    except SequenceTooLong as error:
        outcome.problem = str(error)
        return outcome
    scores = [_evaluate(context.trainer, evaluator) for evaluator in evaluators]
    outcome.metric = _main_metric(scores[0][0])
    outcome.metrics = {name: _mean([metrics[name] for metrics, _ in scores]) for name in scores[0][0]}
    outcome.score = outcome.metrics[outcome.metric]
    if config.get("has_categories"):
        names = [str(evaluator.label).rsplit("/", 1)[-1] for evaluator in evaluators]
        outcome.categories = {name: metrics[outcome.metric] for name, (metrics, _) in zip(names, scores, strict=True)}
    outcome.baseline = (
        task.baseline if task.baseline is not None else _mean([_random_baseline(e, task) for e in evaluators])
    )
    outcome.n = sum(count for _, count in scores)
    if outcome.metric.endswith("Accuracy"):
        counts = [(round(metrics[outcome.metric] * count), count) for metrics, count in scores]
        outcome.interval, outcome.interval_method = accuracy_interval(counts)
    outcome.truncated, outcome.sequences = truncation
    outcome.seconds = time.monotonic() - start
    return outcome


def _evaluate(trainer: Trainer, evaluator: Evaluator) -> tuple[dict[str, float], int]:
    """Return the evaluator's metrics and its number of examples over all processes."""
    trainer.eval(eval_dataloader=[evaluator])
    metrics = trainer.state.eval_metrics[evaluator.label]
    counted = metrics[_main_metric(metrics)]
    total = (counted.total if hasattr(counted, "total") else counted.bucket_totals.sum()).detach().clone()
    dist.all_reduce(total)
    return {name: float(metric.compute()) for name, metric in metrics.items()}, int(total.item())


def _main_metric(metrics: Iterable[str]) -> str:
    """Return the name of the metric that is the task's score: an accuracy, if there is one."""
    names = list(metrics)
    return next((name for name in names if name.endswith("Accuracy")), names[0])


def _prepare(evaluator: Evaluator, length: int) -> None:
    """Let llm-foundry build and tokenize the prompts, which it does on first access."""
    dataset = _dataset(evaluator)
    if dataset.max_seq_len > length or dataset.padding_size < 1:
        longest = getattr(dataset, "max_answer_length", 0)
        raise SequenceTooLong(
            f"the longest answer has {longest} tokens, but question and answer together may have only {length}"
        )
    _ = dataset[0]


def _dataset(evaluator: Evaluator) -> Any:
    return evaluator.dataloader.dataloader.dataset


def _random_baseline(evaluator: Evaluator, task: Task) -> float:
    """Return the score of random guessing: the mean of 1 / number of choices; 0 for tasks without choices."""
    key = task.config.get("choices_key") or CHOICES_KEYS.get(task.kind)
    if key is None:
        return 0.0
    return _mean([1 / len(choices) for choices in _dataset(evaluator).dataset[key]])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def _count_truncation() -> Iterator[list[int]]:
    """Yield a list [truncated contexts, all contexts] that counts the contexts that llm-foundry truncates.

    llm-foundry's function truncates silently, and keeps the full context if the answer itself fills the sequence.
    """
    original = icl.trim_context
    count = [0, 0]

    def trim(context: list[int], answer: list[int], max_seq_len: int) -> list[int]:
        if len(answer) >= max_seq_len:
            raise SequenceTooLong(
                f"an answer has {len(answer)} tokens, so that no context fits into the sequence length {max_seq_len}"
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
    """Yield a temporary folder that all processes of a node share, and delete it afterwards."""
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
    """Return the path of the task's data for llm-foundry: remote or partial data is first written to `folder`."""
    if task.is_hub or (max_examples is None and not storage.is_remote(task.data)):
        return task.data
    target = Path(folder) / f"{task.label}.source.jsonl"
    if dist.get_local_rank() == 0:
        storage.write_text(target, "".join(f"{line}\n" for line in first_examples(task, max_examples)))
    dist.barrier()
    return str(target)
