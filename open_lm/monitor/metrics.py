"""Metrics of a run: means on the device, model FLOPs, peak memory and log lines.

Legend: D model width, H heads, K head width, L layers, T sequence.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.config.devices import peak_16_bit_flops
from open_lm.config.model_keys import attended_tokens
from open_lm.model.quantization import quantized_layers

# On CUDA, results are read this many steps late: the host then never waits for the device, but still stops in time.
_READBACK_DELAY_STEPS = 4


class DeviceMeans:
    """Means over steps of scalars, accumulated on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], counts: Tensor) -> None:
        """Add a step's scalars, which are equal on all ranks, if `counts` (a bool scalar on the device) is true.

        Does not synchronize with the device.
        """
        for name, value in values.items():
            summand = torch.where(counts, value.detach().float(), 0.0)
            self._sums[name] = self._sums[name] + summand if name in self._sums else summand
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts.to(torch.int64)

    def pop(self) -> dict[str, float]:
        """Return the means over all counted steps since the last call, NaN if there are none. Waits for the device."""
        sums, counts = self.state().values()
        self._sums, self._counts = {}, {}
        return {name: total / counts[name] if counts[name] else math.nan for name, total in sums.items()}

    def state(self) -> dict[str, dict[str, float]]:
        """Return the exact sums and counts so far, serializable as JSON. Waits for the device."""
        kinds = {"sums": self._sums, "counts": self._counts}
        return {
            kind: dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}
            for kind, values in kinds.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, float]], device: torch.device) -> None:
        """Restore a state that `state` returned; JSON has null in place of a sum that is not finite."""
        sums = {name: math.nan if value is None else value for name, value in state["sums"].items()}
        self._sums = {name: torch.tensor(value, device=device) for name, value in sums.items()}
        self._counts = {name: torch.tensor(int(value), device=device) for name, value in state["counts"].items()}


class DelayedReadback:
    """Small result vectors of steps that the host reads without waiting for the device.

    On CPU they are read immediately, on CUDA a fixed number of steps later. The number is fixed so that all ranks read
    the same results after a step and act on them in the same step.
    """

    def __init__(self, device: torch.device) -> None:
        self._delay = _READBACK_DELAY_STEPS if device.type == "cuda" else 0
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, Any]] = deque()

    def add(self, values: Tensor, tag: Any) -> None:
        """Start to copy a step's vector to the host; `tag` is returned with it."""
        if self._delay == 0:
            self._pending.append((values, None, tag))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event, tag))

    def read(self, wait: bool = False) -> Iterator[tuple[list[float], Any]]:
        """Yield (vector, tag) of the steps that are due, oldest first; with `wait`, of all pending steps."""
        while len(self._pending) > (0 if wait else self._delay):
            values, event, tag = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield values.tolist(), tag

    def clear(self) -> None:
        """Discard all pending vectors."""
        self._pending.clear()


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Copy integers to the device as int64, without waiting for the device."""
    host = torch.tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# ------------------------------------------------------------------------------------------------ model FLOPs
def model_flops_per_token(model: nn.Module) -> float:
    """Return the FLOPs of a forward and backward pass per token, without recomputation.

    6 per parameter of a matrix product plus 12 L H K T for the attention (Chowdhery et al. 2022, appendix B,
    arXiv:2204.02311), less in layers with a window (`attended_tokens`). A frozen parameter counts 4, because it has no
    gradient. An untied input embedding does not count, and only the experts that process a token count.
    """
    params: Any = model.params
    flops = sum(_matrix_flops(p) for p in model.parameters())
    flops += sum(4.0 * layer.out_features * layer.in_features for layer in quantized_layers(model).values())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    if embedding is not model.get_output_embeddings().weight:  # type: ignore[operator]
        flops -= _matrix_flops(embedding)
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "num_experts") and hasattr(module, "experts"):
            inactive = 1 - module.top_k / module.num_experts
            flops -= inactive * sum(_matrix_flops(p) for p in module.experts.parameters())
    if not hasattr(params, "n_heads"):
        return flops + 12.0 * params.n_layers * params.dim * params.seq_len
    return flops + 12.0 * params.n_heads * params.head_dim * attended_tokens(params)


def _matrix_flops(parameter: Tensor) -> float:
    return parameter.numel() * (6.0 if parameter.requires_grad else 4.0)


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of matrix products in `dtype` on the device, or None if unknown.

    CUDA devices: from data sheets (float32 runs as TF32 from Ampere on, at half the 16-bit rate). CPU: measured.
    """
    if device.type == "cpu":
        return measured_matmul_flops(dtype)
    name = torch.cuda.get_device_name(device)
    peak = peak_16_bit_flops(name)
    if peak is None or dtype in (torch.float16, torch.bfloat16):
        return peak
    return peak / 2 if torch.cuda.get_device_capability(device) >= (8, 0) else None


@lru_cache
def measured_matmul_flops(dtype: torch.dtype) -> float:
    """Measure the FLOP/s of the fastest of several square matrix products on this process's CPU threads."""
    size = 768
    generator = torch.Generator()  # torch's own one belongs to the training
    left, right = (torch.rand(size, size, generator=generator).to(dtype) for _ in range(2))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the device's allocator on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ------------------------------------------------------------------------------------------------ the log line
@dataclass(frozen=True)
class TrainLogEntry:
    """The values of a training log line.

    `samples` of the epoch's `epoch_samples` sequences are done. Times are means per step; `remaining_s` is the
    estimated time of all remaining steps. `mfu` is a fraction of 1, None if the device's peak is unknown.
    """

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
        """Format the line for out.log."""
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
        if self.extra and "gradient_noise_scale" in self.extra:
            parts.append(f"Noise scale: {self.extra['gradient_noise_scale']:.3g} sequences")
        parts.append(f"ETA: {timedelta(seconds=round(self.remaining_s))}")
        return " ".join(parts)

    def metrics(self) -> dict[str, float]:
        """Return the values as named metrics; samples_per_second counts tokens, as existing dashboards expect."""
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
