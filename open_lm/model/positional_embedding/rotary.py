"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864) in the three forms that models use.

Pair i of a head's K features turns by the angle position * 10000^(-2i/K). Angles and rotations are computed in float32
whatever the model's type, since a half-precision angle is wrong by whole radians at position 2000.
Legend: B batch, T sequence, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from open_lm.kernels.cache_blocks import row_blocks
from open_lm.kernels.native import elements

BASE = 10000.0


def inverse_frequencies(head_width: int, device: torch.device | None = None) -> Tensor:
    """Angle of each pair of features for one position: (K/2,) float32."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    return 1.0 / (BASE**exponents)


class Angles:
    """cos and sin (float32) of the angles by which pairs turn, broadcasting to (B,T,H,K/2): the same for all layers, so
    computed once for a forward pass.

    Neither tuple nor dataclass: in those FSDP2 rounds what a block is given to the type of its parameters.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin


def _angles(angles: Tensor) -> Angles:
    return Angles(angles.cos(), angles.sin())


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Views (…,K/2) of the pairs (i, i + K/2) of x (…,K)."""
    first, second = x.chunk(2, dim=-1)
    return first, second


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Views (…,K/2) of the pairs (2i, 2i + 1) of x (…,K)."""
    return x[..., ::2], x[..., 1::2]


Pairs = Callable[[Tensor], tuple[Tensor, Tensor]]


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate pairs (i, i + K/2) of x (B,T,H,K) by angles whose cos and sin (float32) broadcast to (B,T,H,K/2).

    Computed in float32 (float64 of float64) and returned in dtype, by default the one computed in.
    """
    if torch.compiler.is_compiling():
        first, second = _halves(_wide(x))
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned if dtype is None else turned.to(dtype)
    out: Tensor = _Rotation.apply(x, cos, sin, _halves, dtype)
    return out


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `rotate_halves`, for the pairs (2i, 2i + 1)."""
    if torch.compiler.is_compiling():
        first, second = _neighbours(_wide(x))
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
        return turned if dtype is None else turned.to(dtype)
    out: Tensor = _Rotation.apply(x, cos, sin, _neighbours, dtype)
    return out


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Rotation(torch.autograd.Function):
    """Rotation in few passes over memory. Without it autograd's chain of products, sums and copies, each with an
    intermediate of its own, takes four times as long on a CPU; a compiler fuses that chain by itself."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd takes no keywords)
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs, dtype: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs, ctx.dtype = pairs, x.dtype
        return _rotate(x, cos, sin, pairs, dtype or _wide(x[:0]).dtype, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, ctx.pairs, ctx.dtype, back=True), None, None, None, None


def _rotate(  # noqa: PLR0917 (as _Rotation)
    x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs, dtype: torch.dtype, back: bool
) -> Tensor:
    """x (B,T,H,K), rotated, in dtype; a few tokens at a time on a CPU."""
    if dtype == x.dtype and elements.takes_rows(x) and cos.stride() == sin.stride() and cos.stride(-1) == 1:
        return elements.turned(x, cos, sin, back=back, neighbours=pairs is _neighbours)
    sin = -sin if back else sin
    batch, length, heads, width = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (part.expand(batch, length, heads, width // 2) for part in (cos, sin))
    for row in range(batch) if x.device.type == "cpu" else (slice(None),):
        for tokens in row_blocks(length, heads * width * wide.itemsize, x.device):
            place = (row, tokens)
            source = x[place].to(wide)
            turned = torch.empty_like(source)
            (first, second), (one, other) = pairs(source), pairs(turned)
            torch.mul(first, cos[place], out=one).addcmul_(second, sin[place], value=-1)
            torch.mul(second, cos[place], out=other).addcmul_(first, sin[place])
            out[place] = turned
    return out


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

    def angles(self, positions: Tensor, heads: int) -> Angles:
        """Of tokens at integer positions (T,) or (B,T), for so many heads."""
        return _angles((positions[..., None] * self.inv_freq)[..., None, :])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys.

        Args:
            q, k, v: (B,T,H,K) float.
            angles: of the rows of q and k.

        Returns:
            q, k in v's type, and v.
        """
        cos, sin = angles.cos, angles.sin
        return rotate_halves(q, cos, sin, v.dtype), rotate_halves(k, cos, sin, v.dtype), v


class HeadRotary(Rotary):
    """Rotation by the index of the head in place of the position: a slip of early models, kept so that they run.

    Such models see order only through the causal mask.
    """

    def angles(self, positions: Tensor, heads: int) -> Angles:
        return _angles(torch.arange(heads, device=positions.device)[:, None] * self.inv_freq)


class LlamaRotary(nn.Module):
    """Rotation by the token's position, neighbouring features paired (as Meta's Llama weights). No state."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width

    def angles(self, positions: Tensor, heads: int) -> Angles:
        """As `Rotary.angles`."""
        return _angles((positions[..., None] * inverse_frequencies(self.head_width, positions.device))[..., None, :])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """As `Rotary.forward`."""
        cos, sin = angles.cos, angles.sin
        return rotate_neighbours(q, cos, sin, v.dtype), rotate_neighbours(k, cos, sin, v.dtype), v
