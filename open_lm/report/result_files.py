"""Read the evaluations and the text samples of a run: results.jsonl, icl.jsonl, evals/NAME.json, samples.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from open_lm import storage
from open_lm.report.records import Sample, TaskEvaluation, TaskScore, Validation, ValidationSet
from open_lm.system.names import set_name

if TYPE_CHECKING:
    from open_lm.evaluate.icl.metrics import Outcome

T = TypeVar("T")


def read_lines(url: str, convert: Callable[[Any], T]) -> tuple[list[T], int]:
    """Return the converted lines of a JSON lines file, and the number of lines that could not be read."""
    results, num_damaged = [], 0
    for line in storage.read_bytes(url).split(b"\n"):
        if not line.strip():
            continue
        try:
            results.append(convert(orjson.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            num_damaged += 1
    return results, num_damaged


# ---------------------------------------------------------------------------------------------- validation
def validation(line: Any) -> Validation:
    """Return the validation of a line of results.jsonl: a list with a dict per validation set."""
    first = line[0]
    return Validation(
        tokens=_integer(first.get("train_tokens")),
        sets=tuple(_validation_set(result, number) for number, result in enumerate(line)),
        checkpoint=_text(first.get("checkpoint_path")),
        average=_text(first.get("average")),
    )


def _validation_set(result: Mapping[str, Any], number: int) -> ValidationSet:
    name = result.get("name") or set_name(result.get("val_data") or []) or str(number)
    bounds = next((pair for kind in ("tokens", "sequences") if (pair := _bounds(result, kind)) is not None), None)
    return ValidationSet(
        name=str(name),
        loss=_number(result.get("loss")),
        interval=bounds,
        tokens=_integer(result.get("tokens")) or 0,
        bits_per_byte=_number(result.get("bits_per_byte")),
        bytes=_integer(result.get("bytes")),
    )


def _bounds(result: Mapping[str, Any], kind: str) -> tuple[float, float] | None:
    lower, upper = (_number(result.get(f"loss_{kind}_{bound}_95")) for bound in ("lower", "upper"))
    return None if lower is None or upper is None or lower == -1 else (lower, upper)


# ---------------------------------------------------------------------------------------------- tasks
def live_evaluation(line: Mapping[str, Any]) -> TaskEvaluation:
    """Return the evaluation of a line of icl.jsonl."""
    return TaskEvaluation(
        origin="icl.jsonl",
        step=_integer(line["step"]),
        tokens=_integer(line.get("tokens")),
        checkpoint=_text(line.get("checkpoint_path")),
        tasks=tuple(_task(task) for task in line["tasks"]),
        average=_number(line.get("average")),
        centered_average=_number(line.get("centered_average")),
        examples_per_task=_integer(line.get("examples_per_task")),
    )


def _task(task: Mapping[str, Any]) -> TaskScore:
    interval = task.get("interval")
    return TaskScore(
        task=str(task["task"]),
        shots=int(task["shots"]),
        metric=str(task.get("metric", "")),
        score=_number(task.get("score")),
        baseline=_number(task.get("baseline")) or 0.0,
        n=_integer(task.get("n")) or 0,
        interval=None if interval is None else (float(interval[0]), float(interval[1])),
    )


def stored_evaluation(url: str) -> TaskEvaluation:
    """Return the evaluation of a file in evals/.

    Raises:
        UserError: the file is not a result of eval_openlm_ckpt.py, or cannot be read.
    """
    from open_lm.evaluate.icl.report import read_json  # needs torch

    content, outcomes = read_json(url)
    return TaskEvaluation(
        origin=f"evals/{PurePath(url).name}",
        step=_integer(content.get("step")),
        tokens=_integer(content.get("tokens")),
        checkpoint=_text(content.get("checkpoint")),
        tasks=tuple(_outcome_score(outcome) for outcome in outcomes),
        average=_number(content.get("average")),
        centered_average=_number(content.get("centered_average")),
        engine=str(content.get("engine") or "native"),
        aggregates=_aggregates(content),
        examples_per_task=_integer(content.get("max_examples")),
    )


def _outcome_score(outcome: Outcome) -> TaskScore:
    return TaskScore(
        task=outcome.task,
        shots=outcome.shots,
        metric=outcome.metric,
        score=outcome.score,
        baseline=outcome.baseline,
        n=outcome.n,
        interval=None if outcome.interval is None else (outcome.interval[0], outcome.interval[1]),
        truncated=outcome.truncated,
        sequences=outcome.sequences,
        problem=outcome.problem,
    )


def _aggregates(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the available aggregate scores by title."""
    from open_lm.evaluate.icl.aggregates import Aggregate, title  # needs torch

    aggregates = [Aggregate(**item) for item in content.get("aggregates") or []]
    scores = {title(a.name, a.baselines, f"{a.tasks} tasks"): a.score for a in aggregates if a.score is not None}
    gauntlet = content.get("gauntlet") or {}
    averages = {f"Gauntlet, {name}": score for name, score in (gauntlet.get("averages") or {}).items()}
    return {**scores, **{name: score for name, score in averages.items() if score is not None}}


# ---------------------------------------------------------------------------------------------- samples
def sample(line: Mapping[str, Any]) -> Sample:
    """Return the sample of a line of samples.jsonl."""
    return Sample(
        step=int(line["step"]),
        tokens=_integer(line.get("tokens")),
        number=int(line.get("number", 0)),
        temperature=float(line.get("temperature", 0.0)),
        prompt=str(line["prompt"]),
        text=str(line["text"]),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
