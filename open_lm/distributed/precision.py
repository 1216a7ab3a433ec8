"""`--precision` in terms of torch: storage type, autocast context, gradient scaler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from open_lm.errors import ConfigError

PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "fp32")


def get_autocast(precision: str, device_type: str | None = None) -> Callable[[], AbstractContextManager[object]]:
    """A function that makes the context in which a forward pass runs.

    amp: the device's own half precision (float16 on CUDA, bfloat16 elsewhere); amp_bf16 and amp_bfloat16: bfloat16;
    fp32, bf16 and fp16 compute in the type that the parameters have, without autocast.
    `device_type` is "cuda" or "cpu"; by default CUDA where there is any.
    """
    _check(precision)
    if not precision.startswith("amp"):
        return nullcontext
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    half = compute_dtype(precision, device_type)
    return lambda: torch.autocast(device_type, dtype=half)


def parameter_dtype(precision: str) -> torch.dtype:
    """The type that parameters (and so optimizer state) are stored in: float32 but for pure bf16 and fp16."""
    _check(precision)
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def compute_dtype(precision: str, device_type: str) -> torch.dtype:
    """The type that matrix products run in."""
    _check(precision)
    if precision == "fp16" or (precision == "amp" and device_type == "cuda"):
        return torch.float16
    return torch.float32 if precision == "fp32" else torch.bfloat16


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scaler that float16 autocast needs against underflow, or None where no float16 gradient arises."""
    if precision == "amp" and device.type == "cuda":
        return torch.amp.GradScaler("cuda")
    return None


def _check(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
