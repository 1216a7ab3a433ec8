"""Linear layers of the blocks: torch's, with a faster gradient of the weight in bfloat16 on a CPU.

The weight's gradient is grad.T @ x, summed over tokens. Products whose first matrix is a transposed view take twice as
long there as those of two matrices as they lie, and turning one of them, or x and the result, takes a tenth of that.
Legend: N tokens, I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from open_lm.kernels.native import elements

_FEWEST_WEIGHTS = 1 << 20  # of small matrices the product is as fast either way


class Linear(nn.Linear):
    """nn.Linear, its gradient by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…,I) -> (…,O)."""
        return linear(x, self.weight, self.bias)


class FusedLinear(Linear):
    """A linear layer without bias whose weight holds those of `parts` layers of equal width, one after the other."""

    def __init__(self, in_features: int, out_features: int, parts: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.parts = parts


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: x (…,I), weight (O,I), bias (O,) or None -> (…,O)."""
    plain = bias is None and x.device.type == "cpu" and weight.numel() >= _FEWEST_WEIGHTS
    if plain and weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
            x, weight = (part.to(torch.get_autocast_dtype("cpu")) for part in (x, weight))
        if elements.takes(x, weight):
            out: Tensor = _Linear.apply(x, weight)
            return out
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """x (…,I) and weight (O,I) bfloat16, such as the kernels take -> (…,O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        return of_x, _of_weight(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """grad (N,O), x (N,I) -> (O,I)."""
    (tokens, out_of), into = grad.shape, x.shape[1]
    if (tokens + out_of) * into < tokens * out_of:  # numbers to be turned
        return elements.transposed(elements.transposed(x) @ grad)
    return elements.transposed(grad) @ x
