"""Position embeddings, by the names of --positional-embedding-type.

All have one interface: `embed(q, k, v, positions) -> (q, k, v)` on (B,T,H,K) tensors.
Legend: B batch, T sequence, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from open_lm.errors import ConfigError
from open_lm.positional_embedding.none import NoPositions
from open_lm.positional_embedding.rotary import HeadRotary, LlamaRotary, Rotary

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
