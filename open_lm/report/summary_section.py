"""The sections of the report that say in words and numbers what the runs are, and which problems they have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np

from open_lm.report import formats
from open_lm.report.formats import MISSING, big, number, percent
from open_lm.report.markup import Column, Fact, Html, facts, join, paragraph, table, tag
from open_lm.report.records import ERROR, FAILED, FINISHED, NOTE, STOPPED, WARNING, Energy, Run, TaskEvaluation

_STATES = {FINISHED: "finished", STOPPED: "stopped by a signal", FAILED: "failed"}
_KINDS = {ERROR: "Error", WARNING: "Warning", NOTE: "Note"}


def subtitle(runs: Sequence[Run]) -> str:
    """Return the state of the data: when the last record of the runs was written."""
    times = [float(np.nanmax(run.metrics.times)) for run in runs if np.isfinite(run.metrics.times).any()]
    if not times:
        return "Training report of OpenLM"
    last = datetime.fromtimestamp(max(times), timezone.utc)
    return f"Training report of OpenLM. Last record: {last:%Y-%m-%d %H:%M} UTC"


def state(run: Run) -> str:
    """Return the state of a run in words."""
    known = _STATES.get(run.summary.state)
    if known is not None:
        return known
    return "in progress or interrupted" if len(run.metrics) else "without training records"


def final_evaluation(run: Run) -> TaskEvaluation | None:
    """Return the evaluation of the latest checkpoint: of equal steps, the one with the most examples."""
    if not run.evaluations:
        return None
    return max(run.evaluations, key=lambda e: (e.step or e.tokens or 0, sum(task.n for task in e.tasks)))


# ---------------------------------------------------------------------------------------------- summary
def summary(runs: Sequence[Run]) -> Html:
    """Return the summary: sentences and numbers of one run, or a table of several."""
    if len(runs) == 1:
        return join(paragraph(_sentences(runs[0]), class_="lead"), facts(_facts(runs[0])))
    return join(paragraph(_comparison(runs), class_="lead"), _table(runs))


def _sentences(run: Run) -> str:
    s = run.summary
    model = f"Model {s.model}" if s.model else "The model"
    parameters = f" ({big(s.parameters)} trained parameters)" if s.parameters else ""
    if s.step is None:
        return f"{model}{parameters}: the run is {state(run)}." + _results(run)
    share = f", {percent(s.step / s.planned_steps, 0)} of its {s.planned_steps:,} steps," if s.planned_steps else ""
    share = ", all that were planned," if s.step == s.planned_steps else share
    tokens = f" on {big(s.tokens)} tokens" if s.tokens else ""
    time = f" in {formats.duration(s.wall_s)}" if s.wall_s else ""
    devices = f" on {s.devices}" if s.devices else ""
    text = (
        f"{model}{parameters} was trained for {s.step:,} steps{share}{tokens}{time}{devices}. The run is {state(run)}."
    )
    return text + _results(run)


def _results(run: Run) -> str:
    s, text = run.summary, ""
    if s.first_loss is not None and s.last_loss is not None:
        verb = "fell" if s.last_loss < s.first_loss else "went"
        text += f" The training loss {verb} from {s.first_loss:.3f} to {s.last_loss:.3f} {run.loss_unit}".rstrip() + "."
    loss = s.validation.loss if s.validation else None
    if loss is not None:
        text += f" The last validation loss is {loss:.4f} (perplexity {_perplexity(loss)})."
    evaluation = final_evaluation(run)
    if evaluation is not None and evaluation.average is not None:
        text += f" The average score is {percent(evaluation.average)} over {_guessing(evaluation)}."
    return f"{text} {_problem_count([run])}"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 50 else "above 1e21"


def _problem_count(runs: Sequence[Run]) -> str:
    counts = [sum(p.severity == kind for run in runs for p in run.problems) for kind in (ERROR, WARNING)]
    words = [f"{n} {name}{'s' * (n != 1)}" for n, name in zip(counts, ("error", "warning"), strict=True) if n]
    return (
        f"{' and '.join(words)} {'was' if sum(counts) == 1 else 'were'} found."
        if words
        else "No errors or warnings were found."
    )


def _facts(run: Run) -> list[Fact]:
    s = run.summary
    items: list[Fact | None] = [
        _fact("Tokens", s.tokens, big, f"of {big(s.planned_tokens)} planned" if s.planned_tokens else ""),
        _fact(
            "Training loss",
            s.last_loss,
            lambda v: number(v, 4),
            f"{run.loss_unit or 'loss of the method'}, mean of the last records",
        ),
        _validation_fact(run),
        _task_fact(run),
        _fact("Throughput", s.tokens_per_second, lambda v: f"{big(v)}/s", "tokens, median"),
        _fact("MFU", s.mfu, percent, "of the device's peak, median"),
        _fact("Peak memory", s.peak_memory_bytes, formats.size, "of a device, or of the process on CPU"),
        _fact("Time", s.wall_s, formats.duration, "from first to last record"),
        _fact("Compute", s.flops, formats.flops, s.flops_method),
        _fact(
            "Energy", s.energy.kwh if s.energy else None, formats.energy, energy_remark(s.energy) if s.energy else ""
        ),
    ]
    return [item for item in items if item is not None]


def energy_remark(energy: Energy) -> str:
    """Return how an energy was determined, and what it lacks."""
    kind = "an estimate: " if energy.facts.get("estimate") else ""
    missing = energy.facts.get("missing")
    return f"{kind}{energy.method}{f', without {missing}' if missing else ''}"


def _fact(label: str, value: float | None, write: object, remark: str) -> Fact | None:
    return None if value is None else Fact(label, write(value), remark)  # type: ignore[operator]


def _validation_fact(run: Run) -> Fact | None:
    validation = run.summary.validation
    if validation is None or validation.loss is None:
        return None
    bits = [part.bits_per_byte for part in validation.sets if part.bits_per_byte is not None]
    remark = (
        f"{len(validation.sets)} sets" if len(validation.sets) > 1 else f"nats per token on {validation.sets[0].name}"
    )
    if len(bits) == 1 and len(validation.sets) == 1:
        remark += f", {bits[0]:.4f} bits per byte"
    return Fact("Validation loss", number(validation.loss), remark)


def _task_fact(run: Run) -> Fact | None:
    evaluation = final_evaluation(run)
    if evaluation is None or evaluation.average is None:
        return None
    return Fact("Task average", percent(evaluation.average), _guessing(evaluation))


def _guessing(evaluation: TaskEvaluation) -> str:
    """Return the number of tasks, and the score of guessing that their average compares with."""
    baselines = [task.baseline for task in evaluation.tasks if task.score is not None]
    count = f"{len(baselines)} {'task' if len(baselines) == 1 else 'tasks'}"
    return f"{count}, where guessing gives {percent(sum(baselines) / max(len(baselines), 1))}"


# ---------------------------------------------------------------------------------------------- several runs
def _comparison(runs: Sequence[Run]) -> str:
    text = f"{len(runs)} runs are compared."
    losses = {run.name: loss for run in runs if (v := run.summary.validation) and (loss := v.loss) is not None}
    kind = "validation"
    if len(losses) < len(runs):
        losses = {run.name: run.summary.last_loss for run in runs if run.summary.last_loss is not None}
        kind = "training"
    if kind == "validation" and len({_validation_sets(run) for run in runs}) > 1:
        text += (
            " Their validation sets differ in name or number of tokens, so their validation losses are not comparable."
        )
    elif len(losses) > 1:
        best = min(losses, key=lambda name: losses[name])
        others = min(loss for name, loss in losses.items() if name != best)
        text += (
            f" {best} has the lowest final {kind} loss: {losses[best]:.4f}, {others - losses[best]:.4f} below the next "
            "one."
        )
    return f"{text} {_problem_count(runs)}"


def _validation_sets(run: Run) -> tuple[tuple[str, int], ...]:
    """Return the name and the tokens of each set. The tokens depend on the tokenizer and on --val-max-batches."""
    validation = run.summary.validation
    return tuple((part.name, part.tokens) for part in validation.sets) if validation else ()


def _table(runs: Sequence[Run]) -> Html:
    columns = [
        *(Column("run"), Column("model"), Column("state")),
        *(Column(name, True) for name in ("parameters", "tokens", "training loss", "validation loss", "task average")),
        *(Column(name, True) for name in ("tokens/s", "MFU", "time", "compute", "energy")),
    ]
    rows = []
    for run in runs:
        s, evaluation = run.summary, final_evaluation(run)
        rows.append((
            *(run.name, s.model or MISSING, state(run), big(s.parameters), big(s.tokens), number(s.last_loss)),
            number(s.validation.loss if s.validation else None),
            percent(evaluation.average if evaluation else None),
            *(big(s.tokens_per_second), percent(s.mfu), formats.duration(s.wall_s), formats.flops(s.flops)),
            formats.energy(s.energy.kwh if s.energy else None),
        ))  # fmt: skip
    used = [i for i in range(len(columns)) if i < 3 or any(row[i] != MISSING for row in rows)]
    return table([columns[i] for i in used], [[row[i] for i in used] for row in rows], "Main numbers of the runs")


# ---------------------------------------------------------------------------------------------- problems
def problems(runs: Sequence[Run]) -> Html:
    """Return the list of problems of all runs, the gravest first."""
    found = [(problem, run) for run in runs for problem in run.problems]
    found.sort(key=lambda item: list(_KINDS).index(item[0].severity))
    if not found:
        return paragraph("None were found: no skipped steps, spikes, stalls, waiting for data, or errors in the log.")
    items = [
        tag(
            "li",
            paragraph(
                tag("span", f"{_KINDS[problem.severity]}: {problem.title}", class_="kind"),
                f" · {run.name}" if len(runs) > 1 else "",
                f" · {problem.where}",
            ),
            paragraph(problem.detail),
            paragraph(problem.why, class_="note"),
            class_=problem.severity,
        )
        for problem, run in found
    ]
    return tag("ul", *items, class_="problems")
