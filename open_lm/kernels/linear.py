"""Linear layers of the blocks: torch's, with a faster weight gradient for bfloat16 on a CPU.

The weight's gradient is grad.T @ x, summed over tokens. A transposed view as the first operand makes the product twice
as slow; copying the operand first, or transposing x and the result, costs a tenth of that.
Legend: N tokens, I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from open_lm.kernels.native import elements

_MIN_WEIGHTS = 1 << 20  # products of smaller matrices are as fast with torch


class Linear(nn.Linear):
    """nn.Linear with the gradient of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…,I) -> (…,O)."""
        return linear(x, self.weight, self.bias)


class FusedLinear(Linear):
    """A linear layer whose weight concatenates the weights of `parts` layers of equal width."""

    def __init__(self, in_features: int, out_features: int, parts: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.parts = parts


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute torch.nn.functional.linear: x (…,I), weight (O,I), bias (O,) or None -> (…,O)."""
    if not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    is_candidate = bias is None and x.device.type == "cpu" and weight.numel() >= _MIN_WEIGHTS
    if is_candidate and weight.requires_grad and not torch.compiler.is_compiling():
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
            x, weight = (operand.to(torch.get_autocast_dtype("cpu")) for operand in (x, weight))
        if elements.supports(x, weight):
            out: Tensor = _Linear.apply(x, weight)
            return out
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear layer: x (…,I) and weight (O,I) bfloat16, supported by the native kernels -> (…,O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        x_grad = grad @ weight if ctx.needs_input_grad[0] else None
        return x_grad, _weight_grad(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Map grad (N,O), x (N,I) -> (O,I)."""
    (tokens, out_features), in_features = grad.shape, x.shape[1]
    if (tokens + out_features) * in_features < tokens * out_features:  # elements to transpose in each way
        return elements.transposed(elements.transposed(x) @ grad)
    return elements.transposed(grad) @ x
