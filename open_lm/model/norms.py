"""Normalisation layers, by the names of --model-norm.

Legend: B batch, T sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.errors import ConfigError


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016, https://arxiv.org/abs/1607.06450) with gain and bias each optional."""

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
        """x (…, D) float -> (…, D); under autocast computed and returned in float32."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape[0]}, eps={self.eps}, gain={self.weight is not None}, bias={self.bias is not None}"
        )


class LPLayerNorm(LayerNorm):
    """LayerNorm that stays in the autocast type, which saves memory traffic; without autocast the same as LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) float -> (…, D) in the autocast type where autocast is on, else in x's."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class RmsNorm(nn.Module):
    """Root-mean-square normalisation in float32 (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) float -> (…, D)."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


NormFactory = Callable[..., nn.Module]

NORMS: dict[str, NormFactory] = {
    "default_layer_norm": nn.LayerNorm,
    "lp_layer_norm": LPLayerNorm,
    "gain_only_lp_layer_norm": partial(LPLayerNorm, elementwise_bias=False),
    "gain_only_layer_norm": partial(LayerNorm, elementwise_bias=False),
    "no_wb_layer_norm": partial(LayerNorm, elementwise_gain=False, elementwise_bias=False),
    "rms_norm": RmsNorm,
}


def get_norm_class(model_norm: str) -> NormFactory:
    """The factory `norm(width, eps=…)` of a name of --model-norm. ConfigError for an unknown name."""
    if model_norm not in NORMS:
        raise ConfigError(f"--model-norm {model_norm}: expected one of {', '.join(NORMS)}")
    return NORMS[model_norm]
