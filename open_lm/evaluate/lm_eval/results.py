"""Run tasks of lm-eval, and turn its results into those of the package: outcomes and results of single examples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, join_problems
from open_lm.evaluate.icl.metrics import HARNESS_PREFIX, NORMAL_QUANTILE, Outcome, Record, accuracy_interval
from open_lm.evaluate.icl.store import ResultStore
from open_lm.evaluate.lm_eval.model import OpenLM
from open_lm.storage.strict_json import to_json

_BOOTSTRAP_RESAMPLES = 1000  # of metrics without a formula for their standard error
_ROLLING = "loglikelihood_rolling"


def check_task_names(names: Sequence[str], include_path: str | None) -> Any:
    """Return lm-eval's manager of tasks.

    Raises:
        ConfigError: names that are no task, group or tag, or a folder that does not exist.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not storage.list_files(include_path):
        raise ConfigError(f"--include-path {include_path}: no such folder; pass one with the YAML files of tasks")
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown and include_path is not None:  # reading the names of all tasks of lm-eval takes several seconds
        manager = TaskManager(include_path=include_path)
        unknown = [name for name in unknown if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            join_problems(
                [f"{name} is unknown" for name in unknown],
                "--tasks; `python -m open_lm.evaluate.lm_eval ls tasks` lists those of lm-eval, and --include-path "
                "adds a folder",
            )
        )
    return manager


def evaluate(
    model: OpenLM, names: Sequence[str], manager: Any, *, shots: int | None = None, max_examples: int | None = None
) -> dict[str, Any] | None:
    """Evaluate tasks; return lm-eval's results on rank 0, and None on other ranks. Collective.

    Args:
        model: the model.
        names: tasks, groups or tags.
        manager: the result of `check_task_names`.
        shots: examples in the prompt; None for the number of each task.
        max_examples: use only the first examples of each task.
    """
    from lm_eval import simple_evaluate

    results: dict[str, Any] | None = simple_evaluate(
        model=model,
        tasks=manager.match_tasks(list(names)),
        num_fewshot=shots,
        limit=max_examples,
        bootstrap_iters=_BOOTSTRAP_RESAMPLES,
        log_samples=True,
        task_manager=manager,
    )
    return results


def outcomes_of(results: Mapping[str, Any], tokenizer_sha256: str, store: ResultStore | None = None) -> list[Outcome]:
    """Return an outcome per task, and store the results of its examples.

    The score is the first metric of the task's list of which higher is better. Tasks without one, such as those that
    only measure perplexity, have no score, nor do those whose metric is above 1, such as BLEU, because averages need
    scores from 0 to 1. `metrics` has the values of all metrics.

    Args:
        results: those of `evaluate`, with samples.
        tokenizer_sha256: fingerprint of the tokenizer: examples are comparable only with equal tokens.
        store: where the results of examples are kept; None to keep none.
    """
    return [_outcome(task, results, tokenizer_sha256, store) for task in sorted(results["configs"])]


def _outcome(task: str, results: Mapping[str, Any], tokenizer_sha256: str, store: ResultStore | None) -> Outcome:
    values: Mapping[str, Any] = results["results"][task]
    config = results["configs"][task]
    samples = results["samples"][task]
    keys = [key for key in values if "," in key and "_stderr" not in key]
    outcome = Outcome(task, int(results["n-shot"].get(task) or 0), HARNESS_PREFIX + str(config["output_type"]))
    outcome.metrics = {_label(key): value for key in keys if (value := _number(values[key])) is not None}
    key = _score_key(keys, results["higher_is_better"].get(task) or {})
    score = None if key is None else _number(values[key])
    if key is None or config["output_type"] == _ROLLING or (score is not None and score > 1):
        outcome.n = len({sample["doc_id"] for sample in samples})
        return outcome
    metric, name = key.split(",")
    chosen = sorted((s for s in samples if s["filter"] == name), key=lambda sample: int(sample["doc_id"]))
    outcome.metric, outcome.score, outcome.n = _label(key), score, len(chosen)
    outcome.baseline = _chance(chosen) if config["output_type"] == "multiple_choice" else 0.0
    records = [record for index, sample in enumerate(chosen) if (record := _record(index, sample, metric)) is not None]
    is_accuracy = len(records) == len(chosen) > 0
    if is_accuracy:
        counts = [(sum(record["correct"] for record in records), len(records))]
        outcome.interval, outcome.interval_method = accuracy_interval(counts)
    elif (error := _number(values.get(f"{metric}_stderr,{name}"))) is not None and outcome.score is not None:
        outcome.interval = (outcome.score - NORMAL_QUANTILE * error, outcome.score + NORMAL_QUANTILE * error)
        outcome.interval_method = "normal, with the standard error of lm-eval"
    outcome.digest = _digest(chosen, outcome, tokenizer_sha256)
    if store is not None and is_accuracy:
        outcome.examples_file = store.path(task, outcome.shots, outcome.digest)
        header = {"task": task, "shots": outcome.shots, "prompts": outcome.digest, "n": outcome.n}
        store.finish(outcome.examples_file, dict(enumerate(records)), header)
    return outcome


def _score_key(keys: Sequence[str], higher_is_better: Mapping[str, bool | None]) -> str | None:
    """Return the first key "METRIC,FILTER" of whose metric lower values are not better; None if there is none."""
    return next((key for key in keys if higher_is_better.get(key.partition(",")[0]) is not False), None)


def _record(index: int, sample: Mapping[str, Any], metric: str) -> Record | None:
    """Return the result of an example that is right or wrong; None for other metrics.

    nll is the negative log-likelihood of each continuation, a sum over its tokens.
    """
    value = sample.get(metric)
    if value not in (0, 1, True, False):
        return None
    record: Record = {"index": index, "doc_id": sample["doc_id"], "correct": bool(value)}
    responses = [response for group in sample["resps"] for response in group]
    if all(isinstance(response, tuple | list) for response in responses):
        return {**record, "nll": [-float(response[0]) for response in responses]}
    return {**record, "text": responses[0] if len(responses) == 1 else responses}


def _chance(samples: Sequence[Mapping[str, Any]]) -> float:
    """Return the expected score of random guessing: the mean of 1 / number of different continuations."""
    counts = [len({repr(arguments) for arguments in sample["arguments"]}) for sample in samples]
    return sum(1 / count for count in counts) / len(counts) if counts else 0.0


def _digest(samples: Sequence[Mapping[str, Any]], outcome: Outcome, tokenizer_sha256: str) -> str:
    digest = hashlib.sha256(to_json([outcome.kind, outcome.metric, tokenizer_sha256]).encode())
    for sample in samples:
        digest.update(repr((sample["doc_id"], sample["arguments"], str(sample["target"]))).encode())
    return digest.hexdigest()


def _label(key: str) -> str:
    """Return the name of a metric, with the filter if there is one: lm-eval writes "acc,none"."""
    metric, _, name = key.partition(",")
    return metric if name == "none" else f"{metric} ({name})"


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def other_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the JSON result contains in addition to the outcomes: lm-eval's own results, versions and groups."""
    names = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
    return {"lm_eval": {name: results[name] for name in names if name in results}}
