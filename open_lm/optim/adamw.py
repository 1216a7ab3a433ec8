"""AdamW on this rank's parts of the parameters, and what it has in common with Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

# What is kept of a parameter from its first update on.
MOMENTS = frozenset({"step", "exp_avg", "exp_avg_sq"})


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter, 2017), with its results and its state, as one fused kernel a step over what
    this rank holds of the parameters. They may be whole, or sharded over different meshes: an update is elementwise and
    needs no other rank."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; what `closure` returns. `found_inf`, an attribute that a caller may set to a float scalar on the
        device, makes it none at all where it is 1."""
        loss = evaluate(closure)
        for group in self.param_groups:
            adamw_update(self, group)
        return loss


def adamw_update(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Update the parameters of one group that have a gradient, and their state `step`, `exp_avg`, `exp_avg_sq`."""
    params = [param for param in group["params"] if param.grad is not None]
    states = [param_state(optimizer, param, _begin) for param in params]
    adamw(
        [local_tensor(param) for param in params],
        [local_tensor(param.grad) for param in params],
        [local_tensor(state["exp_avg"]) for state in states],
        [local_tensor(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=getattr(optimizer, "found_inf", None),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _begin(param: Tensor) -> dict[str, Any]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=local_tensor(param).device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


def param_state(
    optimizer: torch.optim.Optimizer, param: Tensor, begin: Callable[[Tensor], dict[str, Any]]
) -> dict[str, Any]:
    """What the optimizer keeps of a parameter; `begin(param)` at its first update."""
    state: dict[str, Any] = optimizer.state[param]
    if not state:
        state.update(begin(param))
    return state


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; the tensor itself where it is not sharded. Shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compute_device(tensor: Tensor) -> torch.device:
    """Where a tensor is worked on: what is kept in host memory for the ranks of another device, on that device."""
    device = local_tensor(tensor).device
    if isinstance(tensor, DTensor) and tensor.device_mesh.device_type != device.type:
        return torch.device(tensor.device_mesh.device_type)
    return device


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """What a step's closure, which torch's optimizers take, returns; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
