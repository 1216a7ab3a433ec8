"""In-context-learning tasks on the live model (--icl-yaml)."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from typing import Any

from open_lm.config.checks import wants_training
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import broadcast_object, run_on_master
from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.icl.evaluator import EvaluatorOptions, IclEvaluator, Ranks
from open_lm.evaluate.icl.metrics import Outcome
from open_lm.evaluate.icl.prompts import Prompts, PromptTooLong
from open_lm.evaluate.icl.report import averages, centered, format_table
from open_lm.evaluate.icl.task_lists import find_task_list
from open_lm.evaluate.icl.tasks import EvalSettings, read_settings
from open_lm.monitor.loggers import log_to_file
from open_lm.parallel.parallelize import unwrap
from open_lm.tokenizer import Tokenizer
from open_lm.training.build import RunParts
from open_lm.training.evaluations.budget import Budget
from open_lm.training.evaluations.moment import Moment, Results, StepFile, StepSchedule
from open_lm.training.evaluations.tokenizer import run_tokenizer

# Fields of an outcome that icl.jsonl records.
_RECORDED = (
    *("task", "shots", "metric", "score", "baseline", "n", "interval", "interval_method", "metrics", "categories"),
    *("micro_score", "seconds", "digest"),
)


class TaskEvaluation:
    """The tasks of --icl-yaml. icl.jsonl in the run's folder has a line per evaluation.

    The examples of an evaluation with a time limit are the first ones of each task, and their prompts are those of an
    evaluation without.
    """

    name = "icl"

    def __init__(self, parts: RunParts, settings: EvalSettings, tokenizer: Tokenizer) -> None:
        self._parts, self._cfg = parts, parts.config.live_evaluation
        self._file = StepFile(parts.paths.icl if parts.paths.enabled else None)
        self._schedule = StepSchedule(self._cfg.icl_every_n_steps, self._file)
        self._evaluator = IclEvaluator(tokenizer, _options(parts))
        seq_len = min(settings.max_seq_len or parts.params.seq_len, parts.params.seq_len)
        self._prompts = _build_prompts(self._evaluator, settings, seq_len, parts)
        self._limit = max((_largest_group(prompts) for prompts in self._prompts), default=1)

    @classmethod
    def create(cls, parts: RunParts, weights: str | None) -> TaskEvaluation | None:
        """Read the files and build the prompts; return None without --icl-yaml. Collective.

        Raises:
            UserError: a file that is missing or invalid, or a run without a tokenizer.
        """
        cfg = parts.config.live_evaluation
        if cfg.icl_yaml is None:
            return None
        files, folder = [find_task_list(file) for file in cfg.icl_yaml], cfg.icl_data_dir
        settings = run_on_master(
            lambda: read_settings(files, folder, yaml_flag="--icl-yaml", data_flag="--icl-data-dir")
        )
        return cls(parts, settings, run_tokenizer(parts, weights, "--icl-yaml"))

    def is_due(self, moment: Moment) -> bool:
        return self._schedule.is_due(moment)

    def rewind(self, moment: Moment) -> None:
        self._file.rewind(moment.step)

    def run(self, moment: Moment) -> Results:
        """Evaluate the tasks and append the results to icl.jsonl."""
        number = self._num_examples(moment)
        start = time.monotonic()
        selected = [_first_examples(prompts, number) for prompts in self._prompts]
        model = unwrap(self._parts.model)  # DDP would expect equally many calls on all ranks
        outcomes = [self._evaluator.evaluate(model, prompts) for prompts in selected]
        seconds = broadcast_object(None, time.monotonic() - start)
        examples = sum(outcome.n for outcome in outcomes)
        means = averages(outcomes)
        record: dict[str, Any] = {"step": moment.step, "tokens": moment.tokens, "checkpoint_path": moment.checkpoint}
        if moment.average is not None:
            record["average_model"] = moment.average
        record |= {"seconds": seconds, "examples": examples, "examples_per_task": number, **means}
        tasks = [{name: asdict(outcome)[name] for name in _RECORDED} for outcome in outcomes]
        for task, outcome in zip(tasks, outcomes, strict=True):
            task["centered"] = centered(outcome)
        self._file.append([{**record, "tasks": tasks}])
        if self._parts.runtime.is_master:
            self._log(moment, outcomes, number, examples, seconds)
        metrics = {_metric_name(outcome): outcome.score for outcome in outcomes}
        return Results({**metrics, **{f"icl/{name}": value for name, value in means.items()}, "icl/examples": examples})

    def _num_examples(self, moment: Moment) -> int:
        """Return the number of examples of each task, which rank 0 decides. Collective."""
        share = self._cfg.icl_max_time_share
        if share is None or not wants_training(self._parts.config.data):
            return self._limit

        def count(number: int) -> int:
            return sum(len(_first_examples(prompts, number).examples) for prompts in self._prompts)

        budget = Budget(share, moment.step_s)
        return run_on_master(lambda: budget.examples(moment.step, self._file.lines(), self._limit, count))

    def _log(self, moment: Moment, outcomes: list[Outcome], number: int, examples: int, seconds: float) -> None:
        mean = averages(outcomes)["average"]
        thinned = ""
        if number < self._limit:
            thinned = f" (the first {number} of each task, because of --icl-max-time-share)"
        scores = ", ".join(f"{o.task} {o.shots}-shot {o.score:.4f}" for o in outcomes if o.score is not None)
        logging.info(
            f"Tasks at step {moment.step}: average {mean:.4f} over {examples} examples{thinned} in {seconds:.1f} s; "
            f"{scores}"
        )
        log_to_file(f"Tasks at step {moment.step}:\n{format_table(outcomes)}")


def _options(parts: RunParts) -> EvaluatorOptions:
    """Return the options of the evaluator. A batch has at most the tokens of a training micro-batch, which fit."""
    config, device, batch_tokens = parts.config, parts.runtime.device, 0
    if wants_training(config.data):
        micro_batch = config.data.global_batch_size // (parts.layout.data_size * config.optim.accum_freq)
        batch_tokens = max(micro_batch, 1) * parts.params.seq_len
    options = EvaluatorOptions(
        device=device,
        autocast=get_autocast(config.precision.precision, device.type),
        ranks=Ranks.of_layout(parts.layout),
        max_examples=config.live_evaluation.icl_max_examples,
    )
    return replace(options, batch_tokens=min(batch_tokens, options.max_batch_tokens))


def _build_prompts(evaluator: IclEvaluator, settings: EvalSettings, seq_len: int, parts: RunParts) -> list[Prompts]:
    """Return the prompts of the tasks; log those that do not fit the model. Collective."""
    prompts, problems = [], []
    for task in settings.tasks:
        for shots in task.shots:
            try:
                prompts.append(evaluator.prompts(task, shots, seq_len))
            except PromptTooLong as error:
                problems.append(f"task {task.label} {shots}-shot is left out: {error}")
    if not prompts:
        raise ConfigError("\n".join(["--icl-yaml: no task fits the model", *problems]))
    for item in prompts:
        _check_ids(item, parts.params.vocab_size)
        if item.num_truncated:
            problems.append(
                f"task {item.task.label} {item.shots}-shot: {item.num_truncated} of {item.num_sequences} contexts are "
                f"truncated on the left to {seq_len} tokens"
            )
    if parts.runtime.is_master:
        for problem in problems:
            logging.warning(problem)
    return prompts


def _check_ids(prompts: Prompts, vocab_size: int) -> None:
    """Raise DataError if the prompts have ids that the model does not have."""
    arrays = [ids for e in prompts.examples for choice in e.choices for ids in (choice.context, choice.continuation)]
    largest = max((int(ids.max()) for ids in arrays if len(ids)), default=0)
    if largest >= vocab_size:
        error = DataError(
            f"task {prompts.task.label}: the tokenizer gives the id {largest}, but the model's vocabulary has "
            f"{vocab_size} ids; check --tokenizer and --vocab-size"
        )
        error.on_every_rank = True
        raise error


def _first_examples(prompts: Prompts, number: int) -> Prompts:
    """Return the prompts with the first `number` examples of each category."""
    counts: dict[str, int] = {}
    selected = []
    for example in prompts.examples:
        counts[example.category] = counts.get(example.category, 0) + 1
        if counts[example.category] <= number:
            selected.append(example)
    return replace(prompts, examples=selected)


def _largest_group(prompts: Prompts) -> int:
    """Return the number of examples of the largest category."""
    counts: dict[str, int] = {}
    for example in prompts.examples:
        counts[example.category] = counts.get(example.category, 0) + 1
    return max(counts.values())


def _metric_name(outcome: Outcome) -> str:
    return f"icl/{outcome.task}_{outcome.shots}shot"
