"""Position embeddings, by the names of --positional-embedding-type.

All have one interface: `angles = embed.angles(positions, heads)`, the same for all layers, and
`embed(q, k, v, angles) -> (q, k, v)` on (B,T,H,K) tensors.
Legend: B batch, T sequence, P cached positions before it, D model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from open_lm.errors import ConfigError
from open_lm.kernels.document_attention import Documents
from open_lm.model.positional_embedding.none import NoPositions
from open_lm.model.positional_embedding.rotary import Angles, HeadRotary, LlamaRotary, Rotary

__all__ = ["POSITIONAL_EMBEDDINGS", "Angles", "get_positional_embedding", "token_positions"]

POSITIONAL_EMBEDDINGS: dict[str, Callable[[int], nn.Module]] = {
    "rotary": Rotary,
    "head_rotary": HeadRotary,
    "llama_rotary": LlamaRotary,
    "none": NoPositions,
}


def get_positional_embedding(name: str, head_width: int) -> nn.Module:
    """A new position embedding for heads of width K.

    Raises:
        ConfigError: an unknown name, or an odd head width, whose features cannot be rotated in pairs.
    """
    if name not in POSITIONAL_EMBEDDINGS:
        raise ConfigError(f"--positional-embedding-type {name}: expected one of {', '.join(POSITIONAL_EMBEDDINGS)}")
    if name != "none" and head_width % 2:
        raise ConfigError(
            f"--positional-embedding-type {name}: the head width hidden_dim // n_heads is {head_width}, but must be "
            "even; change hidden_dim or n_heads, or use 'none'"
        )
    return POSITIONAL_EMBEDDINGS[name](head_width)


def token_positions(x: Tensor, past_len: int, attention_mask: Tensor | Documents | None) -> Tensor:
    """Positions of the tokens of x (B,T,D) after past_len cached ones: (T,), or (B,T) with a mask (B,P+T), int64.

    Masked tokens do not count, so that a row has the same positions with padding on its left and without. Each
    document's are counted from 0.
    """
    if isinstance(attention_mask, Documents):
        return attention_mask.positions
    length = x.shape[1]
    if attention_mask is None:
        return torch.arange(past_len, past_len + length, device=x.device)
    counted = (attention_mask != 0).cumsum(-1) - 1
    return counted.clamp(min=0)[:, -length:]
