"""Causal softmax attention on a CPU: torch's, with a faster way back for narrow heads.

Legend: B batch, H heads, T sequence, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Up to this head width the backward kernel takes 0.6 times as long in float32 as in bfloat16: its products are too
# small for the matrix units, and conversions between the types remain. At 32 both are equal.
_NARROW = 16


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Each query attends to the keys up to its own: three times (B,H,T,K) float -> (B,H,T,K), scaled by 1/sqrt(K)."""
    narrow = queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and queries.shape[-1] <= _NARROW
    if narrow and torch.is_grad_enabled():
        out: Tensor = _WideBackward.apply(queries, keys, values)
        return out
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)


class _WideBackward(torch.autograd.Function):
    """Attention by torch's kernels whose gradients are computed in float32 (float64 of float64) from what the forward
    pass kept; they are nearer to the exact ones than those in half precision."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out, log_sums = _forward(queries, keys, values, is_causal=True)
        ctx.save_for_backward(queries, keys, values, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *kept, log_sums = ctx.saved_tensors
        dtype = kept[0].dtype
        wide = [x if dtype == torch.float64 else x.float() for x in (*grads, *kept)]
        return tuple(grad.to(dtype) for grad in _backward(*wide, log_sums, dropout_p=0.0, is_causal=True))
