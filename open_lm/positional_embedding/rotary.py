"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864) in the three forms that models use.

Pair i of a head's K features turns by the angle position * 10000^(-2i/K). Angles and rotations are computed in float32
whatever the model's type, since a half-precision angle is wrong by whole radians at position 2000.
Legend: B batch, T sequence, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

BASE = 10000.0


def inverse_frequencies(head_width: int, device: torch.device | None = None) -> Tensor:
    """Angle of each pair of features for one position: (K/2,) float32."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    return 1.0 / (BASE**exponents)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + K/2) of x (B,T,H,K) by angles whose cos and sin (float32) broadcast to (B,T,H,K/2)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of x (B,T,H,K) by angles whose cos and sin (float32) broadcast to (B,T,H,K/2)."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


class Rotary(nn.Module):
    """Rotation by the token's position, features paired across the two halves of a head (as GPT-NeoX).

    The buffer inv_freq (K/2,) is part of the state dict, as existing checkpoints hold it. It stays float32.
    """

    inv_freq: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.register_buffer("inv_freq", inverse_frequencies(head_width))

    def reset_buffers(self) -> None:
        """Recompute what is not learned, after the module was materialised from the meta device."""
        self.inv_freq = inverse_frequencies(self.head_width, self.inv_freq.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        frequencies = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:  # model.half() and the like must not round the frequencies
            self.inv_freq = frequencies.to(self.inv_freq.device)
        return self

    def angles(self, q: Tensor, positions: Tensor) -> Tensor:
        """Angles that broadcast to (B,T,H,K/2), float32, of the rows of q at integer positions (T,) or (B,T)."""
        return (positions[..., None] * self.inv_freq)[..., None, :]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys.

        Args:
            q, k, v: (B,T,H,K) float.
            positions: (T,) or (B,T) int64, the positions of the rows of q and k.

        Returns:
            q, k in v's type, and v.
        """
        angles = self.angles(q, positions)
        cos, sin = angles.cos(), angles.sin()
        return rotate_halves(q, cos, sin).to(v.dtype), rotate_halves(k, cos, sin).to(v.dtype), v


class HeadRotary(Rotary):
    """Rotation by the index of the head in place of the position: a slip of early models, kept so that they run.

    Such models see order only through the causal mask.
    """

    def angles(self, q: Tensor, positions: Tensor) -> Tensor:
        heads = torch.arange(q.shape[2], device=q.device)
        return heads[:, None] * self.inv_freq


class LlamaRotary(nn.Module):
    """Rotation by the token's position, neighbouring features paired (as Meta's Llama weights). No state."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Rotary.forward`."""
        angles = (positions[..., None] * inverse_frequencies(self.head_width, q.device))[..., None, :]
        cos, sin = angles.cos(), angles.sin()
        return rotate_neighbours(q, cos, sin).to(v.dtype), rotate_neighbours(k, cos, sin).to(v.dtype), v
