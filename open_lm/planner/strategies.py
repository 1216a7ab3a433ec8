"""The ways to distribute a training run over devices: their trainer flags, their cost, and the fastest that fits."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from open_lm.config.command_line import parse_args
from open_lm.config.layout import MeshLayout, indivisible_experts, resolve_layout
from open_lm.config.sections import Config
from open_lm.errors import ConfigError
from open_lm.planner.memory import Memory, add_reserve, peak
from open_lm.planner.setup import TrainingSetup
from open_lm.planner.shapes import ModelShape, shape_of
from open_lm.planner.traffic import Rates, StepTime, step_time

# {tensor}, {context} and {expert} are replaced by sizes that fit the model. A further strategy, "given", is the one
# that the user's flags set.
STRATEGIES: dict[str, str] = {
    "single": "",
    "ddp": "",
    "zero2": "--fsdp --fsdp-zero2",
    "fsdp": "--fsdp",
    "hybrid": "--fsdp --fsdp-hybrid",
    "offload": "--fsdp --fsdp-cpu-offload",
    "tensor": "--tensor-parallel {tensor}",
    "tensor+fsdp": "--fsdp --tensor-parallel {tensor}",
    "context": "--fsdp --context-parallel {context}",
    "expert": "--fsdp --expert-parallel {expert}",
}
SIMILAR_SPEED = 0.995  # options at least this fast compared with the fastest count as equally fast
CHECKPOINTING = ("none", "op", "half-op", "2", "full")
_MAX_BATCH = 1 << 14
_BATCH_FLAGS = {"batch_size", "global_batch_size"}
_STRATEGY_FLAGS = {"fsdp", "tensor_parallel", "context_parallel", "expert_parallel", "mesh_dim"}
SINGLE_DEVICE_STRATEGIES = ("single", "offload")


@dataclass(frozen=True)
class Machine:
    """The devices of a plan: their number, memory, number per node, and name."""

    devices: int
    memory_bytes: int
    per_node: int
    name: str

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return -(-self.devices // self.per_node)


@dataclass(frozen=True)
class Option:
    """A strategy with its memory and time.

    Attributes:
        strategy: a name of STRATEGIES, or "given".
        checkpointing: the value of --activation-checkpointing.
        flags: the trainer's flags.
        machine: the devices.
        batch: sequences of a micro-batch on a device; the largest that fits unless the flags set it.
        largest: the largest micro-batch that fits; 0 for none.
        setup: the training setup; None if there is a problem.
        memory: the memory of the phase that needs most.
        time: the time of a step; None if there is a problem.
        problem: why this way is not possible; empty if it is.
    """

    strategy: str
    checkpointing: str
    flags: tuple[str, ...]
    machine: Machine
    batch: int = 0
    largest: int = 0
    setup: TrainingSetup | None = None
    memory: Memory = Memory()
    time: StepTime | None = None
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether the batch fits into the memory of a device."""
        return not self.problem and 0 < self.batch <= self.largest

    @property
    def global_batch(self) -> int:
        """The sequences of a step on all devices."""
        assert self.setup is not None
        return self.batch * self.setup.config.optim.accum_freq * self.setup.layout.data_size

    def command(self) -> str:
        """Return the command line that starts the training. The trainer's parser has accepted these flags."""
        machine = self.machine
        nodes = f"--nnodes {machine.nodes} --rdzv-backend c10d --rdzv-endpoint NODE:29400 " if machine.nodes > 1 else ""
        start = f"torchrun {nodes}--nproc-per-node {min(machine.devices, machine.per_node)} -m open_lm.main"
        return f"{start if machine.devices > 1 else 'python -m open_lm.main'} {shlex.join(self.flags)}"


@dataclass(frozen=True)
class Requirements:
    """The trainer's flags of the command line.

    Attributes:
        flags: the flags.
        given_flags: names of the settings that the user set; the planner may choose all others.
    """

    flags: tuple[str, ...]
    given_flags: frozenset[str]

    @cached_property
    def config(self) -> Config:
        """The configuration that the flags describe."""
        return Config.from_namespace(parse_args(self.flags))

    @cached_property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        return shape_of(self.config.model)

    def strategies(self, machine: Machine) -> list[str]:
        """Return the strategies for the number of devices, or "given" if the flags set one."""
        if self.sets_strategy:
            return ["given"]
        return [
            name
            for name in STRATEGIES
            if (name in SINGLE_DEVICE_STRATEGIES if machine.devices == 1 else name != "single")
            and (name != "expert" or self.shape.moe_num_experts > 1)
        ]

    @property
    def sets_strategy(self) -> bool:
        """Whether the flags set a strategy."""
        return bool(self.given_flags & _STRATEGY_FLAGS)

    def checkpointing(self) -> list[str]:
        """Return the modes of activation checkpointing to evaluate."""
        model = self.config.model
        if self.given_flags & {"grad_checkpointing", "activation_checkpointing"}:
            return ["full" if model.grad_checkpointing else model.activation_checkpointing]
        return list(CHECKPOINTING)


def evaluate_options(
    requirements: Requirements, machine: Machine, rates: Rates, names: Sequence[str] = ()
) -> list[Option]:
    """Return every strategy with every mode of activation checkpointing, with its memory and time on the machine."""
    return [
        evaluate_option(requirements, machine, rates, name, checkpointing)
        for name in names or requirements.strategies(machine)
        for checkpointing in requirements.checkpointing()
    ]


def evaluate_option(
    requirements: Requirements, machine: Machine, rates: Rates, strategy: str, checkpointing: str
) -> Option:
    """Return one strategy with its memory and time. What the machine or trainer does not support sets `problem`."""
    unevaluated, context = Option(strategy, checkpointing, (), machine), ""
    try:
        flags = (*requirements.flags, *_flags(requirements, machine, strategy, checkpointing))
        config = Config.from_namespace(parse_args(flags))
        layout = resolve_layout(config.parallel, machine.devices, min(machine.per_node, machine.devices))
        _check(requirements.shape, layout, strategy, machine)
        setup = _that_fits(requirements, TrainingSetup(requirements.shape, config, layout, 1), machine.memory_bytes)
        if (count := setup.config.optim.accum_freq) != config.optim.accum_freq:
            flags += ("--accum-freq", str(count))
            context = f"with --accum-freq {count}, to fit into memory: "
        if (reduction := setup.config.parallel.accum_reduce) != config.parallel.accum_reduce:
            flags += ("--accum-reduce", reduction)
        largest = largest_batch(lambda batch: _fits(replace(setup, batch=batch), machine.memory_bytes))
        if not requirements.given_flags & _BATCH_FLAGS:
            setup = replace(setup, batch=max(largest, 1))
            flags += ("--batch-size", str(setup.batch))
        setup = replace(setup, config=Config.from_namespace(parse_args(flags)))  # as the trainer will parse them
    except ConfigError as error:
        return replace(unevaluated, problem=f"{context}{error}")
    return replace(
        unevaluated,
        flags=flags,
        batch=setup.batch,
        largest=largest,
        setup=setup,
        memory=add_reserve(peak(setup), setup),
        time=step_time(setup, rates),
    )


def fastest(options: Sequence[Option]) -> Option | None:
    """Return the fastest option that fits, None if none does. Of equally fast ones the least memory wins."""
    speeds = {id(item): item.time.tokens_per_s for item in options if item.fits and item.time is not None}
    limit = SIMILAR_SPEED * max(speeds.values(), default=1.0)
    candidates = [item for item in options if speeds.get(id(item), 0.0) >= limit]
    return min(candidates, key=lambda item: item.memory.total, default=None)


def largest_batch(fits: Callable[[int], bool]) -> int:
    """Return the largest batch up to _MAX_BATCH that fits, 0 for none. Smaller ones than one that fits must fit too."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= _MAX_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(setup: TrainingSetup, memory_bytes: int) -> bool:
    return add_reserve(peak(setup), setup).total <= memory_bytes


def _that_fits(requirements: Requirements, setup: TrainingSetup, memory_bytes: int) -> TrainingSetup:
    """Return the first candidate that fits into the memory, or the last one if none does."""
    for candidate in _candidates(requirements, setup):
        setup = candidate
        if _fits(setup, memory_bytes):
            break
    return setup


def _candidates(requirements: Requirements, setup: TrainingSetup) -> Iterator[TrainingSetup]:
    """Yield setups with the batch that the flags set, the fastest first.

    A global batch is divided into as few micro-batches as possible. Gradients are reduced after each of them only where
    that saves memory.
    """
    for sized in _with_given_batch(requirements, setup):
        yield sized
        accumulates_unsharded = sized.config.parallel.fsdp and sized.config.optim.accum_freq > 1 and sized.shards > 1
        if accumulates_unsharded and "accum_reduce" not in requirements.given_flags:
            parallel = replace(sized.config.parallel, accum_reduce="every-micro-batch")
            yield replace(sized, config=replace(sized.config, parallel=parallel))


def _with_given_batch(requirements: Requirements, setup: TrainingSetup) -> Iterator[TrainingSetup]:
    """Yield the setup with the micro-batch size that the flags set, unchanged if they set none.

    For a global batch, yield it with each number of micro-batches, fewer ones first.
    """
    if "batch_size" in requirements.given_flags:
        setup = replace(setup, batch=setup.config.data.batch_size or 1)
    if "global_batch_size" not in requirements.given_flags or "batch_size" in requirements.given_flags:
        yield setup
        return
    total, parts, count = setup.config.data.global_batch_size, setup.layout.data_size, setup.config.optim.accum_freq
    fixed = "accum_freq" in requirements.given_flags
    if total % parts or (fixed and total % (parts * count)):
        raise ConfigError(
            f"--global-batch-size {total} is not divisible by {parts} data-parallel ranks"
            + (f" x --accum-freq {count}" if fixed else "")
        )
    per_rank = total // parts
    for number in [count] if fixed else range(1, per_rank + 1):
        if per_rank % number == 0:
            config = replace(setup.config, optim=replace(setup.config.optim, accum_freq=number))
            yield replace(setup, config=config, batch=per_rank // number)


def _flags(requirements: Requirements, machine: Machine, strategy: str, checkpointing: str) -> list[str]:
    shape = requirements.shape
    sizes = {
        "tensor": _tensor_size(shape, machine),
        "context": _context_size(shape, machine),
        "expert": _expert_size(shape, machine),
    }
    flags = [] if strategy == "given" else STRATEGIES[strategy].format(**sizes).split()
    if checkpointing != "none" and not requirements.given_flags & {"grad_checkpointing", "activation_checkpointing"}:
        flags += ["--activation-checkpointing", checkpointing]
    if "precision" not in requirements.given_flags:
        flags += ["--precision", "amp_bfloat16"]
        is_sharded = "--fsdp" in flags or requirements.config.parallel.fsdp
        if is_sharded and not requirements.given_flags & {"fsdp_amp", "fsdp_pure_bf16"}:
            flags.append("--fsdp-amp")
    return flags


def _tensor_size(shape: ModelShape, machine: Machine) -> int:
    """Return the largest tensor-parallel size up to the devices of a node that divides heads and hidden features."""
    sizes = (size for size in range(min(machine.per_node, machine.devices), 1, -1) if machine.devices % size == 0)
    return next((size for size in sizes if not _tensor_problem(shape, size)), 2)


def _context_size(shape: ModelShape, machine: Machine) -> int:
    sizes = (size for size in range(2, machine.per_node + 1) if machine.devices % size == 0)
    return next((size for size in sizes if shape.seq_len % (2 * size) == 0), 2)


def _expert_size(shape: ModelShape, machine: Machine) -> int:
    """Return the largest expert-parallel size up to the devices of a node that divides the experts."""
    common = math.gcd(max(1, shape.moe_num_experts), machine.devices)
    return next(size for size in range(min(machine.per_node, common), 0, -1) if common % size == 0)


def _tensor_problem(shape: ModelShape, size: int) -> str:
    """Return what `size` does not divide, "" if nothing. Mirrors parallel.tensor_parallel."""
    widths = {"heads": shape.n_heads, "hidden features of the feed-forward network": shape.hidden}
    if shape.moe_freq:
        widths["hidden features of the experts"] = shape.moe_ffn_dim
    return " and ".join(f"{width} {name}" for name, width in widths.items() if width % size)


def _check(shape: ModelShape, layout: MeshLayout, strategy: str, machine: Machine) -> None:
    if machine.devices == 1 and strategy not in (*SINGLE_DEVICE_STRATEGIES, "given"):
        raise ConfigError("needs more than one device")
    if machine.devices > 1 and strategy == "single":
        raise ConfigError("works only on one device")
    if problem := _tensor_problem(shape, layout.tensor):
        raise ConfigError(
            f"--tensor-parallel {layout.tensor}: the model has {problem}, which is not divisible by {layout.tensor}"
        )
    if shape.seq_len % (2 * layout.context) and layout.context > 1:
        raise ConfigError(
            f"--context-parallel {layout.context}: the sequence length {shape.seq_len} is not divisible by "
            f"{2 * layout.context}"
        )
    if layout.expert > 1 and not shape.moe_num_experts:
        raise ConfigError(f"--expert-parallel {layout.expert}: the model has no mixture of experts; set --moe-freq")
    if shape.moe_num_experts % layout.expert:
        raise ConfigError(indivisible_experts(shape.moe_num_experts, layout.expert))
    if strategy == "expert" and layout.expert == 1:
        raise ConfigError(f"{shape.moe_num_experts} experts and {machine.devices} devices have no common divisor")
    if strategy == "hybrid" and layout.replicate == 1:
        raise ConfigError("needs more than one node")
