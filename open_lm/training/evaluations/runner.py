"""Run the evaluations of the live model that are due, without any effect on the training that continues."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from open_lm.distributed.rng import rng_state, set_rng_state
from open_lm.errors import UserError
from open_lm.monitor.loggers import MetricLoggers
from open_lm.training.build import RunParts
from open_lm.training.evaluations.moment import Evaluation, Moment
from open_lm.training.evaluations.samples import TextSamples
from open_lm.training.evaluations.tasks import TaskEvaluation
from open_lm.training.evaluations.validation import Validation

_KINDS = (Validation, TaskEvaluation, TextSamples)


class Evaluations:
    """All evaluations of a run, and the time that they take. Random generators keep their state.

    Args:
        parts: the parts of the run.
        weights: path or URL of the checkpoint that the run loads; None for a new model.

    Raises:
        UserError: a file of an evaluation is missing or invalid.
    """

    def __init__(self, parts: RunParts, weights: str | None) -> None:
        created = [kind.create(parts, weights) for kind in _KINDS]
        self.all: list[Evaluation] = [evaluation for evaluation in created if evaluation is not None]
        self._is_master = parts.runtime.is_master
        self._loggers = MetricLoggers()
        self._seconds = dict.fromkeys((evaluation.name for evaluation in self.all), 0.0)
        self._start, self._first_step = time.monotonic(), 0

    def start(self, loggers: MetricLoggers, step: int) -> None:
        """Log to `loggers` from now on, and measure times from now on, at step `step`."""
        self._loggers = loggers
        self._start, self._first_step = time.monotonic(), step

    def is_due(self, moment: Moment) -> bool:
        """Return whether any evaluation is due. Collective."""
        return bool(self._due(moment))

    def run(self, moment: Moment, all_kinds: bool = False) -> UserError | None:
        """Run the evaluations that are due, or all; return the first error, after running the others. Collective."""
        failure: UserError | None = None
        moment = replace(moment, step_s=self._step_s(moment.step))
        for evaluation in self.all if all_kinds else self._due(moment):
            try:
                with self._measured(evaluation.name), _same_random_numbers():
                    results = evaluation.run(moment)
            except UserError as error:
                failure = failure or error
                continue
            tokens = {} if moment.tokens is None else {"tokens": moment.tokens}
            times = {}
            if moment.step_s is not None:
                times[f"{evaluation.name}/time_share"] = self._seconds[evaluation.name] / self._elapsed()
            if results.metrics or times:
                self._loggers.log({**tokens, **results.metrics, **times}, moment.step)
            self._loggers.log_texts(results.texts, moment.step)
        return failure

    def rewind(self, moment: Moment) -> None:
        """Remove the recorded results of later moments, because the run continues from this one. Collective."""
        for evaluation in self.all:
            evaluation.rewind(moment)

    def validation_results(self, step: int) -> list[dict[str, Any]] | None:
        """Return the results of the validation at a step, or None if there was none."""
        validation = next((kind for kind in self.all if isinstance(kind, Validation)), None)
        return validation.results if validation is not None and validation.step == step else None

    def log_times(self) -> None:
        """Log the share of the time that each evaluation has taken."""
        spent = {name: seconds for name, seconds in self._seconds.items() if seconds}
        if spent and self._is_master:
            total = self._elapsed()
            shares = ", ".join(f"{name} {seconds:.1f} s ({seconds / total:.1%})" for name, seconds in spent.items())
            logging.info(f"Of {total:.1f} s since the start of the training, evaluations took: {shares}")

    def _due(self, moment: Moment) -> list[Evaluation]:
        return [evaluation for evaluation in self.all if evaluation.is_due(moment)]

    def _elapsed(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _step_s(self, step: int) -> float | None:
        """Return the mean duration of a training step of this process; None before the first one."""
        steps = step - self._first_step
        return max(self._elapsed() - sum(self._seconds.values()), 0.0) / steps if steps > 0 else None

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - start


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restore the state of the random generators after the `with` block."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
