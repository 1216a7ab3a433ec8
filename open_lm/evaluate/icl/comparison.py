"""Compare two files of results: differences of all tasks and aggregates, with tests and intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.errors import DataError
from open_lm.evaluate.checkpoints import EXAMPLES_FOLDER
from open_lm.evaluate.icl.aggregates import aggregate_members, aggregate_score, title
from open_lm.evaluate.icl.metrics import Outcome, Record
from open_lm.evaluate.icl.report import align, read_json
from open_lm.evaluate.icl.significance import Comparison, Difference, Paired, Unpaired, Untested, bootstrap
from open_lm.evaluate.icl.store import read_finished

_ROUNDING = 1e-9
_SETTINGS = ("engine", "tokenizer_sha256", "seq_len", "max_examples", "precision")
_ALIGNMENTS: tuple[Callable[[str, int], str], ...] = (str.ljust, *[str.rjust] * 6, str.ljust)

Key = tuple[str, int]  # label of a task and number of examples in the prompt
Groups = list[tuple[str, np.ndarray]]  # category and whether each of its examples is correct


class NoExamples(Exception):
    """Results of single examples that do not exist or do not belong to a score; the message says why."""


@dataclass(frozen=True)
class Result:
    """A file of results.

    Attributes:
        path: path of the file.
        content: its content.
        outcomes: its tasks.
    """

    path: str
    content: Mapping[str, Any]
    outcomes: Sequence[Outcome]

    @cached_property
    def tasks(self) -> dict[Key, Outcome]:
        """The tasks by label and shots, in their order; of equal ones the first."""
        tasks: dict[Key, Outcome] = {}
        for outcome in self.outcomes:
            tasks.setdefault((outcome.task, outcome.shots), outcome)
        return tasks


@dataclass(frozen=True)
class Row:
    """A line of the table: a task, or an aggregate (shots is None), with the first and the second score."""

    task: str
    shots: int | None
    scores: tuple[float, float]
    difference: Difference


@dataclass
class PairReport:
    """The comparison of a file with the first one; notes say what could not be compared, or not paired, and why."""

    file: str
    tasks: list[Row] = field(default_factory=list)
    aggregates: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_result(path: str) -> Result:
    """Read a file of results; see `report.read_json` for the errors."""
    content, outcomes = read_json(path)
    return Result(path, content, outcomes)


# --------------------------------------------------------------------------------------------------- comparison
def compare(first: Result, second: Result) -> PairReport:
    """Compare all tasks and aggregates that both files have.

    Raises:
        DataError: the files have no task with the same number of shots in common.
    """
    report = PairReport(second.path, notes=_setting_notes(first, second))
    comparisons: dict[Key, Comparison] = {}
    reasons: dict[str, list[str]] = {}  # why tasks are not paired
    for key in dict.fromkeys([*first.tasks, *second.tasks]):
        problem = _obstacle(first, second, key)
        if problem:
            report.notes.append(f"{key[0]} {key[1]}-shot is not compared: {problem}")
            continue
        a, b = first.tasks[key], second.tasks[key]
        comparisons[key], reason = _comparison(first, second, key)
        if reason:
            reasons.setdefault(reason, []).append(f"{key[0]} {key[1]}-shot")
        report.tasks.append(Row(*key, _scores(a, b), comparisons[key].difference()))
    report.notes += [f"{', '.join(tasks)}: {reason}" for reason, tasks in reasons.items()]
    if not comparisons:
        raise DataError(
            f"{first.path} and {second.path} have no comparable task in common:\n" + "\n".join(report.notes)
        )
    _add_averages(report, first, second, comparisons)
    _add_requested(report, first, second, comparisons)
    return report


def _setting_notes(first: Result, second: Result) -> list[str]:
    """Return notes about settings that differ between the files, equal weights and repeated tasks."""
    notes = []
    for key in _SETTINGS:
        values = first.content.get(key), second.content.get(key)
        if values[0] != values[1] and (key != "tokenizer_sha256" or None not in values):
            notes.append(f"the files differ in {key}: {values[0]} and {values[1]}")
    weights = first.content.get("weights_sha256")
    if weights and weights == second.content.get("weights_sha256"):
        notes.append("both files have the results of the same weights")
    for result in (first, second):
        repeated = len(result.outcomes) - len(result.tasks)
        if repeated:
            notes.append(f"{result.path} has repeated tasks ({repeated}); the first of each is compared")
    return notes


def _obstacle(first: Result, second: Result, key: Key) -> str:
    """Return why a task cannot be compared; empty if it can."""
    for result in (first, second):
        if key not in result.tasks:
            return f"{result.path} does not have it"
        if result.tasks[key].score is None:
            problem = result.tasks[key].problem
            return f"it did not run in {result.path} ({problem})" if problem else f"it has no score in {result.path}"
    a, b = first.tasks[key], second.tasks[key]
    for name in ("kind", "metric"):
        values = getattr(a, name), getattr(b, name)
        if values[0] != values[1]:
            return f"its {name} is {values[0]} in one file and {values[1]} in the other"
    return ""


def _scores(a: Outcome, b: Outcome) -> tuple[float, float]:
    assert a.score is not None and b.score is not None  # _obstacle
    return a.score, b.score


def _comparison(first: Result, second: Result, key: Key) -> tuple[Comparison, str]:
    """Return the comparison of a task, and why it is not paired; empty if it is."""
    a, b = first.tasks[key], second.tasks[key]
    if not (_is_accuracy(a) and _is_accuracy(b)):
        return Untested(_scores(a, b)), f"no test, because {a.metric} is not a share of correct examples"
    groups, reason = _paired_groups(first, second, key)
    if groups:
        return Paired(groups), ""
    if not (a.categories or b.categories):
        return Unpaired(_scores(a, b), (a.n, b.n)), f"unpaired, because {reason}"
    if a.interval is None or b.interval is None:
        return Untested(_scores(a, b)), f"no test, because {reason}, and the scores have no intervals"
    return Unpaired(_scores(a, b), (a.n, b.n), (a.interval, b.interval)), f"unpaired, because {reason}"


def _is_accuracy(outcome: Outcome) -> bool:
    """Return whether a score is the share of correct examples, also under lm-eval's names of metrics."""
    return outcome.metric.endswith("Accuracy") or outcome.interval_method == "exact binomial"


def _paired_groups(first: Result, second: Result, key: Key) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """Return the results of the same examples by category, or an empty list and why there are none."""
    a, b = first.tasks[key], second.tasks[key]
    if a.n != b.n:
        return [], f"the numbers of examples differ ({a.n} and {b.n})"
    if a.digest and b.digest and a.digest != b.digest:
        return [], "the prompts differ (other data, tokenizer, few-shot examples or sequence length)"
    try:
        groups = [_example_groups(result, result.tasks[key]) for result in (first, second)]
    except NoExamples as error:
        return [], str(error)
    if [(name, len(values)) for name, values in groups[0]] != [(name, len(values)) for name, values in groups[1]]:
        return [], "the stored results have other categories"
    return [(x, y) for (_, x), (_, y) in zip(*groups, strict=True)], ""


def _example_groups(result: Result, outcome: Outcome) -> Groups:
    """Return the stored results of a task's examples by category; raise NoExamples if they cannot be used."""
    path, records = _stored_examples(result, outcome)
    if any("correct" not in record for record in records):
        raise NoExamples(f"{path} is damaged")
    if outcome.categories and any("category" not in record for record in records):
        raise NoExamples(f"{path} does not name the categories; remove it and evaluate again")
    by_category: dict[str, list[bool]] = {}
    for record in records:
        by_category.setdefault(record["category"] if outcome.categories else "", []).append(bool(record["correct"]))
    groups = [(category, np.array(values)) for category, values in by_category.items()]
    mean = sum(values.mean() for _, values in groups) / len(groups)
    if outcome.score is None or abs(mean - outcome.score) > _ROUNDING:
        raise NoExamples(f"{path} gives the score {mean:.4f} instead of {outcome.score}")
    return groups


def _stored_examples(result: Result, outcome: Outcome) -> tuple[str, list[Record]]:
    """Return the file with the results of a task's examples, and these in order; raise NoExamples if there is none.

    The file is in the folder of the results, also if that was moved, or at the path that the results name.
    """
    if not outcome.examples_file:
        raise NoExamples(
            f"{result.path} has no results of single examples (--engine native and lm-eval store them, without "
            "--no-cache)"
        )
    folder = result.path.rpartition("/")[0] or "."
    moved = storage.join(folder, EXAMPLES_FOLDER, outcome.examples_file.rpartition("/")[2])
    path = next((path for path in (moved, outcome.examples_file) if storage.exists(path)), None)
    if path is None:
        raise NoExamples(f"the results of its examples are missing ({moved})")
    try:
        header, records = read_finished(path)
    except ValueError as error:
        raise NoExamples(f"{path} is damaged ({error})") from error
    indices = {record["index"] for record in records}
    if header.get("prompts") != outcome.digest or not len(indices) == len(records) == outcome.n > 0:
        raise NoExamples(f"{path} does not have the results of these prompts")
    if header.get("weights") != result.content.get("weights_sha256"):
        raise NoExamples(f"{path} has the results of other weights")
    return path, records


# --------------------------------------------------------------------------------------------------- aggregates
def _add_averages(report: PairReport, first: Result, second: Result, comparisons: Mapping[Key, Comparison]) -> None:
    """Add the mean of the scores, and of the scores above the baselines, over the tasks that both files have."""
    count = len(comparisons)
    baselines = {key: first.tasks[key].baseline for key in comparisons}
    if any(second.tasks[key].baseline != baselines[key] for key in comparisons):
        report.notes.append("the baselines differ; the average over baseline uses those of the first file")
    names = (f"average of {count} tasks", f"average over baseline of {count} tasks")
    for name, used in zip(names, (dict.fromkeys(baselines, 0.0), baselines), strict=True):
        report.aggregates.append(_aggregate_row(name, first, second, comparisons, used))


def _add_requested(report: PairReport, first: Result, second: Result, comparisons: Mapping[Key, Comparison]) -> None:
    """Add the aggregates that the files request, with the baselines of the first file."""
    requested = {item["name"]: item["baselines"] for item in [*_aggregates(second), *_aggregates(first)]}
    for item in _aggregates(second):
        if item["baselines"] != requested[item["name"]]:
            report.notes.append(f"{item['name']}: both scores have the baselines {requested[item['name']]}")
    for name, version in requested.items():
        complete = [aggregate_score(list(result.tasks.values()), name, version) for result in (first, second)]
        members = aggregate_members(name, version)
        missing = [label for label, shots in members if (label, shots) not in comparisons]
        if missing:
            report.notes += [f"{r.path}: {a}" for r, a in zip((first, second), complete, strict=True) if a.missing]
            report.notes.append(f"{title(name, version)} is not compared; missing: {', '.join(missing)}")
            continue
        report.aggregates.append(_aggregate_row(title(name, version), first, second, comparisons, members))


def _aggregates(result: Result) -> list[dict[str, Any]]:
    return list(result.content.get("aggregates") or [])


def _aggregate_row(
    name: str, first: Result, second: Result, comparisons: Mapping[Key, Comparison], baselines: Mapping[Key, float]
) -> Row:
    """Return the row of the mean of (score - baseline) / (1 - baseline)."""
    pairs = {key: _scores(first.tasks[key], second.tasks[key]) for key in baselines}
    means = [
        sum((pairs[key][i] - baseline) / (1 - baseline) for key, baseline in baselines.items()) / len(baselines)
        for i in (0, 1)
    ]
    weights = [1 / (1 - baseline) / len(baselines) for baseline in baselines.values()]
    return Row(name, None, (means[0], means[1]), bootstrap([comparisons[key] for key in baselines], weights))


# ------------------------------------------------------------------------------------------------------- output
def format_report(report: PairReport, first: str, number: int) -> str:
    """Return the table of a comparison with the first file, and its notes."""
    second = f"[{number}]"
    rows: list[tuple[str, ...]] = [("task", "shots", "[1]", second, f"{second} - [1]", "95 % interval", "p", "test")]
    rows += [_cells(row) for row in [*report.tasks, *report.aggregates]]
    table = align(rows, rules=(1, 1 + len(report.tasks)), alignments=_ALIGNMENTS)
    notes = [f"note: {note}" for note in report.notes]
    return "\n".join([f"[1] {first}", f"{second} {report.file}", "", *table, *([""] if notes else []), *notes])


def _cells(row: Row) -> tuple[str, ...]:
    difference = row.difference
    return (
        row.task,
        "" if row.shots is None else str(row.shots),
        *(f"{score:.4f}" for score in row.scores),
        f"{difference.value:+.4f}",
        "-" if difference.interval is None else "{:+.4f} to {:+.4f}".format(*difference.interval),
        "-" if difference.p_value is None else _p_text(difference.p_value),
        difference.test,
    )


def _p_text(p_value: float) -> str:
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.4f}"
