"""Map --precision to torch: parameter dtype, autocast context and gradient scaler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from open_lm.config.sections import PRECISIONS
from open_lm.errors import ConfigError


def get_autocast(precision: str, device_type: str | None = None) -> Callable[[], AbstractContextManager[object]]:
    """Return a factory of the context manager for a forward pass.

    amp uses float16 on CUDA and bfloat16 elsewhere; amp_bf16 and amp_bfloat16 use bfloat16. fp32, bf16 and fp16 compute
    in the dtype of the parameters, without autocast. `device_type` is "cuda" or "cpu", by default CUDA if available.
    """
    _check(precision)
    if not precision.startswith("amp"):
        return nullcontext
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    half = compute_dtype(precision, device_type)
    return lambda: torch.autocast(device_type, dtype=half)


def parameter_dtype(precision: str) -> torch.dtype:
    """Return the dtype of parameters and optimizer state: float32, except for pure bf16 and fp16."""
    _check(precision)
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def compute_dtype(precision: str, device_type: str) -> torch.dtype:
    """Return the dtype of matrix products."""
    _check(precision)
    if precision == "fp16" or (precision == "amp" and device_type == "cuda"):
        return torch.float16
    return torch.float32 if precision == "fp32" else torch.bfloat16


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the loss scaler that float16 autocast needs to avoid underflow, or None if gradients are not float16."""
    if precision == "amp" and device.type == "cuda":
        return torch.amp.GradScaler("cuda")
    return None


def _check(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
