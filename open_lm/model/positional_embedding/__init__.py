"""Position embeddings, selected by --positional-embedding-type.

All share one interface: `angles = embed.angles(positions, heads, lengths)`, computed once for all layers, and
`embed(q, k, v, angles) -> (q, k, v)` on (B,T,H,K) tensors.
Legend: B batch, T sequence, P cached positions, D model width, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_lm.config.registry import POSITIONAL_EMBEDDINGS
from open_lm.errors import ConfigError
from open_lm.kernels.document_attention import DocumentMask
from open_lm.model.positional_embedding.rotary import DEFAULT_ROPE, Angles, RopeSettings

__all__ = [
    "POSITIONAL_EMBEDDINGS",
    "Angles",
    "RopeSettings",
    "get_positional_embedding",
    "sequence_lengths",
    "token_positions",
]


def get_positional_embedding(name: str, head_width: int, rope: RopeSettings = DEFAULT_ROPE) -> nn.Module:
    """Create a position embedding for heads of width K.

    Raises:
        ConfigError: an unknown name, or an odd number of features for an embedding that rotates pairs of them.
    """
    if POSITIONAL_EMBEDDINGS.fact(name, "rotates"):
        if head_width % 2:
            raise ConfigError(
                f"--positional-embedding-type {name}: the head width (head_dim, or else hidden_dim // n_heads) is "
                f"{head_width}, but must be even; change it, or use 'none'"
            )
        width = rope.width(head_width)
        if width < 2 or width % 2:
            raise ConfigError(
                f"rope_fraction {rope.fraction} rotates {width} of the {head_width} features of a head, expected an "
                "even number of them, at least 2"
            )
        _check_scaling(name, rope, width)
    embedding: nn.Module = POSITIONAL_EMBEDDINGS.get(name)(head_width, rope)
    return embedding


def _check_scaling(name: str, rope: RopeSettings, width: int) -> None:
    scaling = rope.scaling or {}
    for factors in ("short_factor", "long_factor"):
        if factors in scaling and len(scaling[factors]) != width // 2:
            raise ConfigError(
                f"rope_frequency_scaling: {factors} has {len(scaling[factors])} numbers, expected {width // 2}, one "
                "for each rotated pair of features"
            )
    if rope.depends_on_length and POSITIONAL_EMBEDDINGS.fact(name, "by_head", False):
        raise ConfigError(
            f"rope_frequency_scaling of type {scaling['type']} depends on positions, which {name} does not use; use "
            "rotary or llama_rotary"
        )
    if scaling.get("type") == "dynamic" and width < 4:
        raise ConfigError(
            f"rope_frequency_scaling of type dynamic: {width} features of a head are rotated, expected at least 4"
        )


def token_positions(x: Tensor, cache_len: int, attention_mask: Tensor | DocumentMask | None) -> Tensor:
    """Return the positions of the tokens of x (B,T,D) after cache_len cached positions, int64.

    The result is (T,), or (B,T) with a mask (B,P+T). Masked tokens do not count, so that left padding does not change
    the positions of a sequence. With a `DocumentMask` positions start at 0 in each document.
    """
    if isinstance(attention_mask, DocumentMask):
        return attention_mask.positions
    length = x.shape[1]
    if attention_mask is None:
        return torch.arange(cache_len, cache_len + length, device=x.device)
    positions = (attention_mask != 0).cumsum(-1) - 1
    return positions.clamp(min=0)[:, -length:]


def sequence_lengths(positions: Tensor, attention_mask: Tensor | DocumentMask | None) -> Tensor:
    """Return the lengths of the sequences with these positions (T,) or (B,T), as `scale_frequencies` takes them.

    All sequences of a batch have the length of the longest one, as in transformers. With a `DocumentMask` each document
    has its own length.
    """
    if isinstance(attention_mask, DocumentMask):
        assert attention_mask.lengths is not None, "this mask does not support frequencies that depend on the length"
        return attention_mask.lengths()
    return positions.max() + 1
