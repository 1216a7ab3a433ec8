"""Feed-forward networks, selected by --ffn-type. Mixtures of experts are in mixture_of_experts.py.

Legend: B batch, T sequence, D model width, F hidden width of the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.registry import FEED_FORWARDS
from open_lm.kernels.gating import gated_silu
from open_lm.kernels.linear import FusedLinear, Linear


class GatedUnit(nn.Module):
    """activation(gate) * up; one matrix computes gate and up (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    `gated` maps (…,2F), gate and up, to their gated product (…,F).
    """

    def __init__(self, dim: int, hidden_dim: int, bias: bool, gated: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w12 = FusedLinear(dim, 2 * hidden_dim, parts=2, bias=bias)
        self.w3 = Linear(hidden_dim, dim, bias=bias)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B,T,D) -> (B,T,D)."""
        return self.w3(self.gated(self.w12(x)))


class GeGLU(nn.Module):
    """gelu(gate) * up with separate matrices for gate and up (Shazeer 2020)."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B,T,D) -> (B,T,D)."""
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


# Two names of one network with the same weights. They used to select different kernels.
@FEED_FORWARDS.register(
    "swiglu_torch", help="SwiGLU without biases", hidden="gated", inputs={"w12": 2}, outputs=("w3",)
)
@FEED_FORWARDS.register("swiglu", help="SwiGLU without biases", hidden="gated", inputs={"w12": 2}, outputs=("w3",))
def _swiglu(dim: int, hidden_dim: int, bias: bool) -> nn.Module:
    return GatedUnit(dim, hidden_dim, bias, gated_silu)


def gated_gelu_tanh(gate_up: Tensor) -> Tensor:
    """Return gelu(first half) * second half of gate_up (…,2F) -> (…,F), with the tanh approximation of GELU."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


@FEED_FORWARDS.register(
    "geglu_tanh",
    help="GeGLU with the tanh approximation of GELU, without biases",
    hidden="gated",
    inputs={"w12": 2},
    outputs=("w3",),
)
def _geglu_tanh(dim: int, hidden_dim: int, bias: bool) -> nn.Module:
    return GatedUnit(dim, hidden_dim, bias, gated_gelu_tanh)


@FEED_FORWARDS.register(
    "gemma_geglu",
    help="GeGLU with biases",
    hidden="gated",
    inputs={"gate_proj": 1, "up_proj": 1},
    outputs=("down_proj",),
    bias=True,
)
def _geglu(dim: int, hidden_dim: int, bias: bool) -> nn.Module:
    return GeGLU(dim, hidden_dim, bias)


@FEED_FORWARDS.register(
    "gelu", help="two matrices with GELU in between, without biases", hidden="4x", inputs={"0": 1}, outputs=("2",)
)
def _gelu(dim: int, hidden_dim: int, bias: bool) -> nn.Module:
    return nn.Sequential(Linear(dim, hidden_dim, bias=bias), nn.GELU(), Linear(hidden_dim, dim, bias=bias))


@FEED_FORWARDS.register(
    "gelu_tanh",
    help="two matrices with the tanh approximation of GELU in between, without biases",
    hidden="4x",
    inputs={"w1": 1},
    outputs=("w2",),
)
class TanhMLP(nn.Module):
    """Two matrices with the tanh approximation of GELU in between (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden_dim, bias=bias)
        self.w2 = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B,T,D) -> (B,T,D)."""
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


def get_feed_forward(ffn_type: str, dim: int, hidden_dim: int, bias: bool = False) -> nn.Module:
    """Create a feed-forward network (B,T,D) -> (B,T,D). Raises ConfigError for an unknown name."""
    network: nn.Module = FEED_FORWARDS.get(ffn_type)(dim, hidden_dim, bias)
    return network
