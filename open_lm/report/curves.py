"""The figures of training curves: which metrics they show, of one or several runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from open_lm.report.figures import Clock, Figure, Series
from open_lm.report.formats import MISSING, big
from open_lm.report.markup import Column, Html, table
from open_lm.report.problems import find_stalls
from open_lm.report.records import RESTART, ROLLBACK, SKIPPED, Run
from open_lm.report.thinning import thin, thin_positions

MAX_POINTS, MIN_POINTS = 4000, 60  # of a curve
_CLOCK_POINTS = 3000
_MAX_EVENTS = 400  # of a kind
_TABLE_ROWS = 12
EVENT_NAMES = {SKIPPED: "skipped step", RESTART: "stop or restart", ROLLBACK: "rollback"}

Values = tuple[np.ndarray, np.ndarray]  # steps and values


@dataclass(frozen=True)
class Panel:
    """A figure of metrics.

    Attributes:
        title, unit: heading of the figure, label of its y axis.
        names: pattern of the names of its metrics; the first group, if there is one, is the name of a curve.
        scale: factor of the values.
        divisor: metric by which the values are divided, logged in the same lines.
        note: a sentence below the figure.
    """

    title: str
    unit: str
    names: str
    scale: float = 1.0
    divisor: str = ""
    note: str = ""
    smooth: bool = True
    percent: bool = False
    from_zero: bool = False
    events: bool = True
    unless_zero: bool = False


PANELS = (
    Panel("Training loss", "nats per token", r"train/loss"),
    Panel("Validation loss", "nats per token", r"val/(?:(.+)/)?loss", smooth=False, events=False),
    Panel("Gradient norm", "", r"train/grad_norm"),
    Panel(
        "Gradient noise scale",
        "sequences",
        r"train/(gradient_noise_scale|global_batch_size)",
        smooth=False,
        events=False,
        note="Batches far below the noise scale average noise; far above it, they save few steps.",
    ),
    Panel("Learning rate", "", r"train/lr", smooth=False, from_zero=True),
    Panel("Throughput", "tokens per second", r"train/tokens_per_second", from_zero=True),
    Panel("Model FLOPs utilization", "% of the device's peak", r"train/mfu", percent=True, from_zero=True),
    Panel("Time of a step by phase", "seconds", r"train/(?!batch|data)(\w+)_time", from_zero=True, events=False),
    Panel(
        "Waiting for data",
        "% of a step's time",
        r"train/data_time",
        divisor="train/batch_time",
        percent=True,
        from_zero=True,
    ),
    Panel("Peak memory", "GiB", r"train/peak_memory_bytes", scale=2.0**-30, smooth=False, from_zero=True, events=False),
    Panel(
        "Skipped steps", "steps so far", r"train/(skipped_steps|spikes)", smooth=False, from_zero=True, unless_zero=True
    ),
    Panel("Tokens by source", "tokens seen", r"train/tokens/(.+)", smooth=False, from_zero=True, events=False),
    Panel("Other training losses", "nats per token", r"train/(.+_loss)"),
    Panel("Reward", "", r"(?:train|val)/(reward.*|margin)", events=False),
    Panel("Accuracy of preferences", "", r"(train|val)/accuracy", percent=True, events=False),
    Panel("Divergence from the reference", "nats", r"(?:train|val)/(kl)", events=False),
    Panel("Entropy", "nats per token", r"(train|val)/entropy", events=False),
    Panel(
        "Length of completions", "tokens", r"(?:train|val)/(completion_tokens.*|completions/.*length.*)", events=False
    ),
    Panel("Slowest rank", "seconds per step", r"perf/(.+)_rank_time", from_zero=True, events=False),
    Panel("Energy", "Wh so far", r"energy/kwh", scale=1000.0, smooth=False, from_zero=True, events=False),
)
# Metrics that repeat others or say nothing over time.
_HIDDEN = re.compile(
    r"train/(tokens|gradient_noise_scale_tokens|epoch|epochs_done|percentage_of_data_seen|samples_per_second.*|batch_time|skipped_samples)|epoch|"
    r"val/.*(tokens|sequences|batch_time|data_time|samples_per_second.*|_95|bytes|max_batches)|.*/time_share|icl/.*|"
    r"perf/slowest_rank"
)


def run_clock(run: Run, name: str) -> Clock:
    """Return the clock of a run: steps, tokens, and hours since its first record."""
    metrics = run.metrics
    last_of_step = np.flatnonzero(np.append(np.diff(metrics.steps) != 0, True)) if len(metrics) else np.arange(0)
    steps = metrics.steps[last_of_step]
    tokens = _filled(metrics.tokens, metrics.steps)[last_of_step]
    times = _filled(metrics.times, metrics.steps)[last_of_step]
    pauses = find_stalls(times)
    kept = thin_positions(len(steps), _CLOCK_POINTS, np.concatenate([pauses, pauses - 1]))
    steps, tokens, times = steps[kept], tokens[kept], times[kept]
    hours = (times - times[0]) / 3600 if len(times) else times
    events = []
    for kind in EVENT_NAMES:
        some = [event for event in run.events if event.kind == kind][:_MAX_EVENTS]
        events += [{"step": event.step, "kind": event.kind, "text": _tooltip(event.step, event.text)} for event in some]
    return Clock(name, steps, tokens, hours, events)


def _tooltip(step: int, text: str) -> str:
    """Return a text for plotly, which reads a few HTML elements in tooltips."""
    text = text if text.startswith("step ") else f"step {step:,}: {text}"
    lines, line = [], ""
    for word in text.split(" "):
        if len(line) + len(word) > 60:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "<br>".join(part.replace("&", "&amp;").replace("<", "&lt;") for part in [*lines, line])


def _filled(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return values that never decrease, with gaps filled evenly; NaN everywhere if none is known."""
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(values), np.nan)
    return np.maximum.accumulate(np.interp(steps, steps[known], values[known]))


# ------------------------------------------------------------------------------------------------ figures
@dataclass
class CurveFigures:
    """The figures of the curves of some runs.

    Attributes:
        main: the figures that the page shows.
        others: those of all other metrics, which the page folds away.
        thinned: most records per interval of a thinned curve; 1 if all curves have all their records.
    """

    main: list[Figure]
    others: list[Figure]
    thinned: int


def curve_figures(runs: Sequence[Run], names: Sequence[str], max_points: int) -> CurveFigures:
    """Return the figures of the curves of some runs.

    Args:
        runs, names: the runs, and how the figures call them.
        max_points: points of a curve.
    """
    builder = _Builder(runs, names, max_points)
    figures = [figure for panel in PANELS if (figure := builder.figure(panel)) is not None]
    known = [re.compile(panel.names) for panel in PANELS]
    rest = sorted({name for run in runs for name in run.metrics.metrics} - {"train/data_time"})
    rest = [n for n in rest if not _HIDDEN.fullmatch(n) and not any(pattern.fullmatch(n) for pattern in known)]
    others = [f for name in rest if (f := builder.figure(Panel(name, "", re.escape(name), events=False))) is not None]
    return CurveFigures(figures, others, builder.thinned)


def count_curves(runs: Sequence[Run]) -> int:
    """Return the number of metrics of all runs."""
    return sum(len(run.metrics.metrics) for run in runs)


class _Builder:
    def __init__(self, runs: Sequence[Run], names: Sequence[str], max_points: int) -> None:
        self._runs, self._names, self._max_points = runs, names, max_points
        self.thinned = 1
        self._has_token_loss = any(run.loss_unit for run in runs)

    def figure(self, panel: Panel) -> Figure | None:
        """Return the figure of a panel, or None if no run has its metrics."""
        found = [
            (index, label, values) for index in range(len(self._runs)) for label, values in self._curves(index, panel)
        ]
        if not found or (panel.unless_zero and not any(np.nan_to_num(values[1]).any() for _, _, values in found)):
            return None
        labels = list(dict.fromkeys(label for _, label, _ in found))
        series = [self._series(panel, index, label, labels, values) for index, label, values in found]
        figure = Figure(
            panel.title,
            y_label=panel.unit if panel.unit != "nats per token" or self._has_token_loss else "",
            series=series,
            percent=panel.percent,
            from_zero=panel.from_zero,
            events=panel.events,
            note=panel.note,
        )
        figure.table = _table(figure, self._runs)
        return figure

    def _curves(self, index: int, panel: Panel) -> Iterator[tuple[str, Values]]:
        """Yield the label and the values of each metric of a panel."""
        run, pattern = self._runs[index], re.compile(panel.names)
        matches = {name: match for name in run.metrics.metrics if (match := pattern.fullmatch(name))}
        sources = {source.label: source.name for source in run.sources if source.label}
        for name, match in matches.items():
            group = (match[1] or "") if pattern.groups else ""
            group = sources.get(group, group) if name.startswith("train/tokens/") else group
            label = group or ("all sets" if panel.title == "Validation loss" and len(matches) > 1 else "")
            yield label, self._divided(run, run.metrics.get(name), panel.divisor)
        if not matches and panel.title == "Validation loss":
            yield from validation_curves(run)

    @staticmethod
    def _divided(run: Run, values: Values, divisor: str) -> Values:
        below = run.metrics.get(divisor)[1]
        if len(below) != len(values[1]):
            return values
        with np.errstate(divide="ignore", invalid="ignore"):
            return values[0], values[1] / below

    def _series(self, panel: Panel, index: int, label: str, labels: Sequence[str], values: Values) -> Series:
        curve = thin(values[0], np.asarray(values[1], dtype=np.float64) * panel.scale, self._max_points)
        self.thinned = max(self.thinned, curve.records_per_point)
        color, dash = series_style(index, len(self._runs), labels.index(label))
        few = len(curve.values) <= 12
        return Series(
            name=series_name(self._names[index], len(self._runs), label.replace("_", " ")) or panel.title,
            y=curve.values,
            mode="lines+markers" if few else "lines",
            color=color,
            dash=dash,
            clock=index,
            steps=curve.steps,
            mean_steps=curve.mean_steps,
            means=curve.means,
            smooth=panel.smooth,
        )


def series_name(run: str, num_runs: int, label: str) -> str:
    """Return the name of a curve in legends: that of the run, if there are several, and that of the metric."""
    return label if num_runs == 1 else f"{run} · {label}" if label else run


def series_style(run: int, num_runs: int, label: int) -> tuple[int, str | None]:
    """Return color and dash: of one run, curves differ in color; of several, runs in color and curves in dashes."""
    dashes = ("solid", "dash", "dot", "dashdot")
    return (label, dashes[label // 8 % 4]) if num_runs == 1 else (run, dashes[(label + run // 8) % 4])


def validation_curves(run: Run) -> Iterator[tuple[str, Values]]:
    """Yield the curves of results.jsonl, for runs whose metrics have no validation losses."""
    steps, tokens = run.metrics.steps, run.metrics.tokens
    known = np.isfinite(tokens)
    if not known.any():
        return
    to_step: Callable[[int], float] = lambda value: float(np.interp(value, tokens[known], steps[known]))  # noqa: E731
    names = list(dict.fromkeys(part.name for validation in run.validations for part in validation.sets))
    for name in names:
        points = [
            (to_step(validation.tokens), part.loss)
            for validation in run.validations
            for part in validation.sets
            if part.name == name and validation.tokens is not None and part.loss is not None
        ]
        if points:
            columns = np.array(points)
            yield name if len(names) > 1 else "", (columns[:, 0].round().astype(np.int64), columns[:, 1])


def _table(figure: Figure, runs: Sequence[Run]) -> Html:
    """Return the values of the curves at some of their steps."""
    steps = np.unique(np.concatenate([np.asarray(series.steps) for series in figure.series]))
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _TABLE_ROWS)).round().astype(int))]
    columns = [Column("step", True)]
    has_tokens = len(runs) == 1 and np.isfinite(runs[0].metrics.tokens).any()
    if has_tokens:
        columns.append(Column("tokens", True))
    columns += [Column(series.name, True) for series in figure.series]
    rows = []
    for step in chosen:
        row = [f"{step:,}"]
        if has_tokens:
            metrics = runs[0].metrics
            known = np.isfinite(metrics.tokens)
            row.append(big(float(np.interp(step, metrics.steps[known], metrics.tokens[known]))))
        rows.append([*row, *(_value_at(series, int(step), figure.percent) for series in figure.series)])
    return table(columns, rows, f"Values of {figure.title}")


def _value_at(series: Series, step: int, is_percent: bool) -> str:
    """Return the value of a series at a step, the last one before it where it has none; a dash outside of its range."""
    steps = np.asarray(series.mean_steps if series.mean_steps is not None else series.steps)
    values = np.asarray(series.means if series.means is not None else series.y)
    position = int(np.searchsorted(steps, step, side="right")) - 1
    if position < 0 or step > steps[-1] or not np.isfinite(values[position]):
        return MISSING
    return f"{100 * values[position]:.1f} %" if is_percent else f"{values[position]:.4g}"
