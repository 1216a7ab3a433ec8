"""The number of examples that fit into a share of the training time (--icl-max-time-share)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_EXAMPLES = 8  # of each task, as long as nothing is known about the speed


@dataclass(frozen=True)
class Budget:
    """The share of the time that evaluations may take, and the time of a training step.

    Attributes:
        max_share: the share, above 0 and below 1.
        step_s: mean duration of a training step in seconds; None before the first one.
    """

    max_share: float
    step_s: float | None

    def examples(self, step: int, records: Sequence[Mapping[str, Any]], limit: int, count: Callable[[int], int]) -> int:
        """Return the number of examples of each task: `limit`, or a power of two, at least 1.

        The evaluation may take its share of the time since the previous one, and all evaluations together their share
        of the time since the first one. Powers of two change rarely, so that most evaluations of a run have the
        same examples.

        Args:
            step: the step of the evaluation.
            records: the earlier evaluations, in order, each with step, seconds and examples (of all tasks).
            limit: the most examples of a task.
            count: returns the examples of all tasks for a number of examples of each task.
        """
        if not records or not self.step_s:
            return min(FIRST_EXAMPLES, limit)
        first, last = records[0], records[-1]
        ratio = self.max_share / (1 - self.max_share)
        since_last = ratio * self.step_s * (step - last["step"])
        remaining = ratio * self.step_s * (step - first["step"]) - sum(record["seconds"] for record in records)
        affordable = min(since_last, remaining) / max(last["seconds"], 1e-9) * last["examples"]
        if count(limit) <= affordable:
            return limit
        number = 1
        while 2 * number < limit and count(2 * number) <= affordable:
            number *= 2
        return number
