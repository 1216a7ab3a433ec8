"""Choose the runs of a ladder: sizes, tokens, batch sizes, learning rates and warmup. Imports no torch.

With the schedule wsd, the longest run of a size trains at a constant learning rate, and each shorter one is a branch:
a short decay from one of its checkpoints (Hägele et al. 2024, arXiv 2405.18392). A branch costs only its decay.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from open_lm.errors import ConfigError
from open_lm.scaling.settings import COMPUTE_OPTIMAL
from open_lm.scaling.shapes import FAMILY, Shape, named_shape

MULTIPLIERS = (20.0, 40.0, 10.0, 80.0, 160.0, 320.0)  # in the order in which a budget adds them
DECAY = 0.2  # share of the steps in which wsd decays
_SPACING = 1.8  # smallest ratio of neighboring sizes
_MAX_SIZES = 5
_LARGEST_SHARE = 0.5  # of the budget, for the largest size at a multiplier of 20
_WARMUP_SHARE = 0.1  # of the shortest run of a size
_MAX_CHECKPOINTS = 200  # that a long run keeps for its branches
_STEP_UNIT = 5  # makes the start of a decay of 0.2 of the steps an integer


@dataclass(frozen=True)
class Rung:
    """A run of a ladder.

    Attributes:
        shape: the model.
        suffix: planned length in the name of the run, such as m20 or t250000; see `lengths_of`.
        multiplier: planned tokens per parameter; `tokens` are rounded to steps.
        steps, global_batch: optimizer steps, and sequences of each.
        lr, warmup: peak learning rate, and steps of warmup.
        schedule: learning-rate schedule, wsd or cosine; the same for all runs of a ladder.
        trunk: name of the run from which it branches; None for a run from the start.
        start: step of the branch.
        milestone: steps between checkpoints that branches start from; 0: none.
        is_target: whether it is the run to predict, which is trained last.
    """

    shape: Shape
    suffix: str
    multiplier: float
    steps: int
    global_batch: int
    lr: float
    warmup: int
    schedule: str
    trunk: str | None = None
    start: int = 0
    milestone: int = 0
    is_target: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape.label}_{self.suffix}"

    @property
    def tokens(self) -> int:
        return self.steps * self.global_batch * self.shape.seq_len

    @property
    def trained_tokens(self) -> int:
        """Tokens that the run itself trains on."""
        return (self.steps - self.start) * self.global_batch * self.shape.seq_len

    @property
    def cost(self) -> float:
        """FLOPs that the run itself spends."""
        return self.trained_tokens * self.shape.flops_per_token


def learning_rate(flops: float) -> float:
    """Return the peak learning rate for a compute, by the fit of DeepSeek LLM (Bi et al. 2024, arXiv 2401.02954)."""
    return 0.3118 * flops**-0.125


def batch_tokens(flops: float) -> float:
    """Return the tokens of a step for a compute, by the fit of DeepSeek LLM (Bi et al. 2024, arXiv 2401.02954)."""
    return 0.2920 * flops**0.3271


Lengths = Mapping[str, Fraction]  # tokens of the runs of a size, by the suffix of their names


def lengths_of(shape: Shape, multipliers: Sequence[float] = (), tokens: Sequence[float] = ()) -> Lengths:
    """Return the lengths of runs that are given in tokens per parameter, or in tokens."""
    return {
        **{f"m{value:g}": Fraction(str(value)) * shape.params for value in multipliers},
        **{f"t{value:.0f}": Fraction(str(value)) for value in tokens},
    }


def rungs_of(shape: Shape, lengths: Lengths, *, lr: float | None, batch: int | None, branches: bool) -> list[Rung]:
    """Return the runs of one size.

    The default of batch and learning rate is that of its compute-optimal run, or of its longest run if that is shorter.
    """
    longest = max(lengths.values())
    optimal = shape.flops_per_token * min(float(longest), shape.params * COMPUTE_OPTIMAL)
    batch = batch or 2 ** max(0, round(math.log2(batch_tokens(optimal) / shape.seq_len)))
    per_step = batch * shape.seq_len
    if branches and len(lengths) > 1:
        steps = _branch_steps(lengths, per_step)
    else:
        steps = {suffix: max(1, round(tokens / per_step)) for suffix, tokens in lengths.items()}
    warmup = max(1, min(round(shape.params / per_step), int(_WARMUP_SHARE * min(steps.values()))))
    schedule = "wsd" if branches else "cosine"
    rungs = [
        Rung(
            shape, suffix, float(lengths[suffix] / shape.params), steps[suffix], batch, lr or learning_rate(optimal),
            warmup, schedule,
        )
        for suffix in sorted(lengths, key=lambda suffix: lengths[suffix])
    ]  # fmt: skip
    return _branched(rungs) if branches and len(rungs) > 1 else rungs


def _branch_steps(lengths: Lengths, per_step: int) -> dict[str, int]:
    """Return the steps of each length such that all decays begin at a multiple of the same number of steps.

    Raises:
        ConfigError: lengths without a common measure, which would need too many checkpoints.
    """
    scale = math.lcm(*(tokens.denominator for tokens in lengths.values()))
    counts = {suffix: int(tokens * scale) for suffix, tokens in lengths.items()}
    divisor = math.gcd(*counts.values())
    number = max(counts.values()) // divisor
    if number > _MAX_CHECKPOINTS:
        raise ConfigError(
            f"--multipliers or --run-tokens: the long run of a size ({', '.join(lengths)}) would keep {number} "
            f"checkpoints for its branches, expected at most {_MAX_CHECKPOINTS}; choose multiples of a larger number, "
            "such as 10 20 40, or pass --no-branches"
        )
    unit = _STEP_UNIT * max(1, round(Fraction(divisor, scale) / per_step / _STEP_UNIT))
    return {suffix: count // divisor * unit for suffix, count in counts.items()}


def _branched(rungs: list[Rung]) -> list[Rung]:
    """Make all runs of a size but the longest one branches of it."""
    trunk = rungs[-1]
    starts = [rung.steps - round(DECAY * rung.steps) for rung in rungs[:-1]]
    milestone = math.gcd(*starts)
    trunk = replace(trunk, milestone=milestone)
    branches = [replace(rung, trunk=trunk.name, start=start) for rung, start in zip(rungs[:-1], starts, strict=True)]
    return [trunk, *branches]


CostOf = Callable[[Rung], float]


@dataclass(frozen=True)
class Choices:
    """What `plan` may choose. None leaves the choice to the plan.

    Attributes:
        shapes: sizes of the ladder.
        multipliers: tokens per parameter.
        run_tokens: tokens of the runs of each size, instead of multipliers.
        lr, batch: learning rate (of the smallest size) and sequences of a step, for all sizes.
        lr_exponent: power of the number of parameters with which the learning rate changes.
        branches: train the shorter runs of a size as branches.
        target: (parameters, tokens) of the model to predict.
    """

    shapes: Sequence[Shape] | None = None
    multipliers: Sequence[float] | None = None
    run_tokens: Sequence[float] | None = None
    lr: float | None = None
    batch: int | None = None
    lr_exponent: float = 0.0
    branches: bool = True
    target: tuple[int, int] | None = None

    def rungs(self, shape: Shape, lengths: Lengths, smallest: Shape) -> list[Rung]:
        """Return the runs of a size in a ladder with the smallest size `smallest`."""
        lr = None if self.lr is None else self.lr * (shape.params / smallest.params) ** self.lr_exponent
        return rungs_of(shape, lengths, lr=lr, batch=self.batch, branches=self.branches)


def choose(choices: Choices, budget: float | None, cost_of: CostOf) -> list[Rung]:
    """Return the runs of a ladder.

    Without sizes, the largest is the largest member of the family below the target whose compute-optimal run costs at
    most half of the budget; up to four smaller members follow. Without multipliers, each size is trained at 20 tokens
    per parameter, and the cheapest other combinations are added while the budget lasts.

    Args:
        choices: what is given.
        budget: limit on the sum of `cost_of`; None: no limit.
        cost_of: cost of a run, in the unit of the budget.

    Raises:
        ConfigError: a budget that is too small, or neither sizes nor a budget.
    """
    shapes = list(choices.shapes) if choices.shapes is not None else _family_sizes(choices, budget, cost_of)
    build = functools.partial(choices.rungs, smallest=shapes[0])
    if choices.multipliers is not None or choices.run_tokens is not None:
        given = (choices.multipliers or (), choices.run_tokens or ())
        rungs = [rung for shape in shapes for rung in build(shape, lengths_of(shape, *given))]
        _check_budget(rungs, budget, cost_of)
        return rungs
    chosen = {shape: [float(COMPUTE_OPTIMAL)] for shape in shapes}

    def total(plan: dict[Shape, list[float]]) -> list[Rung]:
        return [rung for shape, values in plan.items() for rung in build(shape, lengths_of(shape, values))]

    _check_budget(total(chosen), budget, cost_of)
    options = itertools.product(shapes, MULTIPLIERS[1:] if budget is not None else MULTIPLIERS[1:4])
    for shape, value in sorted(options, key=lambda option: option[0].params ** 2 * option[1]):
        extended = {**chosen, shape: [*chosen[shape], value]}
        if budget is None or sum(map(cost_of, total(extended))) <= budget:
            chosen = extended
    return total(chosen)


def _family_sizes(choices: Choices, budget: float | None, cost_of: CostOf) -> list[Shape]:
    if budget is None:
        raise ConfigError("plan: give a budget (--flops, --hours or --tokens), or the sizes of the ladder with --sizes")
    limit = choices.target[0] if choices.target else float("inf")
    members = [shape for shape in map(named_shape, FAMILY) if shape.params < limit]
    optimal = {
        shape: cost_of(choices.rungs(shape, lengths_of(shape, [COMPUTE_OPTIMAL]), shape)[0]) for shape in members
    }
    affordable = [shape for shape in members if optimal[shape] <= _LARGEST_SHARE * budget]
    sizes: list[Shape] = []
    for shape in reversed(affordable):
        if not sizes or sizes[-1].params >= _SPACING * shape.params:
            sizes.append(shape)
    if len(members) < 3:
        raise ConfigError(
            f"--target: {len(members)} sizes of the family are smaller than {limit:,.0f} parameters, expected at least "
            "3; choose smaller models with --sizes"
        )
    if len(sizes) < 3:
        cheapest = 2 * optimal[members[2]]
        raise ConfigError(
            f"plan: the budget {budget:.3g} suffices for {len(sizes)} sizes of the family, expected at least 3; raise "
            f"it to about {cheapest:.3g}, or choose smaller models with --sizes"
        )
    return sizes[:_MAX_SIZES][::-1]


def target_rung(shape: Shape, tokens: int, choices: Choices, ladder: Sequence[Rung]) -> Rung:
    """Return the run to predict. Its hyperparameters follow the rules of the ladder, without its branches."""
    smallest = min((rung.shape for rung in ladder), key=lambda other: other.params)
    largest = max(ladder, key=lambda rung: (rung.shape.params, rung.steps))
    (rung,) = choices.rungs(shape, {"target": Fraction(tokens)}, smallest)
    warmup = max(1, min(rung.warmup, round(rung.steps * largest.warmup / largest.steps)))
    return replace(rung, warmup=warmup, is_target=True)


def _check_budget(rungs: Sequence[Rung], budget: float | None, cost_of: CostOf) -> None:
    cost = sum(map(cost_of, rungs))
    if budget is not None and cost > budget:
        raise ConfigError(
            f"plan: these {len(rungs)} runs cost {cost:.3g}, more than the budget of {budget:.3g}; raise the budget, "
            "or choose fewer or smaller --sizes or --multipliers"
        )
