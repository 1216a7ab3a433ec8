"""No position embedding: order is seen only through the causal mask."""

from __future__ import annotations

from torch import Tensor, nn


class NoPositions(nn.Module):
    """Hands queries and keys through. https://arxiv.org/abs/2305.19466"""

    def __init__(self, head_width: int) -> None:
        super().__init__()

    def angles(self, positions: Tensor, heads: int) -> None:
        """None."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, angles: None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B,T,H,K) -> q and k in v's type, and v."""
        return q.to(v.dtype), k.to(v.dtype), v
