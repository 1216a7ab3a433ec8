"""AdamW on the local shards of the parameters, and helpers shared with Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from open_lm.distributed.sharded_tensor import local_tensor


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter, 2017) as one fused kernel per step over the local shards of the parameters.

    Results and state are those of torch.optim.AdamW. Parameters may be unsharded, or sharded over different meshes: the
    update is elementwise and needs no communication.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters and return the result of `closure`.

        The caller may set two attributes to float scalars on the device. If `found_inf` is 1, nothing is updated.
        Gradients are divided by `grad_scale`.
        """
        loss = run_closure(closure)
        for group in self.param_groups:
            adamw_update(self, group)
        return loss


def adamw_update(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Update the parameters of a group that have a gradient, and their state `step`, `exp_avg`, `exp_avg_sq`."""
    params = [param for param in group["params"] if param.grad is not None]
    states = [param_state(optimizer, param, _initial_state) for param in params]
    adamw(
        [local_tensor(param) for param in params],
        [local_tensor(param.grad) for param in params],
        [local_tensor(state["exp_avg"]) for state in states],
        [local_tensor(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=getattr(optimizer, "found_inf", None),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _initial_state(param: Tensor) -> dict[str, Any]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=local_tensor(param).device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


def param_state(
    optimizer: torch.optim.Optimizer, param: Tensor, initial_state: Callable[[Tensor], dict[str, Any]]
) -> dict[str, Any]:
    """Return the optimizer's state of a parameter; at the first update, create it with `initial_state(param)`."""
    state: dict[str, Any] = optimizer.state[param]
    if not state:
        state.update(initial_state(param))
    return state


def compute_device(tensor: Tensor) -> torch.device:
    """Return the device to compute on: for a DTensor that is offloaded to host memory, the device of its mesh."""
    device = local_tensor(tensor).device
    if isinstance(tensor, DTensor) and tensor.device_mesh.device_type != device.type:
        return torch.device(tensor.device_mesh.device_type)
    return device


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """Return the result of the closure of a torch optimizer's step, or None if there is no closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
