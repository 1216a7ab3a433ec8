"""Muon for the matrices inside a model and AdamW for all else, as one optimizer.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) goes a step of the same length in all directions of a
matrix: its update is the momentum U S V^T with all singular values S made about 1. Scaled by 0.2 sqrt(max(m, n)) it has
the root mean square of AdamW's updates, so that learning rate and weight decay mean the same for both (Liu et al. 2025,
https://arxiv.org/abs/2502.16982).

One m x n matrix, m <= n, costs 20 m^2 n + 10 m^3 floating point operations, in bfloat16 where the device has units for
it. All ranks divide the matrices among them (matrix_assignment.py): of each parameter and in each step, one of N ranks in R
copies of N/R sends and receives 2/N bytes within its copy, 2 R/N to and from all ranks, and holds some 8/N bytes while
it works.

Legend: m x n a matrix, U matrices of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.config.memory_limits import MUON_BATCH_ELEMENTS
from open_lm.optim.adamw import adamw_update, local_tensor, param_state, run_closure
from open_lm.optim.matrix_assignment import MatrixAssignment, assign_matrices

# Of the quintic (Jordan 2024) whose fifth iterate takes singular values from 0.002 to 1 to between 0.68 and 1.21.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_LEAST_NORM = 1e-7
# AdamW's updates have a root mean square of about 0.2 (Liu et al. 2025, section 2.2).
_ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay for `matrices`, AdamW for the groups of `others`.

    Args:
        matrices: parameters (m, n), or (U, m, n) for U matrices, whole or sharded.
        others: groups of parameters as torch's optimizers take them, for AdamW.
        parts: of a parameter (U m, n) that holds U matrices one below the other, U; each is a matrix of its own.
        dtype: in which matrices are made orthogonal (default: `working_dtype`).
        The rest as --lr, --muon-momentum, --beta1 and --beta2, --eps and --wd.

    A step is none at all where the attribute `found_inf`, a float scalar on the device, is 1: whatever the gradients
    hold, parameters, momenta and step counts stay as they were. (Gradients of matrices are 0 afterwards.)
    """

    _step_supports_amp_scaling = True  # as torch's fused optimizers say that they heed found_inf

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[dict[str, Any]],
        *,
        parts: Mapping[Tensor, int],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._parts = dict(parts)
        self._dtype = dtype
        self._shares: dict[tuple[int, ...], list[MatrixAssignment]] = {}  # by the parameters that have gradients
        groups = [{"params": matrices, "muon": True, "momentum": momentum}, *({**g, "muon": False} for g in others)]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; what `closure` returns. Collective where parameters are shared by several ranks."""
        loss = run_closure(closure)
        for group in self.param_groups:
            if group["muon"]:
                self._update(group)
            else:
                adamw_update(self, group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        values = [local_tensor(param) for param in params]
        skip = getattr(self, "found_inf", values[0].new_zeros(())) > 0
        directions = self._directions(params, group["momentum"], skip)
        torch._foreach_mul_(values, torch.where(skip, 1.0, 1 - group["lr"] * group["weight_decay"]))
        kept = (~skip).to(values[0].dtype)
        for param, value, direction in zip(params, values, directions, strict=True):
            m, n = self._matrix_shape(param)
            scale = _ADAMW_RMS * max(m, n) ** 0.5
            value.addcmul_(local_tensor(direction), kept, value=-group["lr"] * scale)

    def _directions(self, params: list[nn.Parameter], momentum: float, skip: Tensor) -> list[Tensor]:
        """The orthogonal directions of the parameters, sharded as they are; their momenta go on."""
        grads = [local_tensor(param.grad) for param in params if param.grad is not None]
        states = [param_state(self, param, _begin) for param in params]
        momenta = [local_tensor(state["momentum_buffer"]) for state in states]
        for grad in grads:
            grad.masked_fill_(skip, 0.0)  # not a product, which would let NaN through
        torch._foreach_mul_(momenta, torch.where(skip, 1.0, momentum))
        torch._foreach_add_(momenta, grads, alpha=1 - momentum)
        directions = []
        for param, grad, buffer in zip(params, grads, momenta, strict=True):
            direction = torch.empty_like(param, dtype=self._dtype or working_dtype(grad.device))
            local_tensor(direction).copy_(grad.lerp(buffer, momentum))
            directions.append(direction)
        for shares in self._divided(params):
            shares.apply(directions, _orthogonalize_all)
        return directions

    def _divided(self, params: list[nn.Parameter]) -> list[MatrixAssignment]:
        """Who works on which matrices; agreed upon once for each set of parameters."""
        key = tuple(id(param) for param in params)
        if key not in self._shares:
            self._shares[key] = assign_matrices(params, [self._parts.get(param, 1) for param in params])
        return self._shares[key]

    def _matrix_shape(self, param: nn.Parameter) -> tuple[int, int]:
        m, n = param.shape[-2:]
        return m // self._parts.get(param, 1), n


def _begin(param: Tensor) -> dict[str, Any]:
    return {"momentum_buffer": torch.zeros_like(param)}


def working_dtype(device: torch.device) -> torch.dtype:
    """The type in which matrices are made orthogonal: bfloat16, whose rounding the iteration bears as the paper shows,
    on CUDA and on CPUs with bfloat16 units (5.5 times as fast there); on other CPUs float32."""
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _orthogonalize_all(stacks: list[Tensor]) -> None:
    """Make every matrix of several (U, m, n) orthogonal, in place; those of equal shape (or its transpose) together."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for stack in stacks:
        wide = stack if stack.shape[-2] <= stack.shape[-1] else stack.mT
        by_shape.setdefault(wide.shape[-2:], []).extend(wide.unbind())
    for shape, matrices in by_shape.items():
        size = max(1, MUON_BATCH_ELEMENTS // max(1, shape.numel()))
        for start in range(0, len(matrices), size):
            batch = matrices[start : start + size]
            torch._foreach_copy_(batch, list(orthogonalize(torch.stack(batch)).unbind()))


def orthogonalize(matrices: Tensor) -> Tensor:
    """(U, m, n) with m <= n, each U S V^T, to about U V^T: five iterations of Newton and Schulz's kind with a quintic,
    which leave singular values of 0.68 to 1.21 (smaller where they were below 0.002 of the matrix's norm). Of the type
    of `matrices`; 0 stays 0."""
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = matrices / norms.clamp(min=_LEAST_NORM).to(matrices.dtype)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x
