"""What every evaluation of the live model needs: when it is due, and a file with its results by step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from open_lm import storage
from open_lm.distributed.processes import run_on_master
from open_lm.monitor.loggers import append_line, filter_lines
from open_lm.storage.strict_json import to_json


@dataclass(frozen=True)
class Moment:
    """The state of a run at which it may evaluate.

    Attributes:
        step: steps trained.
        tokens: tokens trained on; None if unknown.
        checkpoint: where the weights are stored, or will be; None if nowhere.
        epochs_done: number of epochs, if one ends here; else None.
        is_start: whether this process has not trained a step yet.
        is_new_run: whether the run has not trained a step yet.
        is_last: whether the run ends here.
        step_s: mean duration of a step of this process in seconds; None before the first one.
        average: name of the averaged model that is evaluated instead of the weights; None for the weights.
    """

    step: int
    tokens: int | None = None
    checkpoint: str | None = None
    epochs_done: int | None = None
    is_start: bool = False
    is_new_run: bool = False
    is_last: bool = False
    step_s: float | None = None
    average: str | None = None


@dataclass(frozen=True)
class Results:
    """What an evaluation sends to the loggers: metrics and texts, by name."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


class Evaluation(Protocol):
    """An evaluation of the live model. All methods are collective.

    Attributes:
        name: the first part of the names of its metrics.
    """

    name: str

    def is_due(self, moment: Moment) -> bool:
        """Return whether the evaluation must run now, equally on all ranks."""

    def run(self, moment: Moment) -> Results:
        """Evaluate, and record the results in a file of the run."""

    def rewind(self, moment: Moment) -> None:
        """Remove the recorded results of later moments, because the run continues from this one."""


class StepFile:
    """A JSON lines file of results, each line with its step. Rank 0 writes it.

    Args:
        path: path of the file; None keeps the results in memory, for a run without files.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines. Call it on rank 0."""
        if self._path is None:
            return self._lines
        return [json.loads(line) for line in storage.read_lines(self._path)] if storage.exists(self._path) else []

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append lines in one write. Collective."""
        self._lines += lines
        path = self._path
        if path is not None:
            run_on_master(lambda: append_line(path, "\n".join(to_json(line) for line in lines)))

    def rewind(self, step: int) -> None:
        """Remove the lines of later steps. Collective."""
        self._lines = [line for line in self._lines if line["step"] <= step]
        path = self._path
        if path is not None:
            run_on_master(lambda: filter_lines(path, lambda line: line["step"] <= step))

    def has(self, step: int) -> bool:
        """Return whether there are results of a step. Collective."""
        return run_on_master(lambda: any(line["step"] == step for line in self.lines()))


class StepSchedule:
    """Due before the first step, every `every` steps (0: never) and after the last one.

    The start of a process is due if it has no results yet: a resumed run then repeats nothing and misses nothing.
    """

    def __init__(self, every: int, file: StepFile) -> None:
        self._every, self._file = every, file

    def is_due(self, moment: Moment) -> bool:
        """Return whether the evaluation must run now. Collective."""
        is_multiple = bool(self._every) and moment.step % self._every == 0
        is_due = is_multiple or moment.step == 0 or moment.is_last or (moment.is_start and moment.is_new_run)
        return is_due and not (moment.is_start and self._file.has(moment.step))
