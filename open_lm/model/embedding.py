"""Token embeddings with a constant factor, and dropout.

Legend: B batch, T sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """Embeddings times `scale`, which is rounded to their dtype first (as in Gemma)."""

    def __init__(self, vocab_size: int, dim: int, scale: float = 1.0) -> None:
        super().__init__(vocab_size, dim)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B,T) int64 -> (B,T,D)."""
        return self.scaled(super().forward(ids))

    def scaled(self, embeddings: Tensor) -> Tensor:
        """Scale embeddings (B,T,D)."""
        return embeddings if self.scale == 1.0 else embeddings * embeddings.new_full((), self.scale)


def dropout(share: float) -> nn.Module:
    """Return dropout of a share of the features, which draws no random numbers if the share is 0."""
    return nn.Dropout(share) if share else nn.Identity()
