"""Triton kernels for the softmax of rows of logits, for losses that replace logits by their gradient on CUDA.

They have the interface of the CPU's kernels in native/elements.py. `log_sum_exp` reads the logits once, `to_probs_`
reads and writes them once, and no float32 copy is stored: six bytes of traffic per bfloat16 logit.

Legend: R rows, V columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # columns that a program holds at once
_WARPS = 8

# Triton reads the annotations of a kernel's parameters, so only constants have one.


@triton.jit
def _log_sum_exp(logits, maxima, log_sums, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * columns + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - peak) + tl.sum(tl.exp(x - peak), 0)
        highest = peak
    tl.store(maxima + row, highest)
    tl.store(log_sums + row, tl.log(total))


@triton.jit
def _to_probs(logits, log_sums, factors, columns, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: PLR0917
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = logits + row * columns + column
    probs = tl.exp(tl.load(target, mask=column < columns).to(tl.float32) - tl.load(log_sums + row))
    if HAS_FACTORS:
        probs = probs * tl.load(factors + row)
    tl.store(target, probs.to(logits.dtype.element_ty), mask=column < columns)


def log_sum_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of each row of logits (R,V), and the logarithm of the sum of exp(logit - maximum).

    Both are (R,) float32. The logits are contiguous, in float32 or half precision.
    """
    rows, columns = logits.shape
    maxima, log_sums = logits.new_empty(2, rows, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(logits):  # Triton starts kernels on the current device
            _log_sum_exp[rows,](logits, maxima, log_sums, columns, BLOCK=_BLOCK, num_warps=_WARPS)
    return maxima, log_sums


def to_probs_(logits: Tensor, log_sums: Tensor, factors: Tensor | None) -> None:
    """Replace logits (R,V) by exp(logits - log_sums) * factors; log_sums and factors (R,) float32."""
    rows, columns = logits.shape
    if not rows:
        return
    given = log_sums if factors is None else factors.contiguous()  # the gradient of a sum is one number, expanded
    grid = (rows, triton.cdiv(columns, _BLOCK))
    options = {"HAS_FACTORS": factors is not None, "BLOCK": _BLOCK, "num_warps": _WARPS}
    with torch.cuda.device_of(logits):
        _to_probs[grid](logits, log_sums, given, columns, **options)
