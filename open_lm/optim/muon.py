"""Muon for the matrices of the blocks and AdamW for all other parameters, as one optimizer.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) orthogonalizes the momentum: from U S V^T it computes an
update with all singular values near 1. Scaled by 0.2 sqrt(max(m, n)), the update has the root mean square of AdamW's
updates, so both can use the same learning rate and weight decay (Liu et al. 2025, https://arxiv.org/abs/2502.16982).

An m x n matrix, m <= n, costs 20 m^2 n + 10 m^3 floating point operations, in bfloat16 if the device supports it. The
matrices are distributed over all ranks (matrix_assignment.py). With N ranks in R replicas, each rank sends and receives
per parameter element and step 2/N bytes within its replica and 2 R/N bytes to and from all ranks, and needs about 8/N
bytes of temporary memory.

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

# Coefficients of the quintic (Jordan 2024): five iterations map singular values of 0.002 to 1 into 0.68 to 1.21.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MIN_NORM = 1e-7
# The root mean square of AdamW's updates is about 0.2 (Liu et al. 2025, section 2.2).
_ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay for the groups of `matrices`, AdamW for those of `others`.

    Args:
        matrices: groups of parameters (m, n), or (U, m, n) for U matrices, unsharded or sharded.
        others: parameter groups of a torch optimizer, for AdamW.
        parts: U for each parameter (U m, n) that fuses U matrices along dimension 0; each is treated separately.
        lr: --lr.
        momentum: --muon-momentum.
        betas: --beta1 and --beta2.
        eps: --eps.
        weight_decay: --wd.
        dtype: the dtype of the orthogonalization (default: `orthogonalization_dtype`).

    If the attribute `found_inf`, a float scalar on the device, is 1, a step changes neither parameters nor momenta nor
    step counts, regardless of the gradients. (It sets the gradients of matrices to 0.) Gradients are divided by the
    attribute `grad_scale`, a float scalar on the device, if it is set.
    """

    _step_supports_amp_scaling = True  # torch's convention for optimizers that handle found_inf

    def __init__(
        self,
        matrices: list[dict[str, Any]],
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
        self._assignments: dict[tuple[int, ...], list[MatrixAssignment]] = {}  # by the parameters with gradients
        groups = [
            *({**group, "muon": True, "momentum": momentum} for group in matrices),
            *({**group, "muon": False} for group in others),
        ]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters and return the result of `closure`. Collective if there are several ranks."""
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
        applied = (~skip).to(values[0].dtype)
        for param, value, direction in zip(params, values, directions, strict=True):
            m, n = self._matrix_shape(param)
            scale = _ADAMW_RMS * max(m, n) ** 0.5
            value.addcmul_(local_tensor(direction), applied, value=-group["lr"] * scale)

    def _directions(self, params: list[nn.Parameter], momentum: float, skip: Tensor) -> list[Tensor]:
        """Update the momenta and return the orthogonalized update directions, sharded like the parameters."""
        grads = [local_tensor(param.grad) for param in params if param.grad is not None]
        states = [param_state(self, param, _initial_state) for param in params]
        momenta = [local_tensor(state["momentum_buffer"]) for state in states]
        divisor = getattr(self, "grad_scale", None)
        if divisor is not None:
            torch._foreach_div_(grads, divisor)
        for grad in grads:
            grad.masked_fill_(skip, 0.0)  # multiplying by 0 would propagate NaN
        torch._foreach_mul_(momenta, torch.where(skip, 1.0, momentum))
        torch._foreach_add_(momenta, grads, alpha=1 - momentum)
        directions = []
        for param, grad, buffer in zip(params, grads, momenta, strict=True):
            direction = torch.empty_like(param, dtype=self._dtype or orthogonalization_dtype(grad.device))
            local_tensor(direction).copy_(grad.lerp(buffer, momentum))
            directions.append(direction)
        for assignment in self._assign(params):
            assignment.apply(directions, _orthogonalize_all)
        return directions

    def _assign(self, params: list[nn.Parameter]) -> list[MatrixAssignment]:
        """Return the assignment of matrices to ranks, which is computed once for each set of parameters."""
        key = tuple(id(param) for param in params)
        if key not in self._assignments:
            self._assignments[key] = assign_matrices(params, [self._parts.get(param, 1) for param in params])
        return self._assignments[key]

    def _matrix_shape(self, param: nn.Parameter) -> tuple[int, int]:
        m, n = param.shape[-2:]
        return m // self._parts.get(param, 1), n


def _initial_state(param: Tensor) -> dict[str, Any]:
    return {"momentum_buffer": torch.zeros_like(param)}


def orthogonalization_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the orthogonalization: bfloat16 on CUDA and on CPUs with bfloat16 units, otherwise float32.

    The iteration tolerates bfloat16 rounding, as the paper shows; on such CPUs it is 5.5 times as fast.
    """
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _orthogonalize_all(stacks: list[Tensor]) -> None:
    """Orthogonalize all matrices of several stacks (U, m, n) in place, batched by shape up to transposition."""
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
    """Map matrices (U, m, n), m <= n, each U S V^T, approximately to U V^T, by five Newton-Schulz iterations.

    The quintic iteration leaves singular values of 0.68 to 1.21, or less if they were below 0.002 of the matrix's norm.
    The result has the dtype of `matrices`; zero matrices remain zero.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = matrices / norms.clamp(min=_MIN_NORM).to(matrices.dtype)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x
