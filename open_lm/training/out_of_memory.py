"""Turn an exhausted memory into an error that names settings which need less, from the planner."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from open_lm.config.checks import only_evaluates
from open_lm.config.devices import links_of, peak_16_bit_flops
from open_lm.config.layout import MeshLayout
from open_lm.config.sections import Config
from open_lm.distributed.processes import ALLOCATOR_NAMES, Runtime
from open_lm.errors import ConfigError, UserError
from open_lm.monitor.exhausted_memory import OutOfMemory, is_out_of_memory
from open_lm.monitor.watchdog import position
from open_lm.planner.efficiency import efficiency_of
from open_lm.planner.memory import Memory, add_reserve, peak
from open_lm.planner.setup import TrainingSetup
from open_lm.planner.shapes import shape_of
from open_lm.planner.strategies import Machine, Option, Requirements, evaluate_options
from open_lm.planner.traffic import Rates, step_time

# Flags that the advice may change; it keeps the model, the global batch and the precision.
_LAYOUT_FLAGS = (
    *("fsdp", "fsdp_hybrid", "fsdp_hybrid_o2", "fsdp_zero2", "fsdp_cpu_offload"),
    *("tensor_parallel", "context_parallel", "expert_parallel", "mesh_dim"),
)
_MEMORY_FLAGS = ("grad_checkpointing", "activation_checkpointing", "accum_freq", "accum_reduce", "batch_size")
_NUM_ADVICE = 4
_MARGIN = 0.9  # of the planned memory that did not fit, where the planner expected that it does


@contextmanager
def explained_out_of_memory(
    config: Config, layout: MeshLayout, runtime: Runtime, write_snapshot: Callable[[str], str | None]
) -> Iterator[None]:
    """Raise OutOfMemory with advice in place of an error of an allocator in the `with` block.

    Args:
        config, layout, runtime: the run and this rank.
        write_snapshot: writes a snapshot of the memory by its name and returns its path, if it can.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        snapshot = write_snapshot("memory_exhausted")
        reason = str(error).partition("\n")[0] or type(error).__name__
        lines = [f"the memory of rank {runtime.rank} is exhausted {position()}: {reason}", _usage(runtime)]
        lines.append("" if snapshot is None else f"The snapshot {snapshot} shows what it holds.")
        lines += _advice_or_hint(config, layout, runtime)
        raise OutOfMemory("\n".join(line for line in lines if line)) from error


def _advice_or_hint(config: Config, layout: MeshLayout, runtime: Runtime) -> list[str]:
    if only_evaluates(config):
        return [f"Lower --global-val-batch-size, which is {config.validation.global_val_batch_size}."]
    try:
        return advice(config, layout, runtime)
    except Exception as failure:  # must not hide the error
        logging.debug(f"no advice: {failure}")
        return ["Raise --accum-freq, set --activation-checkpointing op, or use more devices with --fsdp."]


def advice(config: Config, layout: MeshLayout, runtime: Runtime) -> list[str]:
    """Return what the planner predicts for the run, and settings with the same global batch that need less memory.

    Raises:
        ConfigError: the planner does not know the model.
    """
    capacity = _capacity(runtime)
    device_type = runtime.device.type
    shape = shape_of(config.model)
    micro_batch = config.data.global_batch_size // (layout.data_size * config.optim.accum_freq)
    current = TrainingSetup(shape, config, layout, micro_batch, device_type)
    memory = _memory(current)
    machine = Machine(runtime.world_size, capacity, runtime.local_world_size, _device_name(runtime))
    rates = _rates(machine, efficiency_of(machine.name).mfu(shape, config.model.torchcompile))
    # If the planner expected that it fits, only settings that need clearly less are advice.
    machine = replace(machine, memory_bytes=min(capacity, round(_MARGIN * memory.total)))
    speed = step_time(current, rates).tokens_per_s
    options = [option for option in _options(config, machine, rates) if option.fits and option.time is not None]
    options.sort(key=lambda option: -option.time.tokens_per_s if option.time else 0.0)
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in memory.items() if size)
    lines = [f"The planner predicts {_gib(memory.total)} in the {memory.phase} phase ({parts}) of {_gib(capacity)}."]
    if not options:
        return [*lines, "No setting with the same global batch fits: use more devices, or devices with more memory."]
    lines.append("Settings with the same global batch that need less (planner's estimates), the fastest first:")
    current_flags = changed_flags(config)
    seen: set[str] = set()
    for option in options:
        change = _difference(option, current_flags)
        if change and change not in seen and len(seen) < _NUM_ADVICE:
            seen.add(change)
            assert option.time is not None
            slower = 1 - option.time.tokens_per_s / speed
            cost = f"{slower:.0%} slower" if slower > 0.005 else "equally fast"
            lines.append(f"  {change}: {_gib(option.memory.total)}, about {cost}")
    return [*lines, "Start again with the new flags and --resume latest, which continues from the newest checkpoint."]


def _options(config: Config, machine: Machine, rates: Rates) -> list[Option]:
    """Return the ways to compute the run: with its own layout, and with the layouts of the planner."""
    options: list[Option] = []
    fixed = {"global_batch_size", "precision"}
    for leave_out, names in ((_MEMORY_FLAGS, ["given"]), ((*_MEMORY_FLAGS, *_LAYOUT_FLAGS), [])):
        flags = changed_flags(config, leave_out)
        words = [word for values in flags.values() for word in values]
        given = frozenset({*flags, *fixed} - {"batch_size"})
        words += ["--precision", config.precision.precision]
        words += ["--global-batch-size", str(config.data.global_batch_size)]
        requirements = Requirements(tuple(words), given)
        with suppress(ConfigError):  # such as a layout that the number of ranks does not allow
            options += evaluate_options(requirements, machine, rates, names)
    return options


def changed_flags(config: Config, leave_out: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the words of the command line that set what the planner reads and that differ from the defaults."""
    sections = (config.model, config.adapters, config.optim, config.parallel, config.precision)
    left_out = {*leave_out, "precision"}
    flags: dict[str, list[str]] = {}
    for section in sections:
        for spec in section.specs():
            value = getattr(section, spec.name)
            if value == spec.default or spec.no_effect or spec.name in left_out:
                continue
            if spec.kind is bool:
                flags[spec.name] = [spec.flag if value else f"--no-{spec.flag[2:]}"]
            else:
                flags[spec.name] = [spec.flag, *map(str, value if isinstance(value, list) else [value])]
    return flags


def _difference(option: Option, current: Mapping[str, Sequence[str]]) -> str:
    """Return the flags to add and to remove; "" for none."""
    assert option.setup is not None
    target = changed_flags(option.setup.config)
    added = [" ".join(words) for name, words in target.items() if list(current.get(name, ())) != list(words)]
    removed = [words[0] for name, words in current.items() if name not in target]
    return " ".join(added) + (f" without {' '.join(removed)}" if removed else "")


def _memory(setup: TrainingSetup) -> Memory:
    return add_reserve(peak(setup), setup) if setup.device_type == "cuda" else peak(setup)


def _rates(machine: Machine, mfu: float) -> Rates:
    """Return the rates of a device; those of an unknown one are arbitrary, since only their ratios matter here."""
    links = links_of(machine.name)
    flops = peak_16_bit_flops(machine.name) or 100e12
    return Rates(matmul_flops=flops, mfu=mfu, intra=links.intra, inter=links.inter, per_node=machine.per_node)


def _device_name(runtime: Runtime) -> str:
    return torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "cpu"


def _capacity(runtime: Runtime) -> int:
    """Return the bytes of a rank's device; on CPU its share of the machine, or the limit of the process."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // runtime.local_world_size
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return total if limit == resource.RLIM_INFINITY else min(total, limit)


def _usage(runtime: Runtime) -> str:
    """Describe the memory in use on CUDA."""
    if runtime.device.type != "cuda":
        return ""
    statistics: dict[str, Any] = torch.cuda.memory_stats(runtime.device)
    allocated, reserved = statistics["allocated_bytes.all.current"], statistics["reserved_bytes.all.current"]
    text = (
        f"Allocated {_gib(allocated)} (peak {_gib(statistics['allocated_bytes.all.peak'])}), reserved "
        f"{_gib(reserved)} of {_gib(_capacity(runtime))}."
    )
    if reserved - allocated > 0.1 * reserved:
        text += f" The allocator could not use the other {_gib(reserved - allocated)} that it has reserved."
        text += _allocator_advice()
    return text


def _allocator_advice() -> str:
    """Return how to avoid fragmentation if a setting of the user replaces that of `select_device`; "" otherwise."""
    name = next((name for name in ALLOCATOR_NAMES if name in os.environ), None)
    if name is None or "expandable_segments:true" in os.environ[name].lower():
        return ""
    return f" {name} replaces the default expandable_segments:True, which avoids fragmentation; add it there."


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
