"""Split the parameters of single modules over a mesh of ranks, for tensor and expert parallelism.

A split parameter is a DTensor, and its module reads the local shard.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from open_lm.distributed.sharded_tensor import copy_local_shard


def split_parameters(
    module: nn.Module, mesh: DeviceMesh, dims: Mapping[str, int | None], gradient_scale: float = 1.0
) -> None:
    """Convert a module's direct parameters to DTensors, split along dims.get(name), or replicated if that is None.

    The module then reads its local shards. If its weight is split along dimension 1, its output is a partial sum, so it
    reads a bias of zeros on all ranks except the first. Gradients are multiplied by `gradient_scale`.
    """
    parts = getattr(module, "parts", 1)
    properties: dict[str, Any] = {}
    for name, parameter in list(module.named_parameters(recurse=False)):
        dim = dims.get(name)
        placement: Placement = Replicate() if dim is None else Shard(dim)
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] //= mesh.size()
        local = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        split = DTensor.from_local(local, mesh, [placement], run_check=False)
        if not parameter.is_meta:
            copy_local_shard(split, parameter.detach(), parts)
        module.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))
        zero = name == "bias" and dims.get("weight") == 1 and mesh.get_local_rank() > 0
        properties[name] = _local_shard_property(name, Partial() if dim is None else placement, zero, gradient_scale)
    if properties:
        override_attributes(module, **properties)


@functools.cache
def _local_shard_property(name: str, gradient: Placement, zero: bool, gradient_scale: float) -> property:
    """Return a property that reads the local shard of a parameter, as zeros if `zero`.

    While FSDP2 has the parameter sharded (a mesh of more than one dimension), it reads the DTensor itself.
    """

    def local_shard(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
            return parameter
        local = parameter.to_local(grad_placements=[gradient])
        if gradient_scale != 1.0:
            local = _ScaledGradient.apply(local, gradient_scale)
        return local * 0.0 if zero else local

    return property(local_shard)


def override_attributes(module: nn.Module, **attributes: Any) -> None:
    """Override attributes of a module by a subclass of its class; parameter names and isinstance checks stay valid."""
    base: Any = type(module)
    module.__class__ = _subclass(base, tuple(attributes.items()))


@functools.cache  # torch.compile reuses the graph of a block only if its modules have the same classes
def _subclass(base: type, attributes: tuple[tuple[str, Any], ...]) -> type:
    return type(base.__name__, (base,), dict(attributes))


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose backward pass multiplies the gradient by a number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None
