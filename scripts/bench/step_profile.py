"""Profile a training step with torch and sum its time by category, separately for the forward and backward pass.

Most categories are submodules of the model, recognized by the names that OpenLM's models give them. A backward
operation belongs to the category of its forward operation, which autograd's sequence numbers identify. Copies and casts
are a separate category, wherever they occur. If a loss computes its gradient in the forward pass, that counts as
forward. The profiler cannot see inside compiled blocks, so these are one category.
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
CATEGORIES = ("attention", "feed-forward", "norms", COMPILED, LOSS, OPTIMIZER, COPIES, OTHER)
_MARK = "category: "
_BACKWARD = "autograd::engine::evaluate_function"
_REGION = "Torch-Compiled Region"  # the name of torch's events for compiled code
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous")

Times = dict[str, dict[str, float]]  # category -> "forward" or "backward" -> seconds


def profile_step(
    step: Callable[[Tensor, Tensor], Any], inputs: Tensor, targets: Tensor, trace: Path | None = None
) -> tuple[Times, float]:
    """Return the seconds of one step by category and pass (on CUDA those of its kernels), and the seconds of the step.

    step: its attribute `model`, if it has one, defines the categories.
    trace: also write the profile to this file, for chrome://tracing or perfetto.
    """
    device = inputs.device
    model: nn.Module = getattr(step, "model", None) or nn.Identity()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _recorded_categories(model), profile(activities=activities) as recorded:
        start = time.perf_counter()
        step(inputs, targets)
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - start
    if trace is not None:
        temporary = trace.with_name(f".part-{trace.name}")  # same suffix, because torch compresses .gz files
        recorded.export_chrome_trace(str(temporary))
        os.replace(temporary, trace)
    return _sum_times(recorded.events(), device.type == "cuda"), wall_s


def table(times: Times, wall_s: float) -> str:
    """Return a table in milliseconds with a line per category."""
    lines = [f"{'milliseconds':26}{'forward':>10}{'backward':>10}{'total':>10}{'share':>8}"]
    outside = wall_s
    for category, passes in times.items():
        total = sum(passes.values())
        outside -= total
        numbers = "".join(f"{1e3 * seconds:10.1f}" for seconds in (passes["forward"], passes["backward"], total))
        lines.append(f"{category:26}{numbers}{total / wall_s:8.1%}")
    lines.append(f"{'outside any operation':46}{1e3 * outside:10.1f}{outside / wall_s:8.1%}")
    return "\n".join([*lines, f"{'full step':46}{1e3 * wall_s:10.1f}"])


# --- recording the categories of the forward pass -------------------------------------------------------------------
def category_of(name: str) -> str | None:
    """Return the category of a submodule by its name; None if it belongs to the category of its parent."""
    last = name.rpartition(".")[2]
    if last in ("attention", "feed_forward"):
        return last.replace("_", "-")
    if last.endswith("norm"):
        return "norms"
    if last == "output":
        return LOSS
    return OTHER if last == "tok_embeddings" or last.isdigit() else None


@contextmanager
def _recorded_categories(model: nn.Module) -> Iterator[None]:
    """Record the category of each submodule's forward pass in the profile."""
    hooks: list[Any] = []
    open_marks: list[record_function] = []

    def enter(category: str) -> None:
        open_marks.append(record_function(_MARK + category))
        open_marks[-1].__enter__()

    compiled = ""  # name prefix of the current compiled block, with a dot
    for name, module in model.named_modules():
        category = category_of(name)
        if category is None or (compiled and name.startswith(compiled)):
            continue
        if getattr(module, "_compiled_call_impl", None) is not None:  # hooks would be compiled as well
            compiled = f"{name}."
            continue
        hooks.append(module.register_forward_pre_hook(lambda *_, category=category: enter(category)))
        hooks.append(module.register_forward_hook(lambda *_: open_marks.pop().__exit__(None, None, None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- evaluation of the profile --------------------------------------------------------------------------------------
def _sum_times(events: Any, cuda: bool) -> Times:
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    last_backward = max((e.time_range.end for e in host if e.name.startswith(_BACKWARD)), default=float("inf"))
    forward_categories: dict[tuple[int, int], str] = {}  # (thread, autograd's sequence number) -> category
    for event in sorted(host, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and _ancestor(event, _BACKWARD) is None:
            forward_categories[event.thread, event.sequence_nr] = _category(event) or LOSS
    times: Times = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for event in host:
        micros = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        backward = _ancestor(event, _BACKWARD)
        if _ancestor(event, "Optimizer.") is not None or (backward is None and event.time_range.start > last_backward):
            category = OPTIMIZER
        elif event.name in _COPIES:
            category = COPIES
        elif backward is not None:
            category = _category(event) or forward_categories.get((backward.fwd_thread, backward.sequence_nr), OTHER)
        else:
            category = _category(event) or LOSS
        times[category]["forward" if backward is None else "backward"] += micros / 1e6
    return {category: times[category] for category in CATEGORIES if sum(times[category].values()) > 0}


def _category(event: Any) -> str | None:
    """Return the innermost category that contains the event; None if there is none."""
    mark = _ancestor(event, _MARK, _REGION)
    if mark is None:
        return None
    return COMPILED if mark.name.startswith(_REGION) else str(mark.name.removeprefix(_MARK))


def _ancestor(event: Any, *prefixes: str) -> Any:
    """Return the event or its innermost ancestor whose name starts with one of the prefixes; None if there is none."""
    while event is not None and not event.name.startswith(prefixes):
        event = event.cpu_parent
    return event
