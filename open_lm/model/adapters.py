"""Low-rank adapters (LoRA, DoRA, rsLoRA) of the linear layers of a model whose own weights are frozen.

A layer keeps its class, name and weight. Its submodule `adapter` adds an update to its output:

    LoRA   W x + s B A x
    DoRA   m / |W + s B A| (W x + s B A x), with the norm of each row, which is constant in the backward pass

A layer that fuses several matrices (`FusedLinear`) has a separate adapter for each of them. Their A are stacked along
the rows of `lora_A`, their B along those of `lora_B`, so that the rows of lora_B and of the weight correspond.
Legend: B batch, T sequence, I input width, O output width of the layer, P fused matrices, r rank, s scale.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from open_lm.config.adapters import LoraSettings
from open_lm.distributed.sharded_tensor import local_tensor
from open_lm.errors import ConfigError
from open_lm.model.embedding import dropout
from open_lm.model.quantization import quantize_layer

_ATTENTION = ("attention", "attn")  # in the names of modules of this package and of transformers
_MAX_LISTED = 12


class Adapter(nn.Module):
    """The adapter of one linear layer.

    Parameters, in float32: lora_A (P r, I), lora_B (O, r), and with DoRA lora_magnitude (O,).

    Attributes:
        parts: P.
        tensor_mesh: the mesh whose ranks split the columns of the layer's weight; None without such a split.
    """

    def __init__(self, layer: Any, settings: LoraSettings) -> None:
        super().__init__()
        outputs, inputs = layer.out_features, layer.in_features
        self.settings, self.parts = settings, getattr(layer, "parts", 1)
        self.tensor_mesh: DeviceMesh | None = None
        self.lora_A = nn.Parameter(torch.empty(self.parts * settings.r, inputs))
        self.lora_B = nn.Parameter(torch.empty(outputs, settings.r))
        if settings.dora:
            self.lora_magnitude = nn.Parameter(torch.empty(outputs))
        self.dropout = dropout(settings.dropout)

    def extra_repr(self) -> str:
        return self.settings.text()

    def update(self, x: Tensor) -> Tensor:
        """Return s B A x (B,T,O) for inputs (B,T,I) of the layer, with dropout of x in training."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        inner = F.linear(self.dropout(x), self.lora_A)
        if self.parts == 1:
            return F.linear(inner, self.lora_B) * self.settings.scale
        pairs = zip(inner.chunk(self.parts, dim=-1), self.lora_B.chunk(self.parts), strict=True)
        return torch.cat([F.linear(part, matrix) for part, matrix in pairs], dim=-1) * self.settings.scale

    def adapted(self, output: Tensor, x: Tensor, layer: Any) -> Tensor:
        """Return the output (B,T,O) of the layer with its adapter, for the output of the layer's own weight."""
        update = self.update(x)
        if self.settings.dora:
            ratio = self.lora_magnitude / self.row_norms(layer.weight)
            unbiased = output if layer.bias is None else output - layer.bias
            update = (ratio - 1) * unbiased + ratio * update
        return (output + update).to(output.dtype)

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """Return the norms (O,) float32 of the rows of W + s B A."""
        update = low_rank_product(self.lora_A.float(), self.lora_B.float(), self.parts) * self.settings.scale
        return self._norms(weight.float() + update)

    def _norms(self, matrix: Tensor) -> Tensor:
        if self.tensor_mesh is None:
            return torch.linalg.vector_norm(matrix, dim=1)
        squares = matrix.square().sum(1)
        dist.all_reduce(squares, group=self.tensor_mesh.get_group())
        return squares.sqrt()

    @torch.no_grad()
    def reset_magnitude(self, layer: Any) -> None:
        """Set the magnitudes to the norms of the rows of W, from this rank's shards of both."""
        weight = layer._parameters.get("weight")  # without the properties of sharded and quantized layers
        norms = self._norms((layer.weight if weight is None else local_tensor(weight)).float())
        magnitude = self._parameters["lora_magnitude"]
        assert magnitude is not None
        local_tensor(magnitude).copy_(norms)


def low_rank_product(lora_a: Tensor, lora_b: Tensor, parts: int) -> Tensor:
    """Return B A (O,I) of a layer with P = `parts` fused matrices: lora_a (P r, I), lora_b (O, r)."""
    return torch.cat([b @ a for a, b in zip(lora_a.chunk(parts), lora_b.chunk(parts), strict=True)])


def merged_weight(weight: Tensor, adapter: dict[str, Tensor], settings: LoraSettings) -> Tensor:
    """Return the weight (O,I) of a layer that computes the same as the layer with its adapter, in the weight's dtype.

    The sum is computed in float32 (in float64 for a float64 weight). adapter: the parameters of `Adapter` by name.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lora_a, lora_b = adapter["lora_A"].to(dtype), adapter["lora_B"].to(dtype)
    merged = weight.to(dtype) + low_rank_product(lora_a, lora_b, len(lora_a) // settings.r) * settings.scale
    if settings.dora:
        merged *= (adapter["lora_magnitude"].to(dtype) / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged.to(weight.dtype)


# ---------------------------------------------------------------------------------------------- models
def add_adapters(model: nn.Module, settings: LoraSettings, seed: int = 0, quantize: bool = False) -> None:
    """Freeze a native or transformers model, and add adapters to the layers that `settings.targets` selects.

    The adapters of a model that is not on the meta device are initialized. quantize: store the weights of all linear
    layers of the blocks in 4 bits.

    Raises:
        ConfigError: the model has no such layer.
    """
    targets = target_layers(model, settings.targets)
    if not targets:
        kinds = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
        raise ConfigError(
            f"--lora targets={settings.targets}: the model has no such layer of class Linear; its layers are of the "
            f"classes {', '.join(kinds[:_MAX_LISTED])}"
        )
    model.requires_grad_(False)
    if quantize:
        for layer in target_layers(model, "all-linear").values():
            quantize_layer(layer)
    for name, layer in targets.items():
        device = next(itertools.chain(layer.parameters(), layer.buffers())).device
        with device:
            layer.add_module("adapter", Adapter(layer, settings))
        base: Any = type(layer)
        layer.__class__ = _adapted_class(base)
        if device.type == "meta":
            continue
        for parameter_name, parameter in layer.adapter.named_parameters():
            fill_adapter(parameter, f"{name}.adapter.{parameter_name}", seed)
        if settings.dora:
            layer.adapter.reset_magnitude(layer)


def target_layers(model: nn.Module, targets: str) -> dict[str, Any]:
    """Return the linear layers that --lora targets=… selects, by name: those of attention, or all of the blocks.

    Neither the head of the vocabulary nor the router of a mixture of experts has an adapter.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".router" not in name and not name.endswith(".gate")
    }
    if targets == "attention":
        layers = {name: layer for name, layer in layers.items() if any(word in name for word in _ATTENTION)}
    return layers


def adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names of the layers with adapters, and the layers; a layer with two names once."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "adapter", None), Adapter):
            yield name, module


def has_adapters(model: nn.Module) -> bool:
    return next(adapters(model), None) is not None


@functools.cache  # torch.compile reuses the graph of a block only if its modules have the same classes
def _adapted_class(base: Any) -> Any:
    """Return a subclass of a linear layer's class whose output includes the adapter's update."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        return layer.adapter.adapted(base.forward(layer, x), x, layer)

    return type(base.__name__, (base,), {"forward": forward})


# ---------------------------------------------------------------------------------------------- initialization
def reset_magnitudes(model: nn.Module) -> None:
    """Set the magnitudes of DoRA from the loaded weights, so that the model computes the same as without adapters."""
    for _, layer in adapters(model):
        if layer.adapter.settings.dora:
            layer.adapter.reset_magnitude(layer)


@torch.no_grad()
def fill_adapter(parameter: Tensor, name: str, seed: int) -> None:
    """Initialize a full parameter of an adapter: A uniform within 1/sqrt(I), B zero, so that the update is zero.

    The values of A depend on the seed and the name only. Magnitudes: see `reset_magnitudes`.
    """
    if not name.endswith("lora_A"):
        parameter.zero_()
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
    limit = 1 / math.sqrt(parameter.shape[1])
    parameter.uniform_(-limit, limit, generator=generator)
