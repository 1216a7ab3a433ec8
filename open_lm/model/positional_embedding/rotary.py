"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864) in three variants.

Pair i of a head's K features is rotated by the angle position * base^(-2i/K), with base 10000 by default. Angles and
rotations are computed in float32 for every model dtype, because a half-precision angle is wrong by whole radians at
position 2000.
Legend: B batch, T sequence, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from open_lm.config.registry import POSITIONAL_EMBEDDINGS, ROPE_SCALINGS
from open_lm.kernels.cache_blocks import fits_block, row_blocks
from open_lm.kernels.native import elements, evaluation
from open_lm.model.positional_embedding.scalings import scale_frequencies


@dataclass(frozen=True)
class RopeSettings:
    """The frequencies of a rotary embedding.

    Attributes:
        base: base of the angles.
        fraction: share of a head's features, from the first on, that is rotated.
        scaling: `rope_frequency_scaling` of the model's JSON file, or None.
    """

    base: float = 10000.0
    fraction: float = 1.0
    scaling: Mapping[str, Any] | None = None

    def width(self, head_width: int) -> int:
        """Return the number of rotated features of a head."""
        return int(head_width * self.fraction)

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies depend on the length of a sequence."""
        return self.scaling is not None and bool(ROPE_SCALINGS.fact(self.scaling["type"], "by_length", False))


DEFAULT_ROPE = RopeSettings()


def inverse_frequencies(
    width: int,
    device: torch.device | None = None,
    rope: RopeSettings = DEFAULT_ROPE,
    lengths: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Return the rotation angle of each pair of `width` features per position, and the factor of cos and sin.

    The angles are (width/2,) float32, or (B,T,width/2) for `lengths`; see `scale_frequencies`.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return scale_frequencies(1.0 / (rope.base**exponents), rope.base, rope.scaling, lengths)


class Angles:
    """cos and sin (float32) of the rotation angles, broadcasting to (B,T,H,K/2); computed once for all layers.

    This is neither a tuple nor a dataclass because FSDP2 casts tensors in those to the dtype of a block's parameters.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin


def _cos_and_sin(angles: Tensor, factor: float = 1.0) -> Angles:
    cos, sin = angles.cos(), angles.sin()
    return Angles(cos, sin) if factor == 1.0 else Angles(cos * factor, sin * factor)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return views (…,K/2) of the first and second elements of the pairs (i, i + K/2) of x (…,K)."""
    first, second = x.chunk(2, dim=-1)
    return first, second


def _interleaved(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return views (…,K/2) of the first and second elements of the pairs (2i, 2i + 1) of x (…,K)."""
    return x[..., ::2], x[..., 1::2]


Pairs = Callable[[Tensor], tuple[Tensor, Tensor]]


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate pairs (i, i + K/2) of x (B,T,H,K) by angles whose cos and sin (float32) broadcast to (B,T,H,K/2).

    The computation is in float32 (float64 for float64), and so is the result unless dtype is given.
    """
    if torch.compiler.is_compiling():
        first, second = _halves(_widen(x))
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated if dtype is None else rotated.to(dtype)
    return _rotate_eagerly(x, cos, sin, _halves, dtype)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of x; otherwise as `rotate_halves`."""
    if torch.compiler.is_compiling():
        first, second = _interleaved(_widen(x))
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
        return rotated if dtype is None else rotated.to(dtype)
    return _rotate_eagerly(x, cos, sin, _interleaved, dtype)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rotate_eagerly(x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs, dtype: torch.dtype | None) -> Tensor:
    dtype = _widen(x[:0]).dtype if dtype is None else dtype
    if not (x.requires_grad and torch.is_grad_enabled()):
        if pairs is _halves and dtype == x.dtype and evaluation.supports(x, cos) and cos.stride() == sin.stride():
            return evaluation.rotate_halves(x, cos, sin)
        return _rotate(x, cos, sin, pairs, dtype, inverse=False)
    out: Tensor = _Rotation.apply(x, cos, sin, pairs, dtype)
    return out


class _Rotation(torch.autograd.Function):
    """A rotation in few passes over memory.

    Autograd's chain of products, sums and copies, each with its own intermediate, takes four times as long on a CPU.
    Compiled code does not need this class: the compiler fuses the chain.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes no keyword arguments)
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs, ctx.dtype = pairs, x.dtype
        return _rotate(x, cos, sin, pairs, dtype, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, ctx.pairs, ctx.dtype, inverse=True), None, None, None, None


def _rotate(  # noqa: PLR0917 (as _Rotation)
    x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs, dtype: torch.dtype, inverse: bool
) -> Tensor:
    """Return x (B,T,H,K) rotated, in dtype; on a CPU in blocks of tokens."""
    if dtype == x.dtype and elements.supports_rows(x) and cos.stride() == sin.stride() and cos.stride(-1) == 1:
        return elements.rotate(x, cos, sin, inverse=inverse, interleaved=pairs is _interleaved)
    sin = -sin if inverse else sin
    batch, length, heads, width = x.shape
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type != "cpu" or fits_block(x.numel() * compute_dtype.itemsize):
        return _rotate_block(x, cos, sin, pairs, compute_dtype).to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    cos, sin = (table.expand(batch, length, heads, width // 2) for table in (cos, sin))
    for row in range(batch):
        for tokens in row_blocks(length, heads * width * compute_dtype.itemsize, x.device):
            index = (row, tokens)
            out[index] = _rotate_block(x[index], cos[index], sin[index], pairs, compute_dtype)
    return out


def _rotate_block(x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Return x (…,H,K) rotated by angles that broadcast to (…,H,K/2), computed in dtype and contiguous."""
    x = x.to(dtype)
    rotated = torch.empty(x.shape, dtype=dtype, device=x.device)
    (first, second), (out_first, out_second) = pairs(x), pairs(rotated)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return rotated


def _rotate_first(rotate: Callable[..., Tensor], x: Tensor, angles: Angles, dtype: torch.dtype) -> Tensor:
    """Rotate the first features of x (B,T,H,K), as many as the angles cover, and return all features in dtype."""
    width = 2 * angles.cos.shape[-1]
    if width == x.shape[-1]:
        return rotate(x, angles.cos, angles.sin, dtype)
    return torch.cat((rotate(x[..., :width], angles.cos, angles.sin, dtype), x[..., width:].to(dtype)), dim=-1)


@POSITIONAL_EMBEDDINGS.register("rotary", help="rotary embedding of the pairs (i, i + K/2)", rotates=True)
class Rotary(nn.Module):
    """Rotation by the token's position, with pairs across the two halves of a head (as in GPT-NeoX).

    The buffer inv_freq (K/2,) is part of the state dict because existing checkpoints contain it. It stays float32.
    """

    inv_freq: Tensor

    def __init__(self, head_width: int, rope: RopeSettings = DEFAULT_ROPE) -> None:
        super().__init__()
        self.rope, self.width = rope, rope.width(head_width)
        frequencies, self.factor = inverse_frequencies(self.width, rope=rope)
        self.register_buffer("inv_freq", frequencies)

    def reset_buffers(self) -> None:
        """Recompute the frequencies after the module was created on the meta device."""
        self.inv_freq, _ = inverse_frequencies(self.width, self.inv_freq.device, self.rope)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        frequencies = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:  # methods such as model.half() must not round the frequencies
            self.inv_freq = frequencies.to(self.inv_freq.device)
        return self

    def angles(self, positions: Tensor, heads: int, lengths: Tensor | None = None) -> Angles:
        """Return the angles of tokens at integer positions (T,) or (B,T), for `heads` heads.

        lengths: of sequences, for frequencies that depend on them; see `scale_frequencies`.
        """
        frequencies = self.inv_freq
        if lengths is not None:
            frequencies, _ = inverse_frequencies(self.width, positions.device, self.rope, lengths)
        return _cos_and_sin((positions[..., None] * frequencies)[..., None, :], self.factor)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys.

        Args:
            q: queries (B,T,H,K) float.
            k: keys (B,T,H,K) float.
            v: values (B,T,H,K) float, returned unchanged.
            angles: the result of `self.angles`.

        Returns:
            q and k in the dtype of v, and v.
        """
        rotate = partial(_rotate_first, rotate_halves, angles=angles, dtype=v.dtype)
        return rotate(q), rotate(k), v


@POSITIONAL_EMBEDDINGS.register(
    "head_rotary",
    help="rotary embedding whose angles depend on the head instead of the position",
    rotates=True,
    by_head=True,
)
class HeadRotary(Rotary):
    """Rotation by the index of the head instead of the position: a bug of early models, kept for their checkpoints.

    Such models see the order of tokens only through the causal mask.
    """

    def angles(self, positions: Tensor, heads: int, lengths: Tensor | None = None) -> Angles:
        return _cos_and_sin(torch.arange(heads, device=positions.device)[:, None] * self.inv_freq, self.factor)


@POSITIONAL_EMBEDDINGS.register("llama_rotary", help="rotary embedding of the pairs (2i, 2i + 1)", rotates=True)
class LlamaRotary(nn.Module):
    """Rotation by the token's position, with pairs of adjacent features (as in Meta's Llama weights). No state."""

    def __init__(self, head_width: int, rope: RopeSettings = DEFAULT_ROPE) -> None:
        super().__init__()
        self.rope, self.width = rope, rope.width(head_width)

    def angles(self, positions: Tensor, heads: int, lengths: Tensor | None = None) -> Angles:
        """Return the angles; see `Rotary.angles`."""
        frequencies, factor = inverse_frequencies(self.width, positions.device, self.rope, lengths)
        return _cos_and_sin((positions[..., None] * frequencies)[..., None, :], factor)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys; see `Rotary.forward`."""
        rotate = partial(_rotate_first, rotate_interleaved, angles=angles, dtype=v.dtype)
        return rotate(q), rotate(k), v
