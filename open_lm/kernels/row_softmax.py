"""The kernels that compute the softmax of rows of logits in place, on a CPU or on CUDA."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from open_lm.kernels.native import elements


def softmax_kernels(logits: Tensor) -> Any:
    """Return the module whose functions `log_sum_exp` and `to_probs_` accept logits (R,V), or None if there is none."""
    if elements.supports(logits):
        return elements
    is_suitable = logits.is_cuda and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not is_suitable or type(logits) not in (Tensor, Parameter) or not _has_triton(logits.device):
        return None
    from open_lm.kernels import triton_softmax

    return triton_softmax


def triton_problem(device: torch.device) -> str | None:
    """Return why Triton cannot compile kernels for a CUDA device, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the device's compute capability is below 8.0"
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "Triton finds no C compiler (install one or set CC)"
    return None


@functools.cache
def _has_triton(device: torch.device) -> bool:
    problem = triton_problem(device)
    if problem:
        logging.warning(f"The loss uses torch's operators, which are slower than its own kernel: {problem}")
    return problem is None
