"""Normalization layers, selected by --model-norm.

Legend: B batch, T sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.registry import NORMS


class LayerNorm(nn.Module):
    """Layer normalization with optional gain and optional bias (Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, elementwise_gain: bool = True, elementwise_bias: bool = True
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,)
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(normalized_shape)) if elementwise_gain else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(normalized_shape)) if elementwise_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…, D) float -> (…, D); under autocast the computation and the result are float32."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape[0]}, eps={self.eps}, gain={self.weight is not None}, bias={self.bias is not None}"
        )


@NORMS.register(
    "lp_layer_norm",
    help="layer norm with gain and bias, computed in the autocast type",
    parameters=("weight", "bias"),
    computes_in="autocast",
)
class LPLayerNorm(LayerNorm):
    """LayerNorm in the autocast dtype, which saves memory traffic. Without autocast it equals LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…, D) float -> (…, D) in the autocast dtype if autocast is on, else in the dtype of x."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


@NORMS.register("rms_norm", help="root-mean-square norm with a gain", parameters=("weight",), computes_in="float32")
class RmsNorm(nn.Module):
    """Root-mean-square normalization in float32 (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…, D) float -> (…, D)."""
        x_float = x.float()
        scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (x_float * scale).type_as(x) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


@NORMS.register(
    "gemma_rms_norm",
    help="root-mean-square norm with the gain 1 + weight",
    parameters=("weight",),
    computes_in="float32",
)
class GemmaRmsNorm(nn.Module):
    """Root-mean-square normalization whose gain is 1 + weight, computed in float32, also the product with the gain."""

    gain_offset = 1.0

    def __init__(self, normalized_shape: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…, D) float -> (…, D) in the dtype of x."""
        x_float = x.float()
        scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (x_float * scale * (1.0 + self.weight.float())).type_as(x)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


NormFactory = Callable[..., nn.Module]

NORMS.register("default_layer_norm", help="torch's layer norm with gain and bias", parameters=("weight", "bias"))(
    nn.LayerNorm
)
NORMS.register(
    "gain_only_lp_layer_norm", help="lp_layer_norm without a bias", parameters=("weight",), computes_in="autocast"
)(partial(LPLayerNorm, elementwise_bias=False))
NORMS.register("gain_only_layer_norm", help="layer norm without a bias", parameters=("weight",))(
    partial(LayerNorm, elementwise_bias=False)
)
NORMS.register("no_wb_layer_norm", help="layer norm without gain and bias", parameters=())(
    partial(LayerNorm, elementwise_gain=False, elementwise_bias=False)
)


def get_norm_class(model_norm: str) -> NormFactory:
    """Return the factory `norm(width, eps=…)` that --model-norm selects. Raises ConfigError for an unknown name."""
    return NORMS.get(model_norm)
