"""Choose the runs that a fit uses, and reject mixtures that no law describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from open_lm.errors import ConfigError, DataError, join_problems
from open_lm.scaling.runs import Run

ABOVE_LIMIT = "above --max-flops"  # reason of an exclusion that the user has requested
SAME_SIZE = 0.02  # relative difference of parameters within one scale
_DIVERGED = 1.1  # loss relative to that of a smaller model on fewer tokens
# Fitting points of Gadre et al. 2024: these sizes at a token multiplier of 20, and the smallest at 320.
_PAPER_SIZES = (10_569_312, 78_914_048, 153_677_376, 411_616_256)
_PAPER_ERROR_SIZE = 1_439_795_200  # at 20, only for the law of the error
_PAPER_MULTIPLIER, _PAPER_OVER_TRAINED = 20, 320


@dataclass
class Selection:
    """Runs of a fit.

    Attributes:
        loss: runs to fit the loss on.
        error: runs to fit the error on.
        excluded: (run, reason) pairs.
    """

    loss: list[Run]
    error: list[Run]
    excluded: list[tuple[Run, str]] = field(default_factory=list)


def same(first: float, second: float, tolerance: float = SAME_SIZE) -> bool:
    """Return whether two sizes are equal up to rounding."""
    return abs(first - second) <= tolerance * second


def scales(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs grouped by number of parameters, the smallest first."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.params):
        if groups and same(run.params, groups[-1][0].params):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def select_runs(runs: Sequence[Run], train: str | None, loss: str) -> tuple[list[Run], list[tuple[Run, str]]]:
    """Return the runs of one training set that did not diverge, and the excluded ones with the reason.

    Raises:
        ConfigError: an unknown training set or loss, or several training sets without a choice.
        DataError: runs of several tokenizers or validation sets.
    """
    names = sorted({run.train for run in runs})
    if train is None and len(names) > 1:
        raise ConfigError(
            f"the runs have several training sets: {', '.join(map(repr, names))}; choose one with --train"
        )
    if train is not None and train not in names:
        raise ConfigError(f"--train: found {train!r}, expected one of {', '.join(map(repr, names))}")
    chosen = [run for run in runs if train in (None, run.train)]
    _check_uniform(chosen, loss)
    diverged = {id(run): reason for run in chosen if (reason := _divergence(run, chosen, loss))}
    kept = [run for run in chosen if id(run) not in diverged]
    return kept, [(run, diverged[id(run)]) for run in chosen if id(run) in diverged]


def _check_uniform(runs: Sequence[Run], loss: str) -> None:
    known = sorted({name for run in runs for name in run.losses})
    if loss not in known:
        raise ConfigError(f"--loss: found {loss!r}, expected one of {', '.join(known) or 'no losses in these runs'}")
    missing = [run.label for run in runs if loss not in run.losses]
    problems = []
    if missing:
        problems.append(
            f"these {len(missing)} of {len(runs)} runs have no loss on {loss}: {'; '.join(missing[:5])}"
            f"{'; …' if len(missing) > 5 else ''}; evaluate them on it, or remove them from the table"
        )
    for what, value_of in (
        ("tokenizers", lambda run: run.facts.get("tokenizer")),
        (f"validation sets under the name {loss}", lambda run: run.facts.get("validation", {}).get(loss)),
    ):
        problems += _mixture(runs, what, value_of)
    if problems:
        raise DataError(join_problems(problems, "the runs of one fit must be comparable"))


def _mixture(runs: Sequence[Run], what: str, value_of: Callable[[Run], Any]) -> list[str]:
    """Return a problem if the runs have several values of a fact that must be equal; unknown values are ignored."""
    by_value: dict[str, list[Run]] = {}
    for run in runs:
        if (value := value_of(run)) is not None:
            by_value.setdefault(str(value), []).append(run)
    if len(by_value) < 2:
        return []
    groups = [f"{value} ({len(members)}, such as {members[0].label})" for value, members in by_value.items()]
    return [f"the runs have {len(by_value)} {what}: {'; '.join(groups)}; fit them separately"]


def _divergence(run: Run, runs: Sequence[Run], loss: str) -> str:
    """Return why a run is taken as diverged; empty if it is not."""
    value, lower, _ = run.losses[loss]
    if run.facts.get("diverged"):
        return "marked as diverged"
    if not math.isfinite(value):
        return f"diverged: its loss on {loss} is not finite"
    smaller = [
        other
        for other in runs
        if other.params <= run.params and other.tokens <= run.tokens and other is not run
        and math.isfinite(other.losses[loss][0])
    ]  # fmt: skip
    best = min(smaller, key=lambda other: other.losses[loss][0], default=None)
    if best is not None and min(value, lower) > _DIVERGED * best.losses[loss][0]:
        return f"diverged: its loss {value:.3f} is far above {best.losses[loss][0]:.3f} of the smaller {best.label}"
    return ""


def paper_points(runs: Sequence[Run]) -> Selection:
    """Return the fitting points of Gadre et al. 2024 (arXiv 2403.08540).

    Raises:
        ConfigError: the table lacks one of them.
    """
    wanted = [(size, _PAPER_MULTIPLIER) for size in _PAPER_SIZES] + [(_PAPER_SIZES[0], _PAPER_OVER_TRAINED)]
    found = {
        point: _find(runs, *point) for point in [*wanted, (_PAPER_ERROR_SIZE, _PAPER_MULTIPLIER)]
    }  # fmt: skip
    missing = [f"{size:,} parameters at {m} tokens per parameter" for size, m in wanted if found[size, m] is None]
    if missing:
        raise ConfigError(f"--points paper: the table has no run of {'; '.join(missing)}; use --points all")
    loss = [run for point in wanted if (run := found[point]) is not None]
    return Selection(loss, [run for run in found.values() if run is not None])


def _find(runs: Sequence[Run], params: int, multiplier: int) -> Run | None:
    return next((run for run in runs if same(run.params, params) and same(run.multiplier, multiplier)), None)


def all_points(runs: Sequence[Run], targets: Sequence[tuple[float, float]], max_flops: float | None) -> Selection:
    """Return all runs up to a compute, without the targets (params, tokens) themselves."""
    chosen: list[Run] = []
    excluded = []
    for run in runs:
        if any(same(run.params, params) and same(run.tokens, tokens) for params, tokens in targets):
            excluded.append((run, "it is a target"))
        elif max_flops is not None and run.flops > max_flops:
            excluded.append((run, ABOVE_LIMIT))
        else:
            chosen.append(run)
    return Selection(chosen, chosen, excluded)
