"""Evaluate a model on in-context-learning tasks: a loaded checkpoint, or the live model of a training run.

    evaluator = IclEvaluator(tokenizer, options)
    outcome = evaluator.evaluate(model, evaluator.prompts(task, shots, seq_len))

Examples are divided over the ranks. If the ranks compute each forward pass together (FSDP, tensor parallelism), all of
them call the model equally often: a rank without work repeats a batch and ignores the result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from open_lm.config.layout import MeshLayout
from open_lm.distributed.processes import (
    broadcast_object,
    gather_objects,
    run_on_all_ranks,
    run_on_master,
    sum_over_ranks,
)
from open_lm.evaluate.icl.generation import AnswerDecoder, generate_answers
from open_lm.evaluate.icl.metrics import Outcome, Record, choice_record, task_outcome, text_record
from open_lm.evaluate.icl.packing import Unit, batches_of_lengths, form_batches, pack_example
from open_lm.evaluate.icl.prompts import Example, Prompts, PromptTooLong, build_prompts
from open_lm.evaluate.icl.scoring import BatchLayout, score_units
from open_lm.evaluate.icl.store import ResultStore
from open_lm.evaluate.icl.tasks import Task
from open_lm.monitor.watchdog import heartbeat
from open_lm.parallel.parallelize import evaluation_mode
from open_lm.tokenizer import Tokenizer

CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS = 4096, 32768  # padded tokens of a batch
_STORE_S = 10.0  # seconds between two writes of results
_PROGRESS_S = 15.0  # seconds between two lines about the progress
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """How the ranks divide the examples.

    Attributes:
        index: which share of the examples this rank computes.
        count: number of shares.
        in_lockstep: whether the ranks compute every forward pass together.
    """

    index: int = 0
    count: int = 1
    in_lockstep: bool = False

    @staticmethod
    def of_layout(layout: MeshLayout) -> Ranks:
        """Return the division for a live model. The ranks of a tensor-parallel group compute the same examples; those
        of a context-parallel group compute different ones, because prompts are short. Replicas are independent."""
        size = layout.replicate * layout.shard * layout.context
        is_split = layout.shard * layout.context * layout.tensor > 1
        return Ranks(layout.rank // layout.tensor, size, in_lockstep=is_split)


@dataclass(frozen=True)
class EvaluatorOptions:
    """Settings of an evaluator.

    Attributes:
        device: device of the model.
        autocast: a factory of autocast contexts for the compute precision.
        ranks: how the ranks divide the examples.
        batch_tokens: padded tokens of a batch; 0 selects a number for the device.
        max_examples: use only the first examples of a task, of each category if it has categories; None for all.
        special_tokens: let the tokenizer add special tokens to the text before an example.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ranks: Ranks = field(default_factory=Ranks)
    batch_tokens: int = 0
    max_examples: int | None = None
    special_tokens: bool = False

    @property
    def max_batch_tokens(self) -> int:
        return self.batch_tokens or (CPU_BATCH_TOKENS if self.device.type == "cpu" else CUDA_BATCH_TOKENS)


class IclEvaluator:
    """Evaluates models on tasks.

    Args:
        tokenizer: the tokenizer of the model's training data.
        options: the settings.
        store: where the results of examples are kept; None for the live model of a training run.
    """

    def __init__(self, tokenizer: Tokenizer, options: EvaluatorOptions, store: ResultStore | None = None) -> None:
        self.tokenizer, self.options, self.store = tokenizer, options, store

    def prompts(self, task: Task, shots: int, seq_len: int) -> Prompts:
        """Return the prompts of a task, of at most `seq_len` tokens; see `build_prompts`. Collective."""
        options = self.options
        return run_on_all_ranks(
            lambda: build_prompts(task, shots, self.tokenizer, seq_len, options.max_examples, options.special_tokens)
        )

    def evaluate(self, model: nn.Module, prompts: Prompts) -> Outcome:
        """Evaluate a model; every rank gets the same outcome. Collective.

        The model is in evaluation mode meanwhile. Random generators and weights do not change.
        """
        start = time.monotonic()
        path = self._path(prompts)
        records = self._stored(path)
        pending = [example for example in prompts.examples if example.index not in records]
        with evaluation_mode(model), without_compilation(model):
            new = self._evaluate_examples(model, prompts, pending, path)
        outcome = self._merge(prompts, records, new, path)
        return replace(outcome, seconds=time.monotonic() - start, examples_file=path or "")

    def evaluate_task(self, model: nn.Module, task: Task, shots: int, seq_len: int) -> Outcome:
        """Build the prompts of a task and evaluate the model. Prompts that do not fit are the outcome's problem."""
        try:
            prompts = self.prompts(task, shots, seq_len)
        except PromptTooLong as error:
            return Outcome(task.label, shots, task.kind, problem=str(error))
        return self.evaluate(model, prompts)

    # ------------------------------------------------------------------------------------------ results
    def _path(self, prompts: Prompts) -> str | None:
        return self.store.path(prompts.task.label, prompts.shots, prompts.digest()) if self.store else None

    def _stored(self, path: str | None) -> dict[int, Record]:
        store = self.store
        if store is None or path is None:
            return {}
        return run_on_master(lambda: store.read(path))

    def _merge(self, prompts: Prompts, records: dict[int, Record], new: list[Record], path: str | None) -> Outcome:
        """Return the outcome of stored and new results, and store them all. Collective."""
        groups = gather_objects(new)
        for group in groups:
            records |= {record["index"]: record for record in group}

        def finish() -> Outcome:
            indices = {example.index for example in prompts.examples}
            known = {index: record for index, record in records.items() if index in indices}
            outcome = task_outcome(prompts, known)
            if self.store is not None and path is not None and any(groups):
                header = {"task": outcome.task, "shots": outcome.shots, "prompts": outcome.digest, "n": outcome.n}
                self.store.finish(path, known, header)
            return outcome

        return broadcast_object(None, run_on_master(finish))

    # ------------------------------------------------------------------------------------------ examples
    def _evaluate_examples(
        self, model: nn.Module, prompts: Prompts, examples: Sequence[Example], path: str | None
    ) -> list[Record]:
        """Return the results of this rank's share of the examples."""
        generates = prompts.task.kind == "generation_task_with_answers"
        if generates:
            batches: list[Any] = _generation_batches(examples, self.options.max_batch_tokens)
            costs = [max(len(e.choices[0].context) + e.max_new_tokens for e in batch) * len(batch) for batch in batches]
        else:
            layout = BatchLayout.of_model(model, self.options.device)
            units = [pack_example(example, layout.width) for example in examples]
            batches = form_batches(units, self.options.max_batch_tokens, padded=not layout.is_flat)
            costs = [sum(unit.num_tokens for unit in batch) for batch in batches]
        progress = _Progress(f"{prompts.task.label} {prompts.shots}-shot", len(prompts.examples), len(examples))
        records: list[Record] = []
        unsaved: list[Record] = []
        saved_at = time.monotonic()
        for batch, is_repeated, done in _share(batches, costs, self.options.ranks):
            heartbeat("evaluating in-context learning")
            run = self._generate if generates else self._score
            results = list(run(model, prompts, batch))
            if is_repeated:
                continue
            records += results
            unsaved += results
            progress.log(len(records), done)
            if self.store is not None and path is not None and time.monotonic() - saved_at > _STORE_S:
                self.store.append(path, self.options.ranks.index, unsaved)
                unsaved, saved_at = [], time.monotonic()
        return records

    def _score(self, model: nn.Module, prompts: Prompts, batch: Sequence[Unit]) -> Iterator[Record]:
        layout = BatchLayout.of_model(model, self.options.device)
        scores = score_units(model, batch, layout, self.options.device, self.options.autocast)
        return (choice_record(unit.example, score) for unit, score in zip(batch, scores, strict=True))

    def _generate(self, model: nn.Module, prompts: Prompts, batch: Sequence[Example]) -> Iterator[Record]:
        options = prompts.options
        decoder = AnswerDecoder(self.tokenizer, prompts.prefix_space, options.early_stopping_criteria)
        texts = generate_answers(
            model,
            [example.choices[0].context for example in batch],
            [example.max_new_tokens for example in batch],
            decoder,
            self.options.device,
            self.options.autocast,
            self._any_rank if self.options.ranks.in_lockstep else bool,
        )
        return (text_record(example, text, options) for example, text in zip(batch, texts, strict=True))

    def _any_rank(self, value: bool) -> bool:
        """Return whether the value is true on any rank. Collective."""
        return sum_over_ranks(torch.tensor(float(value), device=self.options.device)).item() > 0


class _Progress:
    """Logs the progress of a task on rank 0, with the remaining time."""

    def __init__(self, name: str, num_examples: int, num_pending: int) -> None:
        self.name, self.num_pending = name, num_pending
        self.start = self.logged_at = time.monotonic()
        if num_pending < num_examples:
            _log(f"{name}: {num_examples - num_pending} of {num_examples} examples were evaluated before")

    def log(self, num_records: int, done: float) -> None:
        """Log if the last line is old enough; `done` is the share of this rank's work that is done."""
        now = time.monotonic()
        if now - self.logged_at < _PROGRESS_S or not done:
            return
        self.logged_at = now
        remaining = timedelta(seconds=round((now - self.start) * (1 - done) / done))
        _log(f"{self.name}: {100 * done:.0f} % of {self.num_pending} examples, ETA: {remaining}")


def _log(message: str) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logging.info(message)


def _generation_batches(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    lengths = [len(example.choices[0].context) + example.max_new_tokens for example in examples]
    return [[examples[index] for index in batch] for batch in batches_of_lengths(lengths, max_tokens)]


def _share(batches: Sequence[T], costs: Sequence[int], ranks: Ranks) -> Iterator[tuple[T, bool, float]]:
    """Yield this rank's batches: (batch, whether another rank counts its result, share of the work done after it).

    In lockstep every rank yields the same number of batches.
    """
    own = list(range(ranks.index, len(batches), ranks.count))
    total, done = sum(costs[index] for index in own), 0
    for index in own:
        done += costs[index]
        yield batches[index], False, done / max(total, 1)
    if ranks.in_lockstep and batches:
        for _ in range(-(-len(batches) // ranks.count) - len(own)):
            yield batches[-1], True, 1.0


@contextmanager
def without_compilation(model: nn.Module) -> Iterator[None]:
    """Run compiled blocks uncompiled in the `with` block: every batch has another length, and each would recompile."""
    is_compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        yield


def evaluate_tasks(
    evaluator: IclEvaluator,
    model: nn.Module,
    tasks: Sequence[Task],
    seq_len: int,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Evaluate a model on all tasks with all their numbers of shots. Collective.

    Args:
        evaluator: the evaluator.
        model: the model.
        tasks: entries of the YAML files.
        seq_len: maximum number of tokens of a prompt with its answer.
        report: called with each outcome when it is available.
    """
    outcomes = []
    for task in tasks:
        for shots in task.shots:
            outcome = evaluator.evaluate_task(model, task, shots, seq_len)
            report(outcome)
            outcomes.append(outcome)
    return outcomes
