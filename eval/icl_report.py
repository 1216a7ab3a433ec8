"""Format the results of an evaluation as a text table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from open_lm import storage
from open_lm.storage.strict_json import to_json

if TYPE_CHECKING:
    from icl_run import Outcome

METRIC_LABELS = {
    "InContextLearningMultipleChoiceAccuracy": "accuracy",
    "InContextLearningLMAccuracy": "exact continuation",
    "InContextLearningGenerationExactMatchAccuracy": "exact match",
}


def averages(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Return the mean of all available scores, and the mean of (score - baseline) / (1 - baseline)."""
    scored = [(o.score, o.baseline) for o in outcomes if o.score is not None]
    if not scored:
        return {"average": None, "centered_average": None}
    return {
        "average": sum(score for score, _ in scored) / len(scored),
        "centered_average": sum((score - base) / (1 - base) for score, base in scored) / len(scored),
    }


def format_table(outcomes: Sequence[Outcome]) -> str:
    """Return a table with one row per task, the averages, and notes about missing and truncated results."""
    header = ("task", "shots", "metric", "score", "baseline", "n")
    rows = [
        (
            o.task,
            str(o.shots),
            METRIC_LABELS.get(o.metric, o.metric),
            "-" if o.score is None else f"{o.score:.4f}",
            "-" if o.score is None else f"{o.baseline:.4f}",
            "-" if o.score is None else str(o.n),
        )
        for o in outcomes
    ]
    mean = averages(outcomes)
    if mean["average"] is not None:
        rows.append(("average", "", "", f"{mean['average']:.4f}", "", ""))
        rows.append(("average over baseline", "", "", f"{mean['centered_average']:.4f}", "", ""))
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    alignments = (str.ljust, str.rjust, str.ljust, str.rjust, str.rjust, str.rjust)

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            align(text, width) for align, text, width in zip(alignments, row, widths, strict=True)
        ).rstrip()

    rule = "  ".join("-" * width for width in widths)
    body = [line(row) for row in rows]
    split = len(outcomes)
    lines = [line(header), rule, *body[:split], *([rule, *body[split:]] if body[split:] else [])]
    return "\n".join([*lines, *_notes(outcomes)])


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    notes = [f"{o.task} {o.shots}-shot did not run: {o.problem}" for o in outcomes if o.problem]
    if notes:
        notes.append("the averages exclude tasks that did not run")
    notes += [
        f"{o.task} {o.shots}-shot: {o.truncated} of {o.sequences} contexts were truncated on the left to fit the model"
        for o in outcomes
        if o.truncated
    ]
    return ["", *notes] if notes else []


def write_json(path: str, outcomes: Sequence[Outcome], run_metadata: dict[str, Any]) -> None:
    """Write all results of an evaluation as JSON. The write is atomic."""
    tasks = [
        {**asdict(o), "centered": None if o.score is None else (o.score - o.baseline) / (1 - o.baseline)}
        for o in outcomes
    ]
    content = {**run_metadata, **averages(outcomes), "tasks": tasks}
    storage.write_text(path, to_json(content, indent=2) + "\n")
