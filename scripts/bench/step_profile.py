"""Where the time of a training step goes: torch's profile of it, sorted into rooms, forward and backward apart.

Rooms are the model's submodules, by the names that OpenLM's models give them. A backward operation belongs to the room
of the forward operation that it is the gradient of, as the numbers that autograd gives both of them say. Copies and
casts are a room of their own, wherever they happen. What a loss computes of its gradient in the forward pass counts as
forward; blocks that are compiled cannot be looked into and are one room.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

LOSS, COMPILED, OPTIMIZER = "loss and head", "compiled blocks", "optimizer and clipping"
COPIES, OTHER = "casts and copies", "other"
ROOMS = ("attention", "feed-forward", "norms", COMPILED, LOSS, OPTIMIZER, COPIES, OTHER)
_MARK = "room: "
_BACKWARD = "autograd::engine::evaluate_function"
_REGION = "Torch-Compiled Region"  # as torch marks what it compiled
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous")

Times = dict[str, dict[str, float]]  # room -> forward, backward -> seconds


def profile_step(
    step: Callable[[Tensor, Tensor], Any], inputs: Tensor, targets: Tensor, trace: Path | None = None
) -> tuple[Times, float]:
    """Seconds of one step by room and pass, on CUDA those of its kernels, and the step's own seconds. `step.model`,
    where there is one, is what rooms are told apart by. `trace`: also write the profile there, for chrome://tracing or
    perfetto."""
    device = inputs.device
    model: nn.Module = getattr(step, "model", None) or nn.Identity()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _marked(model), profile(activities=activities) as recorded:
        start = time.perf_counter()
        step(inputs, targets)
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - start
    if trace is not None:
        part = trace.with_name(f".part-{trace.name}")  # it keeps the ending, by which torch compresses
        recorded.export_chrome_trace(str(part))
        os.replace(part, trace)
    return _times(recorded.events(), device.type == "cuda"), wall_s


def table(times: Times, wall_s: float) -> str:
    """A line for each room that took any time, in milliseconds."""
    lines = [f"{'milliseconds':26}{'forward':>10}{'backward':>10}{'both':>10}{'share':>8}"]
    outside = wall_s
    for room, passes in times.items():
        both = sum(passes.values())
        outside -= both
        numbers = "".join(f"{1e3 * seconds:10.1f}" for seconds in (passes["forward"], passes["backward"], both))
        lines.append(f"{room:26}{numbers}{both / wall_s:8.1%}")
    lines.append(f"{'outside any operation':46}{1e3 * outside:10.1f}{outside / wall_s:8.1%}")
    return "\n".join([*lines, f"{'the step':46}{1e3 * wall_s:10.1f}"])


# --- marks in the forward pass --------------------------------------------------------------------------------------
def room_of(name: str) -> str | None:
    """The room of a submodule, by its name; None for one that is part of what holds it."""
    last = name.rpartition(".")[2]
    if last in ("attention", "feed_forward"):
        return last.replace("_", "-")
    if last.endswith("norm"):
        return "norms"
    if last == "output":
        return LOSS
    return OTHER if last == "tok_embeddings" or last.isdigit() else None


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """The forward passes of the rooms' modules bear their names in the profile."""
    hooks: list[Any] = []
    open_marks: list[record_function] = []

    def enter(room: str) -> None:
        open_marks.append(record_function(_MARK + room))
        open_marks[-1].__enter__()

    compiled = ""  # the name, with a dot, of a compiled block
    for name, module in model.named_modules():
        room = room_of(name)
        if room is None or (compiled and name.startswith(compiled)):
            continue
        if getattr(module, "_compiled_call_impl", None) is not None:  # hooks would be compiled with it
            compiled = f"{name}."
            continue
        hooks.append(module.register_forward_pre_hook(lambda *_, room=room: enter(room)))
        hooks.append(module.register_forward_hook(lambda *_: open_marks.pop().__exit__(None, None, None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- the profile ----------------------------------------------------------------------------------------------------
def _times(events: Any, cuda: bool) -> Times:
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    last_backward = max((e.time_range.end for e in host if e.name.startswith(_BACKWARD)), default=float("inf"))
    of_forward: dict[tuple[int, int], str] = {}  # thread and autograd's number -> room
    for event in sorted(host, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and _ancestor(event, _BACKWARD) is None:
            of_forward[event.thread, event.sequence_nr] = _room(event) or LOSS
    times: Times = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for event in host:
        micros = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        backward = _ancestor(event, _BACKWARD)
        if _ancestor(event, "Optimizer.") is not None or (backward is None and event.time_range.start > last_backward):
            room = OPTIMIZER
        elif event.name in _COPIES:
            room = COPIES
        elif backward is not None:
            room = _room(event) or of_forward.get((backward.fwd_thread, backward.sequence_nr), OTHER)
        else:
            room = _room(event) or LOSS
        times[room]["forward" if backward is None else "backward"] += micros / 1e6
    return {room: times[room] for room in ROOMS if sum(times[room].values()) > 0}


def _room(event: Any) -> str | None:
    """The innermost room that the event lies in."""
    mark = _ancestor(event, _MARK, _REGION)
    if mark is None:
        return None
    return COMPILED if mark.name.startswith(_REGION) else str(mark.name.removeprefix(_MARK))


def _ancestor(event: Any, *beginnings: str) -> Any:
    """The innermost event that holds this one, or itself, and whose name so begins; or None."""
    while event is not None and not event.name.startswith(beginnings):
        event = event.cpu_parent
    return event
