"""A plan as text and as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.planner.checkpoints import Checkpoints
from open_lm.planner.memory import FRAGMENTATION, host_bytes
from open_lm.planner.shapes import ModelShape
from open_lm.planner.strategies import Machine, Option
from open_lm.planner.traffic import Rates

GB = 1e9
DAY_S = 86400


@dataclass(frozen=True)
class Plan:
    """All that is said: `found` on the machine, `chosen` of it, `growth` by number of devices and strategy."""

    shape: ModelShape
    machine: Machine
    rates: Rates
    rates_from: str
    found: Sequence[Option]
    chosen: Option | None
    growth: Mapping[int, Mapping[str, Option]]
    max_exposed: float
    train_tokens: int | None = None
    checkpoints: Checkpoints | None = None


def text(plan: Plan) -> str:
    """What the command prints."""
    parts = [_heading(plan), _memory_table(plan.found)]
    if problems := _problems(plan.found):
        parts.append(problems)
    parts.append(_recommended(plan))
    if plan.checkpoints is not None:
        parts.append(_disk(plan.checkpoints))
    if plan.growth:
        parts.append(_growth_table(plan))
    if plan.chosen is not None:
        parts.append(f"To start it, with data (--train-data or --dataset-manifest):\n  {plan.chosen.command()}")
    return "\n\n".join(parts)


def values(plan: Plan) -> dict[str, Any]:
    """The same, JSON-able."""
    return {
        "model": plan.shape.name,
        "parameters": plan.shape.num_params,
        "flops_per_token": plan.shape.flops_per_token,
        "machine": vars(plan.machine),
        "rates": vars(plan.rates),
        "options": [_option_values(option) for option in plan.found],
        "recommended": None if plan.chosen is None else _option_values(plan.chosen),
        "checkpoints": None if plan.checkpoints is None else vars(plan.checkpoints),
        "growth": {
            str(devices): {name: _option_values(option) for name, option in row.items()}
            for devices, row in plan.growth.items()
        },
    }


def _option_values(option: Option) -> dict[str, Any]:
    found: dict[str, Any] = {"strategy": option.strategy, "activation_checkpointing": option.checkpointing}
    if option.problem or option.time is None or option.job is None:
        return {**found, "problem": option.problem}
    time = option.time
    return {
        **found,
        "fits": option.fits,
        "batch_size": option.batch,
        "largest_batch_size": option.largest,
        "bytes": dict(option.memory.items()) | {"total": option.memory.total, "host": host_bytes(option.job)},
        "peak": option.memory.phase,
        "step_s": time.seconds,
        "compute_s": time.compute_s,
        "exchange_s": time.exchange_s,
        "exposed_s": time.exposed_s,
        "exchanged_bytes": time.num_bytes,
        "tokens_per_second": time.tokens_per_s,
        "command": option.command(),
    }


def _heading(plan: Plan) -> str:
    shape, machine, rates = plan.shape, plan.machine, plan.rates
    return "\n".join([
        f"{shape.name}: {shape.num_params / 1e9:.3f} billion parameters, {shape.flops_per_token / 1e9:.2f} GFLOP a "
        f"token, sequences of {shape.seq_len} tokens",
        f"{machine.devices} x {machine.name} with {machine.memory_bytes / GB:.0f} GB, {machine.per_node} in a node",
        f"{rates.matmul_flops / 1e12:.0f} TFLOP/s of matrix products at {rates.mfu:.0%} MFU ({plan.rates_from}); "
        f"{rates.intra / GB:.0f} GB/s of a device inside a node, {rates.inter / GB:.0f} GB/s of a node",
    ])  # fmt: skip


def _memory_table(found: Sequence[Option]) -> str:
    heads = "strategy recompute batch params gathered grads optim activ loss reserve total fits largest tokens/s"
    rows = [tuple(heads.split())]
    for option in found:
        if option.problem or option.time is None or option.job is None:
            continue
        sizes = [f"{value / GB:.1f}" for _, value in option.memory.items()]
        speed = f"{option.time.tokens_per_s:,.0f}" if option.fits else ""
        rows.append((option.strategy, option.checkpointing, str(option.batch), *sizes,
                     f"{option.memory.total / GB:.1f}", "yes" if option.fits else "no", str(option.largest),
                     speed))  # fmt: skip
    note = (
        "GB of a device at the peak of a step. gathered: parameters gathered or cast for use. activ: what\n"
        "the backward pass needs. loss: a chunk of logits, and its gradients. reserve: CUDA, NCCL and "
        f"{FRAGMENTATION:.0%} for fragmentation (assumed).\n"
        "batch: sequences of a micro-batch on a device. largest: the most that fit."
    )
    return f"{aligned(rows, left=2)}\n{note}"


def _problems(found: Iterable[Option]) -> str:
    said = dict.fromkeys(f"{option.strategy}: {option.problem}" for option in found if option.problem)
    return "\n".join(f"Not possible: {problem}" for problem in said)


def _recommended(plan: Plan) -> str:
    option = plan.chosen
    if option is None or option.time is None or option.job is None:
        return "Nothing fits: take more devices, devices with more memory, or a smaller --batch-size."
    time = option.time
    lines = [
        f"Recommended: {option.strategy}, activation checkpointing {option.checkpointing}, {option.batch} sequences on "
        f"a device, {option.global_batch} in a step",
        f"  {time.seconds:.2f} s a step ({time.compute_s:.2f} computing, {time.exposed_s:.2f} waiting for exchange"
        f"{f', {time.host_s:.2f} updating in host memory' if time.host_s else ''}), {time.tokens_per_s:,.0f} tokens/s, "
        f"{time.tokens_per_s * DAY_S / 1e9:.2f} billion tokens a day",
    ]
    if host := host_bytes(option.job):
        lines.append(f"  {host / GB:.1f} GB of host memory for each device")
    if plan.train_tokens:
        days = plan.train_tokens / time.tokens_per_s / DAY_S
        lines.append(f"  {plan.train_tokens / 1e9:,.1f} billion tokens take {days:,.1f} days")
    return "\n".join(lines)


def _disk(found: Checkpoints) -> str:
    lines = ["Checkpoints:"]
    if found.sharded:
        lines.append(
            f"  step_N folders: {found.sharded} of {found.sharded_bytes / GB:.1f} GB, {found.sharded_kept} kept"
        )
    if found.files:
        size = f"{found.files_bytes / GB:.1f} GB"
        lines.append(f"  epoch_N.pt and optimizer_N.pt: {found.files} of {size}, {found.files_kept} kept")
    lines.append(f"  disk: {found.disk_bytes / GB:,.1f} GB")
    return "\n".join(lines)


def _growth_table(plan: Plan) -> str:
    """By number of devices: what a step exchanges, for how long nothing is computed, and what is left of the speed."""
    rows = [
        ("devices", "strategy", "batch", "GB sent", "compute s", "exchange s", "exposed s", "efficiency", "tokens/s")
    ]
    for devices, row in plan.growth.items():
        for name, option in row.items():
            if option.time is None or not option.fits:
                rows.append((str(devices), name, *("",) * 6, "does not fit" if not option.problem else "not possible"))
                continue
            time = option.time
            rows.append((str(devices), name, str(option.batch), f"{time.num_bytes / GB:.1f}", f"{time.compute_s:.2f}",
                         f"{time.exchange_s:.2f}", f"{time.exposed_s:.2f}", f"{time.efficiency:.0%}",
                         f"{time.tokens_per_s:,.0f}"))  # fmt: skip
    names = dict.fromkeys(name for row in plan.growth.values() for name in row)
    return (
        "More devices, a step of each (GB that a device sends; exchange that nothing hides is exposed):\n"
        f"{aligned(rows, left=2)}\n" + "\n".join(f"  {name}: {_end(name, plan)}" for name in names)
    )


def _end(name: str, plan: Plan) -> str:
    """To how many devices a strategy scales, and what comes then."""
    fitting = [(devices, row[name]) for devices, row in plan.growth.items() if name in row and row[name].fits]
    scales = 0
    for devices, option in fitting:
        assert option.time is not None
        share = option.time.exposed_s / option.time.seconds
        if share > plan.max_exposed:
            before = f"scales to {scales}; on " if scales else "on "
            return f"{before}{devices}, {share:.0%} of a step waits for exchange"
        scales = devices
    return f"scales to {scales}" if scales else "fits nowhere"


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns of equal width, the first `left` of them flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
