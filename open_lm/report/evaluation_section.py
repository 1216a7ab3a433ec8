"""The sections of the report about tasks of in-context learning and about text samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from open_lm.report.curves import series_name, series_style
from open_lm.report.figures import Figure, Page, Series
from open_lm.report.formats import MISSING, big, percent
from open_lm.report.markup import Column, Html, details, join, paragraph, table, tag
from open_lm.report.records import Run, Sample, TaskEvaluation, TaskScore
from open_lm.report.summary_section import final_evaluation

_MAX_TASK_FIGURES = 6  # that are not folded away
_MAX_EVALUATIONS = 40  # rows
_MAX_PROMPTS, _MAX_STEPS, _MAX_CHARACTERS = 12, 20, 1500  # of samples


# ---------------------------------------------------------------------------------------------- tasks
def tasks(page: Page, runs: Sequence[Run]) -> list[Html]:
    """Return the scores of the latest checkpoints, the aggregates, and curves over checkpoints."""
    evaluated = [run for run in runs if run.evaluations]
    if not evaluated:
        return [
            paragraph(
                "No tasks were evaluated. --icl-yaml evaluates them during the training, eval_openlm_ckpt.py later."
            )
        ]
    blocks = [_single_table(evaluated[0])] if len(runs) == 1 else [_joint_table(evaluated)]
    blocks.append(_notes(evaluated))
    blocks += _figures(page, runs)
    blocks.append(details("All evaluations", _all_evaluations(evaluated)))
    return blocks


def _single_table(run: Run) -> Html:
    evaluation = final_evaluation(run)
    assert evaluation is not None
    columns = [
        *(Column("task"), Column("shots", True), Column("metric"), Column("score", True)),
        *(
            Column("95 % interval", True),
            Column("0 to 100 %"),
            Column("guessing", True),
            Column("centered", True),
        ),
        Column("examples", True),
    ]
    rows = [_row(task) for task in evaluation.tasks]
    average = ["average", "", "", percent(evaluation.average), "", "", "", percent(evaluation.centered_average), ""]
    aggregates = [[name, "", "", percent(score), "", "", "", "", ""] for name, score in evaluation.aggregates.items()]
    extra = [average, *aggregates] if len(evaluation.tasks) > 1 or aggregates else []
    return join(
        paragraph(_place(evaluation)),
        table(columns, [*rows, *extra], "Scores of the latest checkpoint"),
    )


def _row(task: TaskScore) -> list[object]:
    from open_lm.evaluate.icl.report import METRIC_LABELS  # needs torch

    interval = MISSING if task.interval is None else f"{100 * task.interval[0]:.1f} to {100 * task.interval[1]:.1f} %"
    return [
        *(task.task, task.shots, METRIC_LABELS.get(task.metric, task.metric), percent(task.score), interval),
        *(_range(task), percent(task.baseline), percent(task.centered), f"{task.n:,}"),
    ]


def _range(task: TaskScore) -> Html:
    """Return a drawing of a score between 0 and 1: its interval, and a tick at the score of guessing."""
    if task.score is None:
        return Html("")
    lines = [
        tag("line", class_="track", x1=0, x2=100, y1=5, y2=5),
        tag("line", class_="baseline", x1=100 * task.baseline, x2=100 * task.baseline, y1=0, y2=10),
    ]
    if task.interval is not None:
        low, high = (f"{100 * bound:.2f}" for bound in task.interval)
        lines.append(tag("line", class_="interval", x1=low, x2=high, y1=5, y2=5))
    dot = tag("circle", cx=f"{100 * task.score:.2f}", cy=5, r=2.2)
    return tag("svg", *lines, dot, class_="range", viewBox="-3 0 106 10", aria_hidden="true")


def _place(evaluation: TaskEvaluation) -> str:
    at = f"step {evaluation.step:,}" if evaluation.step is not None else "an unknown step"
    tokens = f" ({big(evaluation.tokens)} tokens)" if evaluation.tokens is not None else ""
    how = "during the training" if evaluation.is_live else f"by the engine {evaluation.engine}"
    limit = f", at most {evaluation.examples_per_task:,} examples per task" if evaluation.examples_per_task else ""
    return f"Scores at {at}{tokens}, evaluated {how}{limit} ({evaluation.origin})."


def _joint_table(runs: Sequence[Run]) -> Html:
    """Return the scores of several runs, a column for each."""
    finals = {run.name: evaluation for run in runs if (evaluation := final_evaluation(run)) is not None}
    known = {name: {task.key: task for task in evaluation.tasks} for name, evaluation in finals.items()}
    keys = dict.fromkeys(key for scores in known.values() for key in scores)
    columns = [
        Column("task"),
        Column("shots", True),
        Column("guessing", True),
        *(Column(name, True) for name in finals),
    ]
    rows: list[list[object]] = []
    for key in keys:
        found = [scores[key] for scores in known.values() if key in scores]
        cells = [_score(scores.get(key)) for scores in known.values()]
        rows.append([key[0], key[1], percent(found[0].baseline), *cells])
    rows.append(["average", "", "", *(percent(evaluation.average) for evaluation in finals.values())])
    places = [paragraph(f"{name}: {_place(evaluation)}", class_="note") for name, evaluation in finals.items()]
    return join(*places, table(columns, rows, "Scores of the latest checkpoints of the runs"))


def _score(task: TaskScore | None) -> Html | str:
    if task is None or task.score is None:
        return MISSING
    if task.interval is None:
        return percent(task.score)
    low, high = (100 * bound for bound in task.interval)
    return join(percent(task.score), tag("br"), tag("span", f"{low:.1f} to {high:.1f}", class_="remark"))


def _notes(runs: Sequence[Run]) -> Html:
    methods = (
        "Intervals are those of 95 % for the sampling of the examples; guessing is the expected score of random "
        "choices; centered is (score - guessing) / (1 - guessing)."
    )
    many = any(
        max((task.n for task in evaluation.tasks), default=0) < 100
        for run in runs
        if (evaluation := final_evaluation(run)) is not None
    )
    return paragraph(
        methods + (" With so few examples, small differences mean nothing." if many else ""), class_="note"
    )


def _all_evaluations(runs: Sequence[Run]) -> Html:
    found = [(run, evaluation) for run in runs for evaluation in run.evaluations]
    columns = [Column("run"), Column("file"), Column("engine"), *(Column(n, True) for n in ("step", "tokens", "tasks"))]
    columns += [Column("average", True), Column("centered", True)]
    rows = [
        (
            *(run.name, e.origin, e.engine, MISSING if e.step is None else f"{e.step:,}", big(e.tokens), len(e.tasks)),
            *(percent(e.average), percent(e.centered_average)),
        )
        for run, e in found[-_MAX_EVALUATIONS:]
    ]
    hidden = len(found) - len(rows)
    note = paragraph(f"{hidden} earlier evaluations are not listed.", class_="note") if hidden > 0 else None
    return join(table(columns, rows, "All evaluations"), note)


# ---------------------------------------------------------------------------------------------- curves of tasks
def _figures(page: Page, runs: Sequence[Run]) -> list[Html]:
    """Return the scores over the checkpoints: the average, and each task."""
    lines = {index: _lines(run) for index, run in enumerate(runs)}
    if not any(len(line) > 1 for found in lines.values() for line in found.values()):
        return []
    figures = [_average_figure(runs, lines)]
    keys = dict.fromkeys(
        task.key for found in lines.values() for line in found.values() for e in line for task in e.tasks
    )
    figures += [_task_figure(runs, lines, key) for key in keys]
    shown, others = figures[:_MAX_TASK_FIGURES], figures[_MAX_TASK_FIGURES:]
    blocks = [tag("h3", "Scores over the checkpoints"), tag("div", *map(page.figure, shown), class_="figures")]
    if others:
        blocks.append(
            details(
                f"{len(others)} more {'task' if len(others) == 1 else 'tasks'}",
                tag("div", *map(page.figure, others), class_="figures"),
            )
        )
    return blocks


Lines = dict[int, dict[str, list[TaskEvaluation]]]  # index of the run -> what made the evaluations -> by step


def _lines(run: Run) -> dict[str, list[TaskEvaluation]]:
    """Return the evaluations by what made them: those of the training, and those of each engine and set of tasks."""
    lines: dict[str, list[TaskEvaluation]] = {}
    for evaluation in run.evaluations:
        if evaluation.step is not None:
            name = "" if evaluation.is_live else f"{evaluation.engine}, {len(evaluation.tasks)} tasks"
            lines.setdefault(name, []).append(evaluation)
    return {name: sorted(line, key=lambda e: e.step or 0) for name, line in lines.items()}


def _average_figure(runs: Sequence[Run], lines: Lines) -> Figure:
    series = []
    for index, found in lines.items():
        for number_of_line, (name, line) in enumerate(found.items()):
            points = [(e.step, e.average) for e in line if e.average is not None]
            series.append(_series(runs, index, number_of_line, name or "average", points))
    return Figure("Average of the tasks", y_label="score", series=[s for s in series if len(s.y)], percent=True)


def _task_figure(runs: Sequence[Run], lines: Lines, key: tuple[str, int]) -> Figure:
    series, baseline = [], None
    for index, found in lines.items():
        for number_of_line, (name, line) in enumerate(found.items()):
            scores = [(e.step, task) for e in line for task in e.tasks if task.key == key and task.score is not None]
            if not scores:
                continue
            baseline = scores[0][1].baseline
            curve = _series(runs, index, number_of_line, name or key[0], [(step, task.score) for step, task in scores])
            bounds = [task.interval or (np.nan, np.nan) for _, task in scores]
            curve.low, curve.high = [low for low, _ in bounds], [high for _, high in bounds]
            series.append(curve)
    if baseline is not None:
        longest = max(series, key=lambda s: len(s.steps))
        ends = [longest.steps[0], longest.steps[-1]]
        series.append(
            Series("guessing", [], [baseline, baseline], color=7, dash="dot", clock=longest.clock, steps=ends)
        )
    return Figure(f"{key[0]}, {key[1]}-shot", y_label="score", series=series, percent=True)


def _series(
    runs: Sequence[Run], index: int, line: int, label: str, points: Sequence[tuple[int | None, float | None]]
) -> Series:
    color, dash = series_style(index, len(runs), line)
    return Series(
        series_name(runs[index].name, len(runs), label if line or len(runs) == 1 else ""),
        y=[score for _, score in points],
        steps=[step for step, _ in points],
        mode="lines+markers",
        color=color,
        dash=dash,
        clock=index,
    )


# ---------------------------------------------------------------------------------------------- samples
def samples(runs: Sequence[Run]) -> list[Html]:
    """Return the continuations of the prompts before and after the training."""
    sampled = [run for run in runs if run.samples]
    if not sampled:
        return [paragraph("No text was sampled. --sample-prompts FILE continues the prompts of a file.")]
    key = paragraph(
        "The ", tag("span", "prompt", class_="prompt"), " is bold, and the ",
        tag("span", "continuation by the model", class_="continuation"), " has a tinted background and a dotted line.",
        class_="key",
    )  # fmt: skip
    blocks = [key]
    for run in sampled:
        if len(runs) > 1:
            blocks.append(tag("h3", run.name))
        blocks += _run_samples(run)
    return blocks


def _run_samples(run: Run) -> Iterable[Html]:
    steps = sorted({sample.step for sample in run.samples})
    first, last = steps[0], steps[-1]
    by_prompt: dict[tuple[int, float], dict[int, Sample]] = {}
    for sample in run.samples:
        by_prompt.setdefault((sample.number, sample.temperature), {})[sample.step] = sample
    for (prompt, temperature), found in list(by_prompt.items())[:_MAX_PROMPTS]:
        ends = [found[step] for step in dict.fromkeys((first, last)) if step in found]
        how = "most likely tokens" if temperature == 0 else f"temperature {temperature:g}"
        yield tag("h3", f"Prompt {prompt}, {how}")
        yield tag("div", *(_sample(sample, first, last) for sample in ends), class_="samples")
        between = [found[step] for step in sorted(found) if step not in (first, last)][-_MAX_STEPS:]
        if between:
            inner = tag("div", *(_sample(sample, first, last) for sample in between), class_="samples")
            yield details(f"{len(between)} {'step' if len(between) == 1 else 'steps'} between", inner)
    hidden = len(by_prompt) - _MAX_PROMPTS
    if hidden > 0:
        yield paragraph(f"{hidden} more prompts are in samples.jsonl.", class_="note")


def _sample(sample: Sample, first: int, last: int) -> Html:
    when = {first: "Before: ", last: "Latest: "}.get(sample.step, "") if first != last else ""
    tokens = f", {big(sample.tokens)} tokens" if sample.tokens else ""
    text = sample.text[:_MAX_CHARACTERS] + (" …" if len(sample.text) > _MAX_CHARACTERS else "")
    prompt = sample.prompt if len(sample.prompt) <= _MAX_CHARACTERS else "… " + sample.prompt[-_MAX_CHARACTERS:]
    return tag(
        "div",
        tag("h4", f"{when}step {sample.step:,}{tokens}"),
        tag(
            "p",
            tag("span", "Prompt: ", class_="hidden"), tag("span", prompt, class_="prompt"),
            tag("span", " Continuation: ", class_="hidden"), tag("span", text, class_="continuation"),
            class_="sample",
        ),
    )  # fmt: skip
