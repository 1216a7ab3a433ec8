"""The activation silu(gate) * up of SwiGLU. It stores only its input for the backward pass.

Legend: F width of the gated network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels import operators
from open_lm.kernels.native import elements


def gated_silu(gate_up: Tensor) -> Tensor:
    """Return silu(first half) * second half of gate_up (…,2F) float -> (…,F)."""
    if gate_up.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _forward(gate_up)  # calling the operator costs more than the work of a single token
    if gate_up.device.type == "cpu":
        out: Tensor = torch.ops.open_lm.cpu_gate(gate_up)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _forward(gate_up: Tensor) -> Tensor:
    if elements.supports(gate_up):
        return elements.gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    grad = grad.contiguous()
    if elements.supports(grad, gate_up):
        return elements.gate_backward(grad, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)), dim=-1)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _call_backward(ctx: Any, grad: Tensor) -> Tensor:
    gate_up_grad: Tensor = torch.ops.open_lm.cpu_gate_backward(grad, *ctx.saved_tensors)
    return gate_up_grad


def _fake_forward(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _fake_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


operators.register("cpu_gate(Tensor gate_up) -> Tensor", _forward, _fake_forward)
operators.register("cpu_gate_backward(Tensor grad, Tensor gate_up) -> Tensor", _backward, _fake_backward)
operators.register_backward("cpu_gate", _save_for_backward, _call_backward)
