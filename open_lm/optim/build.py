"""Optimizers by name, and clipping that is the same for whole and for sharded gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from open_lm.config.sections import OptimConfig
from open_lm.distributed.processes import sum_over_ranks
from open_lm.errors import ConfigError
from open_lm.kernels.linear import FusedLinear
from open_lm.optim import adamw, muon
from open_lm.optim.adamw import AdamW, local_tensor, compute_device
from open_lm.optim.muon import Muon

_NORM_ELEMENTS = 1 << 16  # whose squares are added up in one go on a CPU


def build_adamw(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """AdamW with weight decay on every parameter, norms and embeddings too; see `_decay_groups`."""
    groups = _decay_groups(_trainable(model), cfg)
    return AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.wd, fused=True)


def build_muon(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Muon for the matrices inside the model, AdamW for embeddings, the head, norms and biases."""
    outside = _outer_parameters(model)
    trainable = _trainable(model)
    matrices = [param for param in trainable if param.dim() in (2, 3) and id(param) not in outside]
    inside = {id(param) for param in matrices}
    return Muon(
        matrices,
        _decay_groups([param for param in trainable if id(param) not in inside], cfg),
        parts={module.weight: module.parts for module in model.modules() if isinstance(module, FusedLinear)},
        lr=cfg.lr,
        momentum=cfg.muon_momentum,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        weight_decay=cfg.wd,
    )


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimConfig], Optimizer]] = {"adamw": build_adamw, "muon": build_muon}


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """The optimizer of --optimizer over the model's trainable parameters, whole or sharded."""
    if cfg.optimizer not in OPTIMIZERS:
        raise ConfigError(f"--optimizer: found {cfg.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[cfg.optimizer](model, cfg)


def optimizer_moments(optimizer: Optimizer) -> dict[Tensor, Set[str]]:
    """What an optimizer of this module keeps of each of its parameters from the first update on; of others nothing is
    known."""
    if not isinstance(optimizer, (AdamW, Muon)):
        return {}
    return {
        param: muon.MOMENTS if group.get("muon") else adamw.MOMENTS
        for group in optimizer.param_groups
        for param in group["params"]
    }


def infer_optimizer_name(moments: Iterable[Set[str]]) -> str | None:
    """The name of the optimizer that keeps such moments of a model's parameters; None for those of none here."""
    kept = frozenset().union(*moments)
    if kept >= adamw.MOMENTS:  # Muon has some as well, of what is no matrix
        return "muon" if kept >= muon.MOMENTS else "adamw"
    return None


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _decay_groups(params: list[nn.Parameter], cfg: OptimConfig) -> list[dict[str, Any]]:
    """One group of all parameters, in the model's order, as existing checkpoints have it; with --no-decay-norms a
    second one without weight decay, of those that have one dimension."""
    if not cfg.no_decay_norms:
        return [{"params": params}]
    vectors = [param for param in params if param.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": [param for param in params if param.dim() >= 2]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _outer_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters of embeddings and of the head, whatever wraps the model."""
    outer = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    head = next((getter() for getter in getters if callable(getter)), None)
    return {id(param) for module in (*outer, head) if isinstance(module, nn.Module) for param in module.parameters()}


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most `max_norm`; returns the norm before, a float32 scalar.

    Every part of a gradient counts once over all ranks, however many hold it and whichever meshes the parameters are
    spread over: the norm has the same bits on each rank. In a single process it is torch's, but for gradients in half
    precision, whose norms torch rounds to their type, and for large ones on a CPU, see `_norm`. Collective; nothing
    waits for the device.
    """
    grads = [param.grad for param in parameters if param.grad is not None]
    if not grads:
        return torch.zeros(())
    by_copies: dict[int, list[Tensor]] = {}
    for grad in grads:
        by_copies.setdefault(_copies(grad), []).append(local_tensor(grad))
    # In float64, where a float32's square and its root are exact.
    squares = [_norm(parts).double().square() / copies for copies, parts in by_copies.items()]
    norm = sum_over_ranks(torch.stack(squares).sum().to(compute_device(grads[0]))).sqrt().float()
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parts in by_copies.values():
            torch._foreach_mul_(parts, factor.to(parts[0].device))
    return norm


def _copies(tensor: Tensor) -> int:
    """How many ranks hold what this rank holds of a tensor."""
    copies = dist.get_world_size() if dist.is_initialized() else 1
    if isinstance(tensor, DTensor):
        for size, place in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            copies //= 1 if place.is_replicate() else size
    return copies


def _norm(tensors: list[Tensor]) -> Tensor:
    """The common 2-norm of tensors on one device, a float32 scalar (float64 of float64)."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    if tensors[0].device.type == "cpu":
        # There torch adds squares up one after the other: of 40 million in float32 0.3 % are lost.
        tensors = [piece for tensor in tensors for piece in tensor.flatten().split(_NORM_ELEMENTS)]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)))


def step_unless_skipped(optimizer: Optimizer, skip: Tensor) -> None:
    """One update, or where `skip` (a bool scalar on the device) is true none at all: parameters, moments and step
    counts stay as they are. The optimizers of this module decide on the device; for any other that cannot, the host
    waits for `skip`."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if not bool(skip):
            optimizer.step()
        return
    # As a GradScaler tells a fused optimizer. Parameters that are offloaded are updated on the host, so it goes there.
    device = local_tensor(optimizer.param_groups[0]["params"][0]).device
    optimizer.found_inf = skip.float().to(device)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
