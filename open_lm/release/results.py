"""The results of a run's final weights, for the cards, the report and the bill of materials."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from open_lm.release.context import Context

if TYPE_CHECKING:
    from open_lm.report.records import TaskEvaluation, TaskScore, ValidationSet


def final_validation(context: Context) -> tuple[ValidationSet, ...]:
    """Return the losses of the last validation, if it was made after the last step; empty otherwise."""
    validations = [item for item in context.run.validations if item.average is None]
    if not validations:
        return ()
    last, tokens = validations[-1], context.facts.final.tokens
    if last.tokens is not None and tokens is not None and last.tokens < tokens:
        return ()
    return tuple(replace(part, name=context.redactor.text(part.name)) for part in last.sets)


def task_scores(context: Context) -> list[tuple[TaskEvaluation, TaskScore]]:
    """Return the scores of the final weights, one per task and number of shots.

    Results of separate evaluations, which use all examples, precede those of the training.
    """
    step = context.facts.final.step
    evaluations = [item for item in context.run.evaluations if item.step in (step, None)]
    scores: dict[tuple[str, int], tuple[TaskEvaluation, TaskScore]] = {}
    for evaluation in sorted(evaluations, key=lambda item: item.is_live):
        for score in evaluation.tasks:
            if score.score is not None:
                scores.setdefault(score.key, (evaluation, score))
    return list(scores.values())


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def percent(score: float) -> str:
    return f"{100 * score:.2f} %"


def score_row(score: TaskScore) -> list[str]:
    """Return a row of a table: task, shots, metric, score, 95 % interval, random baseline, number of examples."""
    interval = "" if score.interval is None else f"{percent(score.interval[0])} to {percent(score.interval[1])}"
    values = [score.task, str(score.shots), metric_label(score), percent(score.score or 0.0), interval]
    return [*values, percent(score.baseline), f"{score.n:,}"]


def metric_label(score: TaskScore) -> str:
    """Return the usual name of a score's metric."""
    from open_lm.evaluate.icl.report import METRIC_LABELS

    return METRIC_LABELS.get(score.metric, score.metric)


SCORE_COLUMNS = ("task", "shots", "metric", "score", "95 % interval", "random", "examples")
LOSS_COLUMNS = ("validation set", "loss (nats per token)", "perplexity", "bits per byte", "tokens")


def loss_row(part: ValidationSet) -> list[str]:
    """Return a row of a table of validation losses."""
    if part.loss is None:
        return [part.name, "not finite", "", "", f"{part.tokens:,}"]
    bits = "" if part.bits_per_byte is None else f"{part.bits_per_byte:.4f}"
    return [part.name, f"{part.loss:.4f}", f"{perplexity(part.loss):.4g}", bits, f"{part.tokens:,}"]
