"""Format a plan as text or as JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.config.devices import tdp_watts
from open_lm.planner.checkpoints import Checkpoints
from open_lm.planner.costs import Cost, cheapest, cost_of
from open_lm.planner.memory import FRAGMENTATION, host_bytes
from open_lm.planner.shapes import ModelShape
from open_lm.planner.strategies import Machine, Option
from open_lm.planner.traffic import Rates

GB = 1e9
DAY_S = 86400


@dataclass(frozen=True)
class Plan:
    """A training plan.

    Attributes:
        shape: the model.
        machine: the devices.
        rates: the speed of devices and links.
        rates_from: the origin of `rates`, for the report.
        options: all evaluated options on the machine.
        recommended: the option to use; None if none fits.
        growth: an option by number of devices and strategy.
        max_exposed: the share of a step that may wait for communication.
        train_tokens: total number of training tokens.
        price_per_device_hour: the price of a device hour.
        checkpoints: the checkpoints of the training; None if its length is unknown.
    """

    shape: ModelShape
    machine: Machine
    rates: Rates
    rates_from: str
    options: Sequence[Option]
    recommended: Option | None
    growth: Mapping[int, Mapping[str, Option]]
    max_exposed: float
    train_tokens: int | None = None
    price_per_device_hour: float | None = None
    checkpoints: Checkpoints | None = None

    @property
    def cheapest(self) -> Option | None:
        """The fitting option with the fewest device hours, among all numbers of devices; None if none fits."""
        return cheapest([*self.options, *(option for row in self.growth.values() for option in row.values())])

    def cost(self, option: Option | None) -> Cost | None:
        """Return what the run costs with an option; None if its length is unknown."""
        if option is None or self.train_tokens is None:
            return None
        return cost_of(option, self.train_tokens, tdp_watts(self.machine.name), self.price_per_device_hour)


def format_plan(plan: Plan) -> str:
    """Return the text that the command prints."""
    parts = [_heading(plan), _memory_table(plan.options)]
    if problems := _problems(plan.options):
        parts.append(problems)
    parts.append(_recommendation(plan))
    if plan.checkpoints is not None:
        parts.append(_checkpoint_table(plan.checkpoints))
    if plan.growth:
        parts.append(_growth_table(plan))
    if plan.recommended is not None:
        command = plan.recommended.command()
        parts.append(f"Command (add the data with --train-data or --dataset-manifest):\n  {command}")
    return "\n\n".join(parts)


def plan_values(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON-serializable values."""
    return {
        "model": plan.shape.name,
        "parameters": plan.shape.num_params,
        "flops_per_token": plan.shape.flops_per_token,
        "kv_cache_bytes_per_token": 2 * plan.shape.kv_cache_values,  # in bfloat16
        "machine": vars(plan.machine),
        "rates": vars(plan.rates),
        "options": [_option_values(option) for option in plan.options],
        "recommended": None if plan.recommended is None else _option_values(plan.recommended),
        "cost": _cost_values(plan.cost(plan.recommended)),
        "cheapest": None if plan.cheapest is None else _option_values(plan.cheapest),
        "cheapest_devices": None if plan.cheapest is None else plan.cheapest.machine.devices,
        "cheapest_cost": _cost_values(plan.cost(plan.cheapest)),
        "checkpoints": None if plan.checkpoints is None else vars(plan.checkpoints),
        "growth": {
            str(devices): {name: _option_values(option) for name, option in row.items()}
            for devices, row in plan.growth.items()
        },
    }


def _cost_values(cost: Cost | None) -> dict[str, float | None] | None:
    return None if cost is None else dict(vars(cost))


def _option_values(option: Option) -> dict[str, Any]:
    names: dict[str, Any] = {"strategy": option.strategy, "activation_checkpointing": option.checkpointing}
    if option.problem or option.time is None or option.setup is None:
        return {**names, "problem": option.problem}
    time = option.time
    return {
        **names,
        "fits": option.fits,
        "batch_size": option.batch,
        "largest_batch_size": option.largest,
        "bytes": dict(option.memory.items()) | {"total": option.memory.total, "host": host_bytes(option.setup)},
        "peak": option.memory.phase,
        "step_s": time.seconds,
        "compute_s": time.compute_s,
        "exchange_s": time.exchange_s,
        "exposed_s": time.exposed_s,
        "muon_s": time.muon_s,
        "exchanged_bytes": time.num_bytes,
        "tokens_per_second": time.tokens_per_s,
        "command": option.command(),
    }


def _heading(plan: Plan) -> str:
    shape, machine, rates = plan.shape, plan.machine, plan.rates
    return "\n".join([
        f"{shape.name}: {shape.num_params / 1e9:.3f} billion parameters, {shape.flops_per_token / 1e9:.2f} GFLOP per "
        f"token, sequence length {shape.seq_len}",
        f"{machine.devices} x {machine.name} with {machine.memory_bytes / GB:.0f} GB, {machine.per_node} per node",
        f"{rates.matmul_flops / 1e12:.0f} TFLOP/s per device, {rates.mfu:.0%} MFU ({plan.rates_from}); "
        f"{rates.intra / GB:.0f} GB/s per device within a node, {rates.inter / GB:.0f} GB/s per node between nodes",
    ])  # fmt: skip


def _memory_table(options: Sequence[Option]) -> str:
    heads = "strategy recompute batch params gathered grads optim activ loss reserve total fits largest tokens/s"
    rows = [tuple(heads.split())]
    for option in options:
        if option.problem or option.time is None or option.setup is None:
            continue
        sizes = [f"{value / GB:.1f}" for _, value in option.memory.items()]
        speed = f"{option.time.tokens_per_s:,.0f}" if option.fits else ""
        rows.append((option.strategy, option.checkpointing, str(option.batch), *sizes,
                     f"{option.memory.total / GB:.1f}", "yes" if option.fits else "no", str(option.largest),
                     speed))  # fmt: skip
    note = (
        "GB per device at the peak of a step. params: local shards of the parameters. gathered: unsharded or cast\n"
        "parameters in use. activ: activations for the backward pass. loss: the logits of a chunk and the gradients\n"
        f"of the loss. reserve: CUDA, NCCL and {FRAGMENTATION:.0%} for fragmentation (assumed).\n"
        "batch: sequences per micro-batch and device. largest: the largest batch that fits."
    )
    return f"{align_columns(rows, left=2)}\n{note}"


def _problems(options: Iterable[Option]) -> str:
    problems = dict.fromkeys(f"{option.strategy}: {option.problem}" for option in options if option.problem)
    return "\n".join(f"Not possible: {problem}" for problem in problems)


def _recommendation(plan: Plan) -> str:
    option = plan.recommended
    if option is None or option.time is None or option.setup is None:
        return "Nothing fits: use more devices, devices with more memory, or a smaller --batch-size."
    time = option.time
    lines = [
        f"Recommended: {option.strategy}, activation checkpointing {option.checkpointing}, {option.batch} sequences "
        f"per device, {option.global_batch} per step",
        f"  {time.seconds:.2f} s per step ({time.compute_s:.2f} s computation, {time.exposed_s:.2f} s exposed "
        f"communication{f', {time.host_s:.2f} s update in host memory' if time.host_s else ''}), "
        f"{time.tokens_per_s:,.0f} tokens/s, {time.tokens_per_s * DAY_S / 1e9:.2f} billion tokens per day",
    ]
    if time.muon_s:
        lines.append(
            f"  {time.muon_s:.2f} s of it orthogonalize Muon's updates, {time.muon_s / time.compute_s:.0%} of the "
            "model's computation; larger batches reduce this share"
        )
    if host := host_bytes(option.setup):
        lines.append(f"  {host / GB:.1f} GB of host memory per device")
    if cost := plan.cost(option):
        assert plan.train_tokens is not None
        lines += [
            f"  {plan.train_tokens / 1e9:,.1f} billion tokens take {cost.seconds / DAY_S:,.1f} days",
            f"  {_cost_text(cost, plan)}",
        ]
    best = plan.cheapest
    if plan.price_per_device_hour is not None and best is not None and (cost := plan.cost(best)):
        lines.append(
            f"Cheapest on {plan.machine.devices} to {max(plan.growth, default=plan.machine.devices)} devices: "
            f"{best.strategy} on {best.machine.devices}, activation checkpointing {best.checkpointing}, {best.batch} "
            f"sequences per device, {best.global_batch} per step: {cost.seconds / DAY_S:,.1f} days, "
            f"{_cost_text(cost, plan)}"
        )
    return "\n".join(lines)


def _cost_text(cost: Cost, plan: Plan) -> str:
    """Return device hours, energy and price as text."""
    parts = [f"{cost.device_hours:,.0f} device hours"]
    if cost.kwh is not None:
        energy = f"{cost.kwh / 1000:,.1f} MWh" if cost.kwh >= 1000 else f"{cost.kwh:,.0f} kWh"
        parts.append(f"at most {energy} ({tdp_watts(plan.machine.name):.0f} W per device)")
    if cost.price is not None:
        parts.append(f"price {cost.price:,.0f}")
    return ", ".join(parts)


def _checkpoint_table(checkpoints: Checkpoints) -> str:
    lines = ["Checkpoints:"]
    if checkpoints.sharded:
        size = f"{checkpoints.sharded_bytes / GB:.1f} GB"
        lines.append(f"  step_N folders: {checkpoints.sharded} of {size}, {checkpoints.sharded_kept} kept")
    if checkpoints.files:
        size = f"{checkpoints.files_bytes / GB:.1f} GB"
        lines.append(f"  epoch_N.pt and optimizer_N.pt: {checkpoints.files} of {size}, {checkpoints.files_kept} kept")
    lines.append(f"  disk: {checkpoints.disk_bytes / GB:,.1f} GB")
    return "\n".join(lines)


def _growth_table(plan: Plan) -> str:
    """Return the table of bytes sent, exposed communication and efficiency of a step by number of devices."""
    rows = [("devices", "strategy", "batch", "GB sent", "compute s", "comm. s", "exposed s", "efficiency", "tokens/s")]
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
        "More devices (per step; GB sent: by each device; comm.: communication; exposed: not overlapped):\n"
        f"{align_columns(rows, left=2)}\n" + "\n".join(f"  {name}: {_scaling_limit(name, plan)}" for name in names)
    )


def _scaling_limit(name: str, plan: Plan) -> str:
    """Return the number of devices that a strategy scales to, and the exposed communication beyond."""
    fitting = [(devices, row[name]) for devices, row in plan.growth.items() if name in row and row[name].fits]
    scales = 0
    for devices, option in fitting:
        assert option.time is not None
        share = option.time.exposed_s / option.time.seconds
        if share > plan.max_exposed:
            prefix = f"scales to {scales} devices; " if scales else ""
            return f"{prefix}on {devices} devices, {share:.0%} of a step waits for communication"
        scales = devices
    return f"scales to {scales} devices" if scales else "does not fit on any number of devices"


def align_columns(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return rows with aligned columns: the first `left` columns left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
