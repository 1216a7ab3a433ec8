"""Optimizers by name, the norm of unsharded and sharded gradients, and conditional steps with clipped gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from open_lm.config.registry import OPTIMIZERS
from open_lm.config.sections import OptimConfig
from open_lm.distributed.processes import sum_over_ranks
from open_lm.model.parametrization import Factors, optimizer_factors
from open_lm.optim.adamw import AdamW, compute_device, local_tensor
from open_lm.optim.muon import Muon
from open_lm.optim.schedules import LR_FACTOR

_names: WeakKeyDictionary[Optimizer, str] = WeakKeyDictionary()  # of the optimizers that `build_optimizer` has built
_CPU_NORM_CHUNK = 1 << 16  # elements whose squares are summed sequentially on a CPU


@OPTIMIZERS.register("adamw", help="AdamW", moments=("exp_avg", "exp_avg_sq"), scalars=("step",), uses=())
def build_adamw(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Build AdamW with weight decay on all parameters, including norms and embeddings; see `_groups`."""
    groups = _groups(_trainable(model), cfg, optimizer_factors(model))
    return AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.wd, fused=True)


@OPTIMIZERS.register(
    "muon",
    help="Muon for the matrices of the blocks, AdamW for all other parameters",
    moments=("exp_avg", "exp_avg_sq"),
    scalars=("step",),
    matrix_moments=("momentum_buffer",),
    orthogonal=True,
    uses=("muon_momentum",),
)
def build_muon(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Build Muon for the matrices of the blocks, with AdamW for embeddings, the head, norms and biases."""
    excluded = _embedding_and_head_ids(model)
    trainable = _trainable(model)
    matrices = [param for param in trainable if param.dim() in (2, 3) and id(param) not in excluded]
    matrix_ids = {id(param) for param in matrices}
    return Muon(
        _groups(matrices, cfg, optimizer_factors(model, orthogonal=True)),
        _groups([param for param in trainable if id(param) not in matrix_ids], cfg, optimizer_factors(model)),
        parts={
            param: parts
            for module in model.modules()
            if isinstance(parts := getattr(module, "parts", None), int)
            for param in module.parameters(recurse=False)
        },
        lr=cfg.lr,
        momentum=cfg.muon_momentum,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        weight_decay=cfg.wd,
    )


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Build the optimizer of --optimizer for the model's trainable parameters, unsharded or sharded."""
    optimizer: Optimizer = OPTIMIZERS.get(cfg.optimizer)(model, cfg)
    _names[optimizer] = cfg.optimizer
    return optimizer


def optimizer_moments(optimizer: Optimizer) -> dict[Tensor, Set[str]]:
    """Return the names of the state that an optimizer keeps for each parameter from its first update on.

    Empty for an optimizer that `build_optimizer` did not build, or whose entry does not declare its moments.
    """
    name = _names.get(optimizer)
    if name is None or "moments" not in OPTIMIZERS.entry(name).facts:
        return {}
    vectors, matrices = _state_names(name)
    return {
        param: matrices if group.get(name) else vectors  # Muon marks its group of matrices with muon=True
        for group in optimizer.param_groups
        for param in group["params"]
    }


def _state_names(name: str) -> tuple[Set[str], Set[str]]:
    """Return the names of the state that a registered optimizer keeps for a parameter, and for a matrix in a block."""
    facts = OPTIMIZERS.entry(name).facts
    vectors = frozenset((*facts.get("moments", ()), *facts.get("scalars", ())))
    return vectors, frozenset(facts["matrix_moments"]) if "matrix_moments" in facts else vectors


def infer_optimizer_name(moments: Iterable[Set[str]]) -> str | None:
    """Return the registered optimizer that keeps such state for a model's parameters, or None if none does."""
    kept = frozenset().union(*moments)
    states = {name: frozenset().union(*_state_names(name)) for name in OPTIMIZERS}
    # The state of one optimizer may include that of another: Muon has AdamW's for parameters that are not matrices.
    fitting = [name for name, state in states.items() if state and state <= kept]
    return max(fitting, key=lambda name: len(states[name]), default=None)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _groups(params: list[nn.Parameter], cfg: OptimConfig, factors_by_id: Mapping[int, Factors]) -> list[dict[str, Any]]:
    """Return one group with all parameters in the model's order, which existing checkpoints expect.

    With --no-decay-norms, parameters of one dimension are in groups without weight decay, which come last. Parameters
    with other factors than 1 are in a group for each pair of factors. Their weight decay is divided by the factor of
    the learning rate, so that the schedule's rate times the weight decay is the same for all.
    """
    groups: dict[tuple[bool, Factors], list[nn.Parameter]] = {}
    for param in params:
        is_exempt = cfg.no_decay_norms and param.dim() < 2
        groups.setdefault((is_exempt, factors_by_id.get(id(param), Factors())), []).append(param)
    return [
        {
            "params": members,
            **({} if factors == Factors() else _scaled_settings(cfg, factors)),
            **({"weight_decay": 0.0} if is_exempt else {}),
        }
        for (is_exempt, factors), members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _scaled_settings(cfg: OptimConfig, factors: Factors) -> dict[str, float]:
    return {
        LR_FACTOR: factors.lr,
        "lr": cfg.lr * factors.lr,
        "weight_decay": cfg.wd / factors.lr,
        "eps": cfg.eps * factors.eps,
    }


def _embedding_and_head_ids(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of embeddings and of the head; the model may be wrapped."""
    modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    head = next((getter() for getter in getters if callable(getter)), None)
    if isinstance(head, nn.Module):
        modules.append(head)
    return {id(param) for module in modules for param in module.parameters()}


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the total 2-norm of all gradients, a float32 scalar.

    Each element of a gradient counts once, however many ranks hold it and over whichever meshes the parameters are
    sharded. The norm is bitwise equal on all ranks. In a single process it equals torch's, except for gradients in half
    precision, whose norms torch rounds to their dtype, and for large gradients on a CPU, see `total_norm`. Collective;
    does not synchronize with the device.
    """
    grads = [param.grad for param in parameters if param.grad is not None]
    if not grads:
        return torch.zeros(())
    by_copies: dict[int, list[Tensor]] = {}
    for grad in grads:
        by_copies.setdefault(_num_copies(grad), []).append(local_tensor(grad))
    # In float64 the square of a float32 and its root are exact.
    squares = [total_norm(shards).double().square() / copies for copies, shards in by_copies.items()]
    return sum_over_ranks(torch.stack(squares).sum().to(compute_device(grads[0]))).sqrt().float()


def _num_copies(tensor: Tensor) -> int:
    """Return the number of ranks that hold the same local shard of a tensor as this rank."""
    copies = dist.get_world_size() if dist.is_initialized() else 1
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            copies //= 1 if placement.is_replicate() else size
    return copies


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the total 2-norm of tensors on one device, a float32 scalar (float64 for float64 tensors)."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    if tensors[0].device.type == "cpu":
        # On a CPU torch sums the squares sequentially, which loses 0.3 % for 40 million float32 values.
        tensors = [chunk for tensor in tensors for chunk in tensor.flatten().split(_CPU_NORM_CHUNK)]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)))


@torch.no_grad()
def step_unless_skipped(
    optimizer: Optimizer, skip: Tensor, grad_norm: Tensor | None = None, max_norm: float | None = None
) -> None:
    """Take an optimizer step, unless `skip` (a bool scalar on the device) is true.

    A skipped step does not change parameters, moments or step counts. The optimizers of this module decide on the
    device; for an optimizer that cannot, the host waits for `skip`. Afterwards the gradients are undefined.

    Args:
        grad_norm: the result of `gradient_norm`.
        max_norm: scale all gradients so that their norm is at most this. The optimizers of this module divide each
            gradient where they read it, so that clipping takes no pass of its own over the gradients.
    """
    divisor = None
    if grad_norm is not None and max_norm is not None:
        divisor = ((grad_norm + 1e-6) / max_norm).clamp(min=1.0)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if not bool(skip):
            _divide_gradients(optimizer, divisor)
            optimizer.step()
        return
    # The same interface as between GradScaler and fused optimizers. Offloaded parameters are updated on the host.
    device = local_tensor(optimizer.param_groups[0]["params"][0]).device
    attributes = {"found_inf": skip.float().to(device), "grad_scale": None if divisor is None else divisor.to(device)}
    vars(optimizer).update(attributes)
    try:
        optimizer.step()
    finally:
        for name in attributes:
            delattr(optimizer, name)


def _divide_gradients(optimizer: Optimizer, divisor: Tensor | None) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    if divisor is not None:
        for param in params:
            grad = local_tensor(param.grad)
            grad.div_(divisor.to(grad.device))
