"""No position embedding: the model sees the order of tokens only through the causal mask."""

from __future__ import annotations

from torch import Tensor, nn

from open_lm.config.registry import POSITIONAL_EMBEDDINGS
from open_lm.model.positional_embedding.rotary import DEFAULT_ROPE, RopeSettings


@POSITIONAL_EMBEDDINGS.register("none", help="no position embedding", rotates=False)
class NoPositions(nn.Module):
    """Queries and keys without positions (Kazemnejad et al. 2023, https://arxiv.org/abs/2305.19466)."""

    def __init__(self, head_width: int, rope: RopeSettings = DEFAULT_ROPE) -> None:
        super().__init__()

    def angles(self, positions: Tensor, heads: int, lengths: Tensor | None = None) -> None:
        """Return None: there is nothing to rotate by."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, angles: None) -> tuple[Tensor, Tensor, Tensor]:
        """Map q, k, v (B,T,H,K) -> q and k in the dtype of v, and v."""
        return q.to(v.dtype), k.to(v.dtype), v
