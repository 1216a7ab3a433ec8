"""Format the results of an evaluation as a text table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import PurePath
from typing import Any

from open_lm import storage
from open_lm.checkpoint import saved_progress
from open_lm.checkpoint.folders import step_number
from open_lm.errors import DataError
from open_lm.evaluate.icl.aggregates import Aggregate
from open_lm.evaluate.icl.gauntlet import GauntletScores
from open_lm.evaluate.icl.metrics import Outcome
from open_lm.storage.strict_json import to_json

SCHEMA = "open_lm.icl/1"  # of the JSON result; a change that breaks readers must raise the number
METRIC_LABELS = {
    "InContextLearningMultipleChoiceAccuracy": "accuracy",
    "InContextLearningLMAccuracy": "exact continuation",
    "InContextLearningGenerationExactMatchAccuracy": "exact match",
}
_HEADER = ("task", "shots", "metric", "score", "baseline", "n", "95 % interval")
_ALIGNMENTS = (str.ljust, str.rjust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)


def recorded_name(tokenizer: str) -> str:
    """Return the name of a tokenizer for a result, which may be published: of an absolute path the last two parts.

    Its fingerprint, tokenizer_sha256, says which tokenizer it is.
    """
    path = PurePath(tokenizer)
    return "/".join(path.relative_to(path.anchor).parts[-2:]) if path.is_absolute() else tokenizer


def centered(outcome: Outcome) -> float | None:
    """Return (score - baseline) / (1 - baseline), or None without a score."""
    return None if outcome.score is None else (outcome.score - outcome.baseline) / (1 - outcome.baseline)


def averages(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Return the mean of all available scores, and the mean of (score - baseline) / (1 - baseline)."""
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    above = [value for outcome in outcomes if (value := centered(outcome)) is not None]
    return {
        "average": sum(scores) / len(scores) if scores else None,
        "centered_average": sum(above) / len(above) if above else None,
    }


def format_table(outcomes: Sequence[Outcome]) -> str:
    """Return a table with one row per task, the averages, and notes about missing and truncated results."""
    rows = [_row(outcome) for outcome in outcomes]
    mean = averages(outcomes)
    summary = []
    if mean["average"] is not None:
        summary.append(("average", "", "", f"{mean['average']:.4f}", "", "", ""))
        summary.append(("average over baseline", "", "", f"{mean['centered_average']:.4f}", "", "", ""))
    return "\n".join([*align([_HEADER, *rows, *summary], rules=(1, 1 + len(rows))), *_notes(outcomes)])


def _row(outcome: Outcome) -> tuple[str, ...]:
    if outcome.score is None:
        return (outcome.task, str(outcome.shots), METRIC_LABELS.get(outcome.metric, outcome.metric), *"----")
    interval = "-" if outcome.interval is None else "{:.4f} to {:.4f}".format(*outcome.interval)
    return (
        outcome.task,
        str(outcome.shots),
        METRIC_LABELS.get(outcome.metric, outcome.metric),
        f"{outcome.score:.4f}",
        f"{outcome.baseline:.4f}",
        str(outcome.n),
        interval,
    )


def align(
    rows: Sequence[Sequence[str]], rules: Sequence[int], alignments: Sequence[Callable[[str, int], str]] = _ALIGNMENTS
) -> list[str]:
    """Return rows of texts as lines with aligned columns, with a rule before the rows of the given indices."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(alignments))]
    rule = "  ".join("-" * width for width in widths)
    lines = []
    for index, row in enumerate(rows):
        if index in rules:
            lines.append(rule)
        cells = zip(alignments, row, widths, strict=True)
        lines.append("  ".join(alignment(text, width) for alignment, text, width in cells).rstrip())
    return lines


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    notes = [f"{o.task} {o.shots}-shot did not run: {o.problem}" for o in outcomes if o.problem]
    if notes:
        notes.append("the averages exclude tasks that did not run")
    notes += [
        f"{o.task} {o.shots}-shot: {o.score:.4f} is the mean over {len(o.categories)} categories (macro); over all "
        f"examples it is {o.micro_score:.4f} (micro)"
        for o in outcomes
        if o.score is not None and o.micro_score is not None
    ]
    notes += [
        f"{o.task} {o.shots}-shot: {o.truncated} of {o.sequences} contexts were truncated on the left to fit the model"
        for o in outcomes
        if o.truncated
    ]
    return ["", *notes] if notes else []


def write_json(
    path: str,
    outcomes: Sequence[Outcome],
    run_metadata: Mapping[str, Any],
    aggregates: Sequence[Aggregate] = (),
    gauntlet: GauntletScores | None = None,
) -> None:
    """Write all results of an evaluation as strict JSON; a value that is not finite is null. The write is atomic."""
    tasks = [{**asdict(outcome), "centered": centered(outcome)} for outcome in outcomes]
    content = {"schema": SCHEMA, **run_metadata, **averages(outcomes)}
    content |= {"aggregates": [asdict(aggregate) for aggregate in aggregates]}
    content |= {"gauntlet": None if gauntlet is None else asdict(gauntlet), "tasks": tasks}
    storage.write_text(path, to_json(content, indent=2) + "\n")


def read_json(path: str) -> tuple[dict[str, Any], list[Outcome]]:
    """Return the content of a file of `write_json`, and its outcomes.

    Raises:
        DataError: the file is not a result of an evaluation, or one of another schema.
        StorageError: the file cannot be read.
    """
    try:
        content = json.loads(storage.read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: expected the JSON results of an evaluation, found no JSON ({error})") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise DataError(
            f"{path}: expected the results of eval_openlm_ckpt.py with the schema {SCHEMA}, found {schema or 'none'}; "
            "evaluate the checkpoint with this version"
        )
    names = {item.name for item in fields(Outcome)}
    try:
        outcomes = [Outcome(**{key: value for key, value in task.items() if key in names}) for task in content["tasks"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: the list of tasks is damaged ({error}); evaluate the checkpoint again") from error
    return content, outcomes


def training_position(checkpoint: str, seq_len: int) -> dict[str, int | None]:
    """Return the optimizer steps and the tokens of a checkpoint's training; None where the checkpoint lacks them.

    `seq_len` is that of the training.
    """
    progress = saved_progress(checkpoint, sharded=step_number(checkpoint) is not None)
    samples = progress.samples_seen
    step = progress.step if progress.step or samples is not None else None  # 0 for files of weights only
    return {"step": step, "tokens": None if samples is None else samples * seq_len}
