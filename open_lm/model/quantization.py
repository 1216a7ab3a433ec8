"""Linear layers whose frozen weight is stored in 4 bits (QLoRA).

NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) stores each value as one of 16 quantiles of the normal
distribution, times the largest value of its block of 64. These block maxima are quantized as well, to 8 bits in blocks
of 256: 4.13 bits per value. The weight is dequantized for each product, forward and backward, and not kept.
Legend: B batch, T sequence, I input width, O output width, N = O I values.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from open_lm.distributed.param_names import clean_name
from open_lm.errors import ConfigError

_BLOCK, _OUTER_BLOCK = 64, 256  # values per block maximum, and block maxima per scale


def quantize_layer(layer: Any) -> None:
    """Replace the weight of a linear layer by a 4-bit one, in place; on the meta device without values.

    The buffers, which checkpoints do not contain: nf4 (N/2, 1) uint8, two values each; block_maxima (N/64,) uint8;
    block_scales int32, the bits of float32 numbers (so that a cast of the model does not change them): the offset of
    the block maxima, then their scales.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    check_available()
    weight = layer.weight.detach()
    num_blocks = -(-weight.numel() // _BLOCK)
    sizes = {"nf4": ((-(-weight.numel() // 2), 1), torch.uint8), "block_maxima": ((num_blocks,), torch.uint8)}
    sizes["block_scales"] = ((1 + -(-num_blocks // _OUTER_BLOCK),), torch.int32)
    del layer.weight
    for name, (shape, dtype) in sizes.items():
        layer.register_buffer(name, torch.empty(shape, dtype=dtype, device=weight.device), persistent=False)
    base: Any = type(layer)
    layer.__class__ = _quantized_class(base)
    if not weight.is_meta:
        layer.set_weight(weight)


def check_available() -> None:
    """Raise ConfigError if bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--qlora requires bitsandbytes ({error}): install it with pip install -e '.[finetune]'"
        ) from error


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers with a 4-bit weight by the clean name of the weight."""
    return {
        clean_name(f"{name}.weight"): module
        for name, module in model.named_modules()
        if hasattr(module, "block_scales")
    }


@functools.cache  # torch.compile reuses the graph of a block only if its modules have the same classes
def _quantized_class(base: Any) -> Any:
    """Return a subclass of a linear layer's class with a 4-bit weight."""

    def weight(layer: Any) -> Tensor:
        return dequantize(layer, torch.float32)

    def set_weight(layer: Any, full: Tensor) -> None:
        """Quantize a weight (O,I) of any floating-point dtype."""
        from bitsandbytes.functional import quantize_4bit

        # As a vector: on a CPU, bitsandbytes 0.50 dequantizes matrices wrongly if a row is no multiple of the block.
        values = full.to(layer.nf4.device).reshape(-1)
        packed, state = quantize_4bit(values, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
        layer.nf4.copy_(packed)
        layer.block_maxima.copy_(state.absmax)
        scales = torch.cat([state.offset.float().reshape(1), state.state2.absmax.float()])
        layer.block_scales.copy_(scales.view(torch.int32))

    def forward(layer: Any, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out: Tensor = _QuantizedProduct.apply(x.to(dtype), layer)
        return out if layer.bias is None else out + layer.bias.to(dtype)

    members = {"weight": property(weight), "set_weight": set_weight, "forward": forward}
    return type(base.__name__, (base,), members)


def dequantize(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight (O,I) of a layer of `quantize_layer`."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    nf4_values, dynamic_values = _code_tables(layer.nf4.device)
    scales = layer.block_scales.view(torch.float32)
    outer = QuantState(absmax=scales[1:], blocksize=_OUTER_BLOCK, code=dynamic_values, dtype=torch.float32)
    state = QuantState(
        absmax=layer.block_maxima,
        shape=torch.Size((layer.out_features * layer.in_features,)),
        code=nf4_values,
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=scales[0],
        state2=outer,
    )
    weight: Tensor = dequantize_4bit(layer.nf4, state).view(layer.out_features, layer.in_features)
    return weight


@functools.cache
def _code_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 16 values of NF4 and the 256 values of the 8-bit block maxima."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    return get_4bit_type("nf4", device=device), create_dynamic_map().to(device)


class _QuantizedProduct(torch.autograd.Function):
    """x (B,T,I) times the weight of a layer of `quantize_layer` -> (B,T,O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return F.linear(x, dequantize(layer, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ dequantize(ctx.layer, grads[0].dtype), None
