"""Aggregate scores of DCLM (Li et al. 2024, https://arxiv.org/abs/2406.11794): CORE and EXTENDED.

An aggregate is the mean of the centered accuracies (accuracy - baseline) / (1 - baseline) of its tasks. Two versions of
the baselines are in use; they differ for tasks whose data has fewer choices than the original.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from open_lm.evaluate.icl.metrics import Outcome

BASELINE_VERSIONS = ("v2", "v1")  # the default first


@dataclass(frozen=True)
class Aggregate:
    """An aggregate score.

    Attributes:
        name: one of tasks.AGGREGATES.
        baselines: version of the baselines.
        score: mean centered accuracy, None if a task is missing.
        tasks: number of its tasks.
        missing: labels of the tasks without a result with the right number of shots.
    """

    name: str
    baselines: str
    score: float | None
    tasks: int
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        name = f"DCLM {self.name.upper()} ({self.tasks} tasks, baselines {self.baselines})"
        if self.score is not None:
            return f"{name}: {self.score:.4f}"
        return f"{name}: not available, {len(self.missing)} tasks are missing: {', '.join(self.missing)}"


@functools.cache
def dclm_tasks() -> dict[str, tuple[int, bool, float, float]]:
    """Return (shots, whether it is in CORE, baselines of versions 1 and 2 in percent) of DCLM's tasks by label."""
    content = yaml.safe_load((Path(__file__).parent / "dclm.yaml").read_text(encoding="utf-8"))
    return {label: tuple(values) for label, values in content.items()}


def dclm_aggregate(outcomes: Sequence[Outcome], name: str, baselines: str = BASELINE_VERSIONS[0]) -> Aggregate:
    """Return an aggregate of the outcomes; other tasks and numbers of shots are ignored."""
    scores = {(outcome.task, outcome.shots): outcome.score for outcome in outcomes}
    members = {label: facts for label, facts in dclm_tasks().items() if name == "extended" or facts[1]}
    centered, missing = [], []
    for label, (shots, _, first, second) in members.items():
        score, baseline = scores.get((label, shots)), (first if baselines == "v1" else second) / 100
        if score is None:
            missing.append(label)
        else:
            centered.append((score - baseline) / (1 - baseline))
    mean = sum(centered) / len(centered) if centered and not missing else None
    return Aggregate(name, baselines, mean, len(members), missing)
