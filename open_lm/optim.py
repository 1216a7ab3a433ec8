"""Optimizers by name, and clipping that is the same for whole and for sharded gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from open_lm.config import OptimConfig
from open_lm.errors import ConfigError


def build_adamw(parameters: list[nn.Parameter], cfg: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter, 2017) with weight decay on every parameter, norms and embeddings too; one fused
    kernel a step where all parameters are of floating types on devices that have it."""
    fused = all(p.is_floating_point() and p.device.type in ("cuda", "cpu") for p in parameters)
    return AdamW(
        parameters, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.wd, fused=fused or None
    )


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], OptimConfig], Optimizer]] = {"adamw": build_adamw}


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """The optimizer of --optimizer over the model's trainable parameters, whole or sharded."""
    if cfg.optimizer not in OPTIMIZERS:
        raise ConfigError(f"--optimizer: found {cfg.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[cfg.optimizer]([p for p in model.parameters() if p.requires_grad], cfg)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale all gradients so that their common 2-norm is at most `max_norm`; returns the norm before, a scalar.

    Sharded gradients count once over all ranks, so that the norm is the same on each and for any number of them.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in with_grad if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, norm)
    return norm


def step_unless(optimizer: Optimizer, skip: torch.Tensor) -> None:
    """One update, or where `skip` (a bool scalar on the device) is true none at all: parameters, moments and step
    counts stay as they are. A fused optimizer decides on the device; for any other the host waits for `skip`."""
    if not all(group.get("fused") for group in optimizer.param_groups):
        if not bool(skip):
            optimizer.step()
        return
    # As a GradScaler tells a fused optimizer. Parameters that are offloaded are updated on the host, so it goes there.
    device = optimizer.param_groups[0]["params"][0].device
    optimizer.found_inf = skip.float().to(device)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
