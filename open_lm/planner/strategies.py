"""Ways to spread a training over devices: flags of the trainer by name, and which of them is best for a purpose."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from open_lm.config.command_line import parse_args
from open_lm.config.layout import Layout, layout_of
from open_lm.config.sections import Config
from open_lm.errors import ConfigError
from open_lm.planner.memory import Job, Memory, peak, with_reserve
from open_lm.planner.shapes import ModelShape, shape_of
from open_lm.planner.traffic import Rates, StepTime, step_time

# {tensor}, {context}: ranks that fit the model. "given": what the flags already say.
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
}
AS_FAST = 0.995
CHECKPOINTING = ("none", "op", "2", "full")
_CHOOSING = {"fsdp", "tensor_parallel", "context_parallel", "mesh_dim"}
ALONE = ("single", "offload")  # what there is for one device


@dataclass(frozen=True)
class Machine:
    """Devices that a plan is made for: so many, with so many bytes each, so many in a node."""

    devices: int
    memory_bytes: int
    per_node: int
    name: str

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.per_node)


@dataclass(frozen=True)
class Option:
    """One way to train, with what it takes. batch: sequences of a micro-batch on a device, the given or the largest;
    largest: the most that fit. problem: why it cannot be."""

    strategy: str
    checkpointing: str
    flags: tuple[str, ...]
    machine: Machine
    batch: int = 0
    largest: int = 0
    job: Job | None = None
    memory: Memory = Memory()
    time: StepTime | None = None
    problem: str = ""

    @property
    def fits(self) -> bool:
        return not self.problem and 0 < self.batch <= self.largest

    @property
    def global_batch(self) -> int:
        assert self.job is not None
        return self.batch * self.job.config.optim.accum_freq * self.job.layout.data_size

    def command(self) -> str:
        """The command line that starts it; the trainer's own parser has taken these flags."""
        machine = self.machine
        nodes = f"--nnodes {machine.nodes} --rdzv-backend c10d --rdzv-endpoint NODE:29400 " if machine.nodes > 1 else ""
        start = f"torchrun {nodes}--nproc-per-node {min(machine.devices, machine.per_node)} -m open_lm.main"
        return f"{start if machine.devices > 1 else 'python -m open_lm.main'} {shlex.join(self.flags)}"


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for beside the machine: the trainer's flags with the names of those it states."""

    flags: tuple[str, ...]
    stated: frozenset[str]

    @cached_property
    def config(self) -> Config:
        return Config.from_namespace(parse_args(self.flags))

    @cached_property
    def shape(self) -> ModelShape:
        return shape_of(self.config.model)

    def strategies(self, machine: Machine) -> list[str]:
        """Those for so many devices, or the one that the flags state."""
        if self.states_strategy:
            return ["given"]
        return [name for name in STRATEGIES if (name in ALONE if machine.devices == 1 else name != "single")]

    @property
    def states_strategy(self) -> bool:
        return bool(self.stated & _CHOOSING)

    def checkpointing(self) -> list[str]:
        model = self.config.model
        if self.stated & {"grad_checkpointing", "activation_checkpointing"}:
            return ["full" if model.grad_checkpointing else model.activation_checkpointing]
        return list(CHECKPOINTING)


def options(wishes: Wishes, machine: Machine, rates: Rates, names: Sequence[str] = ()) -> list[Option]:
    """Every strategy with every kind of activation checkpointing, with what it takes on the machine."""
    return [
        option(wishes, machine, rates, name, checkpointing)
        for name in names or wishes.strategies(machine)
        for checkpointing in wishes.checkpointing()
    ]


def option(wishes: Wishes, machine: Machine, rates: Rates, strategy: str, checkpointing: str) -> Option:
    """One of them. What the machine or the trainer cannot do becomes its `problem`."""
    found, tried = Option(strategy, checkpointing, (), machine), ""
    try:
        flags = (*wishes.flags, *_flags(wishes, machine, strategy, checkpointing))
        config = Config.from_namespace(parse_args(flags))
        layout = layout_of(config.parallel, machine.devices, min(machine.per_node, machine.devices))
        _check(wishes.shape, layout, strategy, machine)
        job = _with_batch(wishes, Job(wishes.shape, config, layout, 1), machine.memory_bytes)
        if (count := job.config.optim.accum_freq) != config.optim.accum_freq:
            flags += ("--accum-freq", str(count))
            tried = f"with --accum-freq {count}, to fit: "
        if not wishes.stated & {"batch_size", "global_batch_size"}:
            flags += ("--batch-size", str(job.batch))
        job = replace(job, config=Config.from_namespace(parse_args(flags)))  # as the trainer will understand them
    except ConfigError as error:
        return replace(found, problem=f"{tried}{error}")
    return replace(
        found,
        flags=flags,
        batch=job.batch,
        largest=largest_batch(lambda batch: _fits(replace(job, batch=batch), machine.memory_bytes)),
        job=job,
        memory=with_reserve(peak(job), job),
        time=step_time(job, rates),
    )


def best(found: Sequence[Option]) -> Option | None:
    """The fastest that fits, of those that are as fast the one that needs least memory; None where none fits."""
    speeds = {id(item): item.time.tokens_per_s for item in found if item.fits and item.time is not None}
    as_fast = [item for item in found if speeds.get(id(item), 0.0) >= AS_FAST * max(speeds.values(), default=1.0)]
    return min(as_fast, key=lambda item: item.memory.total, default=None)


def largest_batch(fits: Callable[[int], bool], most: int = 1 << 14) -> int:
    """The largest number up to `most` that fits, 0 for none; what fits with more fits with less."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(job: Job, memory_bytes: int) -> bool:
    return with_reserve(peak(job), job).total <= memory_bytes


def _with_batch(wishes: Wishes, job: Job, memory_bytes: int) -> Job:
    """The job with the batch that the flags state, in as few micro-batches as fit; else with the largest that fits."""
    if "batch_size" in wishes.stated:
        return replace(job, batch=job.config.data.batch_size or 1)
    if "global_batch_size" not in wishes.stated:
        return replace(job, batch=largest_batch(lambda batch: _fits(replace(job, batch=batch), memory_bytes)) or 1)
    total, parts, count = job.config.data.global_batch_size, job.layout.data_size, job.config.optim.accum_freq
    fixed = "accum_freq" in wishes.stated
    if total % parts or (fixed and total % (parts * count)):
        raise ConfigError(
            f"--global-batch-size {total} does not divide into {parts} ranks with rows of their own"
            + (f" x --accum-freq {count}" if fixed else "")
        )
    rows = total // parts
    counts = [count] if fixed else [count for count in range(1, rows + 1) if rows % count == 0]
    for count in counts:
        config = replace(job.config, optim=replace(job.config.optim, accum_freq=count))
        job = Job(job.shape, config, job.layout, rows // count, job.device_type)
        if _fits(job, memory_bytes):
            break
    return job


def _flags(wishes: Wishes, machine: Machine, strategy: str, checkpointing: str) -> list[str]:
    sizes = {"tensor": _tensor_size(wishes.shape, machine), "context": _context_size(wishes.shape, machine)}
    flags = [] if strategy == "given" else STRATEGIES[strategy].format(**sizes).split()
    if checkpointing != "none" and not wishes.stated & {"grad_checkpointing", "activation_checkpointing"}:
        flags += ["--activation-checkpointing", checkpointing]
    if "precision" not in wishes.stated:
        flags += ["--precision", "amp_bfloat16"]
        is_sharded = "--fsdp" in flags or wishes.config.parallel.fsdp
        if is_sharded and not wishes.stated & {"fsdp_amp", "fsdp_pure_bf16"}:
            flags.append("--fsdp-amp")
    return flags


def _tensor_size(shape: ModelShape, machine: Machine) -> int:
    """As many ranks as a node has, or the most below that the heads and hidden features divide over."""
    sizes = (size for size in range(min(machine.per_node, machine.devices), 1, -1) if machine.devices % size == 0)
    return next((size for size in sizes if not _tensor_problem(shape, size)), 2)


def _context_size(shape: ModelShape, machine: Machine) -> int:
    sizes = (size for size in range(2, machine.per_node + 1) if machine.devices % size == 0)
    return next((size for size in sizes if shape.seq_len % (2 * size) == 0), 2)


def _tensor_problem(shape: ModelShape, size: int) -> str:
    """As tensor_parallel.check_splits."""
    widths = {"heads": shape.n_heads, "hidden features of the feed-forward": shape.hidden}
    if shape.moe_freq:
        widths["hidden features of the experts"] = 4 * shape.dim
    return " and ".join(f"{width} {name}" for name, width in widths.items() if width % size)


def _check(shape: ModelShape, layout: Layout, strategy: str, machine: Machine) -> None:
    if machine.devices == 1 and strategy not in (*ALONE, "given"):
        raise ConfigError("is for several devices")
    if machine.devices > 1 and strategy == "single":
        raise ConfigError("is for one device")
    if problem := _tensor_problem(shape, layout.tensor):
        raise ConfigError(f"--tensor-parallel {layout.tensor}: the model has {problem}, which it does not divide")
    if shape.seq_len % (2 * layout.context) and layout.context > 1:
        raise ConfigError(
            f"--context-parallel {layout.context}: sequences of {shape.seq_len} tokens do not divide into "
            f"{2 * layout.context} chunks"
        )
    if strategy == "hybrid" and layout.replicate == 1:
        raise ConfigError("is for several nodes")
