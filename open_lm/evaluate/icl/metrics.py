"""Turn the scores of examples into the metrics of a task, by llm-foundry's rules.

A choice is the one with the lowest mean loss per token. A continuation counts if every token is the most likely one. A
generated text counts if it begins with an accepted answer, after normalization.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from open_lm.evaluate.icl.packing import equal_choices
from open_lm.evaluate.icl.prompts import Example, Prompts
from open_lm.evaluate.icl.scoring import ChoiceScores
from open_lm.evaluate.icl.task_types import TASK_TYPES, PromptOptions

LEVEL = 0.95  # of the intervals
NORMAL_QUANTILE = 1.959963984540054  # intervals of LEVEL are this many standard errors wide on each side
HARNESS_PREFIX = "lm-eval/"  # of the kind of a task of lm-eval, before lm-eval's output_type
_BUCKETS = 10  # of the calibration error
_RESAMPLES = 10_000
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))

Record = dict[str, Any]  # the stored result of an example: see `choice_record` and `text_record`


@dataclass
class Outcome:
    """The result of a task with one number of examples in the prompt.

    Attributes:
        task: label of the task.
        shots: examples in the prompt.
        kind: llm-foundry's icl_task_type, or HARNESS_PREFIX and lm-eval's output_type.
        metric: llm-foundry's or lm-eval's name of the metric that is the score.
        score: from 0 to 1, for tasks with categories the mean over them; None if the task could not run.
        baseline: expected score of random guessing.
        n: number of scored examples.
        truncated: prompts (one per choice) with a context that was truncated on the left to fit the model.
        sequences: all prompts.
        seconds: duration.
        metrics: all metrics of the task by llm-foundry's name, including the score.
        categories: score by category.
        problem: why the task could not run.
        interval: 95 % interval of the score, or None.
        interval_method: how it was computed.
        micro_score: for tasks with categories, the score over all examples.
        digest: sha256 of the prompts; equal digests mean equal token ids.
        examples_file: file with the result of each example.
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
    interval: tuple[float, float] | None = None
    interval_method: str = ""
    micro_score: float | None = None
    digest: str = ""
    examples_file: str = ""


# --------------------------------------------------------------------------------------------------- examples
def choice_record(example: Example, scores: ChoiceScores) -> Record:
    """Return the result of an example whose continuations were scored.

    Its keys: index; correct; for each choice nll, the mean loss per token, and tokens, their number; with several
    choices prediction and gold; confidence, from 0 to 1, for the calibration error; category, if the task has them.
    """
    order = equal_choices(example)
    log_probs = [scores.log_probs[index] for index in order]
    nll = [float(-values.mean(dtype=np.float64)) for values in log_probs]
    record: Record = {**_position(example), "nll": nll, "tokens": [len(values) for values in log_probs]}
    if len(order) == 1:
        confidence = float(np.exp(scores.max_log_probs[0].min()))
        return {**record, "correct": bool(scores.is_greedy[0].all()), "confidence": confidence}
    prediction = min(range(len(nll)), key=nll.__getitem__)
    likelihoods = [float(np.exp(values).mean()) for values in log_probs]
    top = max(range(len(nll)), key=likelihoods.__getitem__)
    total = sum(likelihoods)
    record |= {"prediction": prediction, "gold": example.gold, "correct": prediction == example.gold}
    return {**record, "confidence": max(likelihoods) / total if total else 0.0, "confident": top == example.gold}


def text_record(example: Example, text: str, options: PromptOptions) -> Record:
    """Return the result of an example with a generated text: index, correct, text, and category if there is one."""
    answer = text
    if options.early_stopping_criteria:
        answer = re.split("|".join(options.early_stopping_criteria), answer)[0]
    if options.cot_delimiter:
        answer = answer.split(options.cot_delimiter)[-1]
    clean: Callable[[str], str] = normalize_answer if options.do_normalization else str.strip
    answer = clean(answer)
    return {
        **_position(example),
        "correct": any(answer.startswith(clean(accepted)) for accepted in example.answers),
        "text": text,
    }


def _position(example: Example) -> Record:
    """Return the index of an example and, if the task has categories, its category."""
    return {"index": example.index, **({"category": example.category} if example.category else {})}


def normalize_answer(text: str) -> str:
    """Return a text in lower case without punctuation, articles and repeated white space."""
    words = text.replace("_", " ").lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())


# ------------------------------------------------------------------------------------------------------ tasks
def task_outcome(prompts: Prompts, records: Mapping[int, Record]) -> Outcome:
    """Return the outcome of a task from the results of all its examples, by index."""
    task, kind = prompts.task, TASK_TYPES.get(prompts.task.kind)
    groups: dict[str, list[Record]] = {}
    for example in prompts.examples:
        groups.setdefault(example.category, []).append(records[example.index])
    names = list(task.config.get("metric_names") or [kind.metric])
    by_category = {name: {c: _metric(name, group) for c, group in groups.items()} for name in names}
    metric = next((name for name in names if name.endswith("Accuracy")), names[0])
    outcome = Outcome(
        task.label,
        prompts.shots,
        task.kind,
        metric=metric,
        baseline=prompts.baseline,
        n=len(prompts.examples),
        truncated=prompts.num_truncated,
        sequences=prompts.num_sequences,
        metrics={name: _mean(list(values.values())) for name, values in by_category.items()},
        digest=prompts.digest(),
    )
    outcome.score = outcome.metrics[metric]
    if task.config.get("has_categories"):
        outcome.categories = by_category[metric]
        outcome.micro_score = _metric(metric, [record for group in groups.values() for record in group])
    if metric.endswith("Accuracy"):
        counts = [(sum(record["correct"] for record in group), len(group)) for group in groups.values()]
        outcome.interval, outcome.interval_method = accuracy_interval(counts)
    return outcome


def _metric(name: str, records: Sequence[Record]) -> float:
    if not name.endswith("ExpectedCalibrationError"):
        return _mean([float(record["correct"]) for record in records])
    return calibration_error(
        [record["confidence"] for record in records],
        [bool(record.get("confident", record["correct"])) for record in records],
    )


def calibration_error(confidences: Sequence[float], correct: Sequence[bool]) -> float:
    """Return the expected calibration error with ten buckets (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    As in llm-foundry, the confidence of a bucket is its middle.
    """
    bucket = np.minimum((np.asarray(confidences) * _BUCKETS).astype(int), _BUCKETS - 1)
    totals = np.bincount(bucket, minlength=_BUCKETS)
    hits = np.bincount(bucket, weights=np.asarray(correct, dtype=float), minlength=_BUCKETS)
    middles = (np.arange(_BUCKETS) + 0.5) / _BUCKETS
    used = totals > 0
    gaps = np.abs(hits[used] / totals[used] - middles[used])
    return float((totals[used] * gaps).sum() / totals.sum())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -------------------------------------------------------------------------------------------------- intervals
def accuracy_interval(counts: Sequence[tuple[int, int]]) -> tuple[tuple[float, float], str]:
    """Return the 95 % interval of the mean accuracy of groups of (correct, all) examples, and the method's name.

    One group: the exact binomial interval. Several: the bootstrap over the examples of each group, unless every group
    is all right or all wrong, where it has no width; then the exact interval of all examples.
    """
    if len(counts) == 1 or all(correct in (0, n) for correct, n in counts):
        return binomial_interval(sum(correct for correct, _ in counts), sum(n for _, n in counts)), "exact binomial"
    generator = np.random.default_rng(0)
    draws = [generator.binomial(n, correct / n, size=_RESAMPLES) / n for correct, n in counts]
    lower, upper = np.quantile(np.mean(draws, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return (float(lower), float(upper)), "bootstrap over the examples of each category"


@lru_cache(maxsize=4096)
def binomial_interval(correct: int, n: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a proportion (Clopper and Pearson 1934)."""
    tail = (1 - LEVEL) / 2
    lower = 0.0 if correct == 0 else _solve(lambda p: 1 - binomial_cdf(correct - 1, n, p), tail)
    upper = 1.0 if correct == n else _solve(lambda p: 1 - binomial_cdf(correct, n, p), 1 - tail)
    return lower, upper


def _solve(increasing: Callable[[float], float], value: float) -> float:
    """Return the p in (0, 1) at which an increasing function of p has a value."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < value else (low, middle)
    return (low + high) / 2


def binomial_cdf(k: int, n: int, p: float) -> float:
    """Return the probability of at most k successes in n trials."""
    i = np.arange(k + 1)
    log_factorials = _log_factorials(n)
    log_terms = log_factorials[n] - log_factorials[i] - log_factorials[n - i]
    log_terms = log_terms + i * math.log(p) + (n - i) * math.log1p(-p)
    return float(min(1.0, np.exp(log_terms).sum()))


@lru_cache(maxsize=8)
def _log_factorials(n: int) -> np.ndarray:
    """Return log(i!) for i from 0 to n."""
    return np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
