"""Feed-forward networks, by the names of --ffn-type. Mixtures of experts are in mixture_of_experts.py.

Legend: B batch, T sequence, D model width, F hidden width of the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.architecture import gated_width
from open_lm.errors import ConfigError
from open_lm.kernels.gating import gated_silu
from open_lm.kernels.linear import FusedLinear, Linear


class SwiGLU(nn.Module):
    """silu(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202), gate and up in one matrix, no biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = FusedLinear(dim, 2 * hidden_dim, parts=2)
        self.w3 = Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,D) -> (B,T,D)."""
        return self.w3(gated_silu(self.w12(x)))


class GeGLU(nn.Module):
    """gelu(gate) * up (Shazeer 2020), three matrices with biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim)
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,D) -> (B,T,D)."""
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def _swiglu(dim: int) -> nn.Module:
    return SwiGLU(dim, gated_width(dim))


def _geglu(dim: int) -> nn.Module:
    return GeGLU(dim, gated_width(dim))


def _gelu(dim: int) -> nn.Module:
    return nn.Sequential(Linear(dim, 4 * dim, bias=False), nn.GELU(), Linear(4 * dim, dim, bias=False))


# swiglu and swiglu_torch named two kernels of one network, with the same weights.
FEED_FORWARDS: dict[str, Callable[[int], nn.Module]] = {
    "swiglu": _swiglu,
    "swiglu_torch": _swiglu,
    "gelu": _gelu,
    "gemma_geglu": _geglu,
}


def get_feed_forward(ffn_type: str, dim: int) -> nn.Module:
    """A new feed-forward network (B,T,D) -> (B,T,D). ConfigError for an unknown name."""
    if ffn_type not in FEED_FORWARDS:
        raise ConfigError(f"--ffn-type {ffn_type}: expected one of {', '.join(FEED_FORWARDS)}")
    return FEED_FORWARDS[ffn_type](dim)
