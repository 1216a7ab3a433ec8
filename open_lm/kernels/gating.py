"""silu(gate) * up, as SwiGLU has it between its matrices, keeping nothing but what it is given.

Legend: F width of the gated network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels import operators
from open_lm.kernels.native import elements


def gated_silu(both: Tensor) -> Tensor:
    """silu of the first half of both (…,2F) float times the second -> (…,F)."""
    if both.device.type == "cpu":
        out: Tensor = torch.ops.open_lm.cpu_gate(both)
        return out
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def _forward(both: Tensor) -> Tensor:
    if elements.takes(both):
        return elements.gate(both)
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _backward(grad: Tensor, both: Tensor) -> Tensor:
    grad = grad.contiguous()
    if elements.takes(grad, both):
        return elements.gate_backward(grad, both)
    gate, up = both.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)), dim=-1)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> Tensor:
    of_both: Tensor = torch.ops.open_lm.cpu_gate_backward(grad, *ctx.saved_tensors)
    return of_both


def _shape_forward(both: Tensor) -> Tensor:
    return both.new_empty(*both.shape[:-1], both.shape[-1] // 2)


def _shape_backward(grad: Tensor, both: Tensor) -> Tensor:
    return torch.empty_like(both, memory_format=torch.contiguous_format)


operators.register("cpu_gate(Tensor both) -> Tensor", _forward, _shape_forward)
operators.register("cpu_gate_backward(Tensor grad, Tensor both) -> Tensor", _backward, _shape_backward)
operators.differentiate("cpu_gate", _keep, _gradients)
