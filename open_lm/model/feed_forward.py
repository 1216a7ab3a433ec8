"""Feed-forward networks, selected by --ffn-type. Mixtures of experts are in mixture_of_experts.py.

Legend: B batch, T sequence, D model width, F hidden width of the network.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.architecture import gated_width
from open_lm.config.registry import FEED_FORWARDS
from open_lm.kernels.gating import gated_silu
from open_lm.kernels.linear import FusedLinear, Linear


class SwiGLU(nn.Module):
    """silu(gate) * up without biases; one matrix computes gate and up (Shazeer 2020, arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = FusedLinear(dim, 2 * hidden_dim, parts=2)
        self.w3 = Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B,T,D) -> (B,T,D)."""
        return self.w3(gated_silu(self.w12(x)))


class GeGLU(nn.Module):
    """gelu(gate) * up with biases in all three matrices (Shazeer 2020)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim)
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B,T,D) -> (B,T,D)."""
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


# Two names of one network with the same weights. They used to select different kernels.
@FEED_FORWARDS.register(
    "swiglu_torch", help="SwiGLU without biases", hidden="gated", inputs={"w12": 2}, outputs=("w3",)
)
@FEED_FORWARDS.register("swiglu", help="SwiGLU without biases", hidden="gated", inputs={"w12": 2}, outputs=("w3",))
def _swiglu(dim: int) -> nn.Module:
    return SwiGLU(dim, gated_width(dim))


@FEED_FORWARDS.register(
    "gemma_geglu",
    help="GeGLU with biases",
    hidden="gated",
    inputs={"gate_proj": 1, "up_proj": 1},
    outputs=("down_proj",),
    bias=True,
)
def _geglu(dim: int) -> nn.Module:
    return GeGLU(dim, gated_width(dim))


@FEED_FORWARDS.register(
    "gelu", help="two matrices with GELU in between, without biases", hidden="4x", inputs={"0": 1}, outputs=("2",)
)
def _gelu(dim: int) -> nn.Module:
    return nn.Sequential(Linear(dim, 4 * dim, bias=False), nn.GELU(), Linear(4 * dim, dim, bias=False))


def get_feed_forward(ffn_type: str, dim: int) -> nn.Module:
    """Create a feed-forward network (B,T,D) -> (B,T,D). Raises ConfigError for an unknown name."""
    network: nn.Module = FEED_FORWARDS.get(ffn_type)(dim)
    return network
