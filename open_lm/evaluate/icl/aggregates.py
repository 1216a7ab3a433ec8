"""Aggregate scores: CORE and EXTENDED of DCLM (Li et al. 2024, https://arxiv.org/abs/2406.11794), and OpenLM's average.

DCLM's aggregates are the mean of the centered accuracies (accuracy - baseline) / (1 - baseline) of their tasks. Two
versions of the baselines are in use; they differ for tasks whose data has fewer choices than the original. OpenLM's
published tables have the mean accuracy of eleven zero-shot tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from open_lm.config.evaluation_sections import BASELINE_VERSIONS
from open_lm.evaluate.icl.metrics import Outcome

_OPENLM_TASKS = (
    "arc_challenge", "arc_easy", "boolq", "copa", "hellaswag", "lambada_openai", "piqa", "winogrande", "mmlu",
    "jeopardy", "winograd",
)  # fmt: skip


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
        name = f"{title(self.name, self.baselines, f'{self.tasks} tasks')}"
        if self.score is not None:
            return f"{name}: {self.score:.4f}"
        return f"{name}: not available, {len(self.missing)} tasks are missing: {', '.join(self.missing)}"


def title(name: str, baselines: str, detail: str = "") -> str:
    """Return the name of an aggregate for tables, with the version of the baselines if it has them."""
    if name == "openlm":
        return f"OpenLM average{f' ({detail})' if detail else ''}"
    return f"DCLM {name.upper()} ({f'{detail}, ' if detail else ''}baselines {baselines})"


@functools.cache
def dclm_tasks() -> dict[str, tuple[int, bool, float, float]]:
    """Return (shots, whether it is in CORE, baselines of versions 1 and 2 in percent) of DCLM's tasks by label."""
    content = yaml.safe_load((Path(__file__).parent / "dclm.yaml").read_text(encoding="utf-8"))
    return {label: tuple(values) for label, values in content.items()}


def aggregate_members(name: str, baselines: str = BASELINE_VERSIONS[0]) -> dict[tuple[str, int], float]:
    """Return the tasks of an aggregate: scores of random guessing, from 0 to 1, by (label, shots)."""
    if name == "openlm":
        return {(label, 0): 0.0 for label in _OPENLM_TASKS}
    return {
        (label, shots): (first if baselines == "v1" else second) / 100
        for label, (shots, is_core, first, second) in dclm_tasks().items()
        if name == "extended" or is_core
    }


def aggregate_score(outcomes: Sequence[Outcome], name: str, baselines: str = BASELINE_VERSIONS[0]) -> Aggregate:
    """Return an aggregate of the outcomes; other tasks and numbers of shots are ignored."""
    scores = {(outcome.task, outcome.shots): outcome.score for outcome in outcomes}
    members = aggregate_members(name, baselines)
    missing = [label for label, shots in members if scores.get((label, shots)) is None]
    centered = [(score - b) / (1 - b) for key, b in members.items() if (score := scores.get(key)) is not None]
    mean = None if missing else sum(centered) / len(centered)
    return Aggregate(name, "" if name == "openlm" else baselines, mean, len(members), missing)
