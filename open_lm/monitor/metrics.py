"""What a run measures about itself: values averaged on the device, throughput, model FLOPs, memory, intervals.

Legend: D model width, H heads, K head width, L layers, T sequence.
"""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_lm.config.devices import peak_16_bit_flops

_LATE_STEPS = 4  # on CUDA: enough that the device is never waited for, few enough that a stop comes in time


class DeviceMeans:
    """Means over steps of scalars that stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], counts: Tensor) -> None:
        """Add a step's scalars, the same on all ranks, if `counts`, a bool scalar. No host synchronisation."""
        for name, value in values.items():
            part = torch.where(counts, value.detach().float(), 0.0)
            self._sums[name] = self._sums[name] + part if name in self._sums else part
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts.to(torch.int64)

    def pop(self) -> dict[str, float]:
        """The means over all steps that counted since the last call, NaN where none did; waits for the device."""
        sums, counts = self.state().values()
        self._sums, self._counts = {}, {}
        return {name: total / counts[name] if counts[name] else math.nan for name, total in sums.items()}

    def state(self) -> dict[str, dict[str, float]]:
        """The sums and counts so far, JSON-able and exact; waits for the device."""
        kinds = {"sums": self._sums, "counts": self._counts}
        return {
            kind: dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}
            for kind, values in kinds.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, float]], device: torch.device) -> None:
        """Go on from what `state` returned."""
        self._sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self._counts = {name: torch.tensor(int(value), device=device) for name, value in state["counts"].items()}


class DelayedReadback:
    """Small vectors of steps, read on the host without waiting for the device: at once on CPU, a fixed number of steps
    later on CUDA. Fixed, so that what ranks read after a step, and do about it, is the same on all of them."""

    def __init__(self, device: torch.device) -> None:
        self._lag = _LATE_STEPS if device.type == "cuda" else 0
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, Any]] = deque()

    def add(self, values: Tensor, note: Any) -> None:
        """Send a step's vector on its way, with a note that comes back beside it."""
        if self._lag == 0:
            self._pending.append((values, None, note))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event, note))

    def take(self, everything: bool = False) -> Iterator[tuple[list[float], Any]]:
        """What is due, oldest first; or everything, waiting for the device."""
        while len(self._pending) > (0 if everything else self._lag):
            values, event, note = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield values.tolist(), note

    def clear(self) -> None:
        """Forget what has not been read."""
        self._pending.clear()


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers of the host as int64 on the device, without waiting for it."""
    host = torch.tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# ------------------------------------------------------------------------------------------------ model FLOPs
def model_flops_per_token(model: nn.Module) -> float:
    """FLOPs of a forward and backward pass for one token, without recomputation: 6 for each parameter of a matrix
    product plus 12 L H K T for the attention (Chowdhery et al. 2022, appendix B, arXiv:2204.02311). An embedding that
    is only looked up does not count; of a mixture's experts, those that a token visits do."""
    params: Any = model.params
    counted = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    if embedding is not model.get_output_embeddings().weight:  # type: ignore[operator]
        counted -= embedding.numel()
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "num_experts") and hasattr(module, "experts"):
            idle = 1 - module.top_k / module.num_experts
            counted -= round(idle * sum(p.numel() for p in module.experts.parameters()))
    width = params.n_heads * params.head_dim if hasattr(params, "n_heads") else params.dim
    return 6.0 * counted + 12.0 * params.n_layers * width * params.seq_len


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that matrix products in `dtype` can reach on the device, or None where that is not known.

    CUDA devices: the maker's figure (float32 runs as TF32 from Ampere on, at half the 16-bit rate). CPU: measured.
    """
    if device.type == "cpu":
        return measured_matmul_flops(dtype)
    name = torch.cuda.get_device_name(device)
    peak = peak_16_bit_flops(name)
    if peak is None or dtype in (torch.float16, torch.bfloat16):
        return peak
    return peak / 2 if torch.cuda.get_device_capability(device) >= (8, 0) else None


@lru_cache
def measured_matmul_flops(dtype: torch.dtype, size: int = 768, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few square matrix products on this process's CPU threads."""
    left, right = (torch.rand(size, size).to(dtype) for _ in range(2))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the device's allocator on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ------------------------------------------------------------------------------------------------ the log line
@dataclass(frozen=True)
class TrainLogEntry:
    """What one log line of training says. `samples` of `epoch_samples` sequences of the epoch are done; times are
    means of a step, `remaining_s` what all steps that are left take at that rate; `mfu` is a share of 1, None where the
    device's peak is not known."""

    epoch: int
    samples: int
    epoch_samples: int
    loss: float
    grad_norm: float
    lr: float
    data_s: float
    batch_s: float
    tokens: int
    step_tokens: int
    world_size: int
    memory_bytes: int
    remaining_s: float
    mfu: float | None = None
    extra: Mapping[str, float] | None = None

    def line(self) -> str:
        """The line of out.log."""
        digits = len(str(self.epoch_samples))
        speed = self.step_tokens / self.batch_s
        parts = [
            f"Train Epoch: {self.epoch} [{self.samples:>{digits}}/{self.epoch_samples} "
            f"({100 * self.samples / self.epoch_samples:.0f}%)]",
            f"Loss: {self.loss:.3f}",
            f"Data (t): {self.data_s:.3f}",
            f"Batch (t): {self.batch_s:.3f}, {speed:#g}/s, {speed / self.world_size:#g}/s/gpu",
            f"LR: {self.lr:5f}",
            f"Grad norm: {self.grad_norm:.3f}",
            f"Tokens: {self.tokens}",
            f"Mem: {self.memory_bytes / 2**30:.2f} GiB",
        ]
        if self.mfu is not None:
            parts.append(f"MFU: {100 * self.mfu:.1f}%")
        parts.append(f"ETA: {timedelta(seconds=round(self.left_s))}")
        return " ".join(parts)

    def metrics(self) -> dict[str, float]:
        """The same as named values; samples_per_second counts tokens, as existing dashboards expect."""
        speed = self.step_tokens / self.batch_s
        values = {
            "loss": self.loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "data_time": self.data_s,
            "batch_time": self.batch_s,
            "tokens_per_second": speed,
            "samples_per_second": speed,
            "samples_per_second_per_gpu": speed / self.world_size,
            "tokens": self.tokens,
            "peak_memory_bytes": self.memory_bytes,
            **({} if self.mfu is None else {"mfu": self.mfu}),
            **(self.extra or {}),
        }
        return {f"train/{name}": value for name, value in values.items()}


def short_labels(names: Sequence[str]) -> dict[str, str]:
    """A short label for each of several paths or urls, no two alike, of characters that every logger takes.

    It is the folder of the shards or the manifest, or their own name where several names lie in that folder; as much of
    what stands before as tells it from the labels of earlier names.
    """
    folders = [name.rpartition("/")[0] for name in dict.fromkeys(names)]
    labels: dict[str, str] = {}
    for name in dict.fromkeys(names):
        words = [re.sub(r"[^\w.-]+", "_", word) for word in re.split("[/:]+", name) if word]
        if len(words) > 1 and folders.count(name.rpartition("/")[0]) == 1:
            words.pop()
        else:
            words[-1] = words[-1].partition(".")[0] or words[-1]
        choices = ["-".join(words[-count:]) for count in range(1, len(words) + 1)]
        choices += [f"{words[-1]}-{number}" for number in range(2, len(folders) + 2)]
        labels[name] = next(choice for choice in choices if choice not in labels.values())
    return labels


# ------------------------------------------------------------------------------------------------ intervals
def bootstrap_interval(
    points: np.ndarray,
    iterations: int = 10_000,
    max_population: int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """(lower, upper) of the mean of points (n,) by the percentile bootstrap (Efron 1979).

    With `max_population` m below n, resamples have m points and their spread is scaled by sqrt(m / n) (the m out of n
    bootstrap, Bickel et al. 1997), so that the interval is that of all n points. Work is iterations * min(n, m).
    """
    points = np.asarray(points, dtype=np.float64)
    population = len(points)
    size = min(population, max_population or population)
    generator = np.random.default_rng(seed)
    chunk = max(1, 2**22 // size)
    means = np.concatenate(
        [
            points[generator.integers(population, size=(min(chunk, iterations - done), size))].mean(axis=1)
            for done in range(0, iterations, chunk)
        ]
    )
    center = points.mean()
    means = center + (means - center) * np.sqrt(size / population)
    lower, upper = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)
