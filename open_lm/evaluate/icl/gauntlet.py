"""llm-foundry's Gauntlet: scores of categories of tasks, and averages of categories, as its callback computes them.

The score of a category is the weighted mean of its benchmarks. A benchmark's score is the accuracy, from which the
accuracy of random guessing is subtracted and which is then rescaled so that 1 remains the maximum, both if requested.
A category without the results of all its benchmarks is excluded, also from the averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_lm.evaluate.icl.metrics import Outcome

WEIGHTINGS = ("EQUAL", "SAMPLE_SZ", "LOG_SAMPLE_SZ")
_SETTINGS = ("weighting", "subtract_random_baseline", "rescale_accuracy", "averages", "categories")
_BENCHMARK_KEYS = ("name", "num_fewshot", "random_baseline")


@dataclass(frozen=True)
class Benchmark:
    """A member of a category: the label of a task, its number of shots and the score of random guessing."""

    task: str
    shots: int
    baseline: float


@dataclass(frozen=True)
class Gauntlet:
    """The setting `eval_gauntlet` of a YAML file.

    Attributes:
        categories: benchmarks by category.
        averages: names of categories by average.
        weighting: EQUAL, SAMPLE_SZ (the number of examples) or LOG_SAMPLE_SZ (its binary logarithm).
        subtract_baseline: subtract the score of random guessing.
        rescale: divide by 1 - the score of random guessing.
    """

    categories: Mapping[str, Sequence[Benchmark]]
    averages: Mapping[str, Sequence[str]]
    weighting: str = "EQUAL"
    subtract_baseline: bool = True
    rescale: bool = True


@dataclass(frozen=True)
class GauntletScores:
    """The scores of a Gauntlet.

    Attributes:
        weighting: as in `Gauntlet`.
        categories: scores by category; None for one with missing results.
        averages: scores by average over the available ones of its categories; None if there is none.
        missing: by category, its benchmarks without a result, as "task N-shot".
    """

    weighting: str
    categories: dict[str, float | None] = field(default_factory=dict)
    averages: dict[str, float | None] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"Gauntlet (weighting {self.weighting}):"]
        for name, score in self.categories.items():
            reason = f"not available, missing: {', '.join(self.missing.get(name, []))}"
            lines.append(f"  {name}: {reason if score is None else f'{score:.4f}'}")
        excluded = [name for name, score in self.categories.items() if score is None]
        note = f" (without {', '.join(excluded)})" if excluded else ""
        for name, score in self.averages.items():
            lines.append(f"  {name}: not available" if score is None else f"  {name}: {score:.4f}{note}")
        return "\n".join(lines)


def gauntlet_scores(gauntlet: Gauntlet, outcomes: Sequence[Outcome]) -> GauntletScores:
    """Return the scores of a Gauntlet from the outcomes of its tasks; other tasks and numbers of shots are ignored."""
    known = {(outcome.task, outcome.shots): outcome for outcome in outcomes if outcome.score is not None}
    scores = GauntletScores(gauntlet.weighting)
    for name, benchmarks in gauntlet.categories.items():
        missing = [b for b in benchmarks if (b.task, b.shots) not in known]
        if missing:
            scores.categories[name] = None
            scores.missing[name] = [f"{b.task} {b.shots}-shot" for b in missing]
            continue
        members = [known[b.task, b.shots] for b in benchmarks]
        weights = [_weight(gauntlet.weighting, outcome.n) for outcome in members]
        values = [_score(gauntlet, benchmark, outcome) for benchmark, outcome in zip(benchmarks, members, strict=True)]
        scores.categories[name] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    for name, categories in gauntlet.averages.items():
        available = [score for c in categories if (score := scores.categories.get(c)) is not None]
        scores.averages[name] = sum(available) / len(available) if available else None
    return scores


def _weight(weighting: str, num_examples: int) -> float:
    if weighting == "EQUAL":
        return 1.0
    return max(num_examples, 1) if weighting == "SAMPLE_SZ" else max(math.log2(max(num_examples, 1)), 1.0)


def _score(gauntlet: Gauntlet, benchmark: Benchmark, outcome: Outcome) -> float:
    values = [value for name, value in outcome.metrics.items() if "Accuracy" in name]
    score = sum(values) / len(values) if values else outcome.score or 0.0
    if gauntlet.subtract_baseline:
        score -= benchmark.baseline
    return score / (1 - benchmark.baseline) if gauntlet.rescale else score


# ---------------------------------------------------------------------------------------------------- settings
def parse_gauntlet(content: Any, file: str, problems: list[str]) -> Gauntlet | None:
    """Return the Gauntlet of the setting `eval_gauntlet` of a file; add the problems of an invalid one."""
    where = f"{file}: eval_gauntlet"
    if not isinstance(content, dict) or not isinstance(content.get("categories"), list):
        problems.append(f"{where}: expected settings with a list of categories")
        return None
    before = len(problems)
    problems += [f"{where}.{key} is not supported; remove it" for key in content if key not in _SETTINGS]
    weighting = str(content.get("weighting") or "EQUAL")
    if weighting not in WEIGHTINGS:
        problems.append(f"{where}.weighting is {weighting}, expected one of {', '.join(WEIGHTINGS)}")
    subtract, rescale = (content.get(key, True) for key in ("subtract_random_baseline", "rescale_accuracy"))
    if rescale and not subtract:
        problems.append(f"{where}.rescale_accuracy needs subtract_random_baseline; set it to true, or both to false")
    categories: dict[str, list[Benchmark]] = {}
    for category in content["categories"]:
        name, entries = (category.get(key) if isinstance(category, dict) else None for key in ("name", "benchmarks"))
        if not isinstance(name, str) or not isinstance(entries, list) or not entries:
            problems.append(f"{where}: expected a category with a name and a list of benchmarks, found {category}")
            continue
        categories[name] = [b for entry in entries if (b := _benchmark(entry, f"{where}, category {name}", problems))]
    averages = content.get("averages") or {"default_average": list(categories)}
    if not isinstance(averages, dict) or not all(isinstance(members, list) for members in averages.values()):
        problems.append(f"{where}.averages is {averages!r}, expected a list of categories for each name of an average")
        return None
    for name, members in averages.items():
        unknown = [str(member) for member in members if not isinstance(member, str) or member not in categories]
        if unknown or name in categories:
            problem = f"the categories {', '.join(unknown)} do not exist" if unknown else "a category has the same name"
            problems.append(f"{where}: average {name}: {problem}")
    if len(problems) > before:
        return None
    return Gauntlet(categories, averages, weighting, bool(subtract), bool(rescale))


def _benchmark(entry: Any, where: str, problems: list[str]) -> Benchmark | None:
    if not isinstance(entry, dict) or any(key not in entry for key in _BENCHMARK_KEYS):
        problems.append(f"{where}: expected a benchmark with {', '.join(_BENCHMARK_KEYS)}, found {entry}")
        return None
    name, shots, baseline = (entry[key] for key in _BENCHMARK_KEYS)
    is_number = isinstance(baseline, (int, float)) and not isinstance(baseline, bool) and 0 <= baseline < 1
    if not is_number or isinstance(shots, bool) or not isinstance(shots, int):
        problems.append(
            f"{where}, benchmark {name}: expected an integer num_fewshot and a random_baseline of at least 0 and below "
            f"1, found {shots} and {baseline}"
        )
        return None
    return Benchmark(str(name), shots, float(baseline))
