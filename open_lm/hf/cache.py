"""Between the native key-value cache and the cache objects that transformers' generate() hands around.

Legend: B batch, T sequence, P cached positions before it, H heads, K head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

NativeCache = Sequence[Sequence[Tensor]]


def read_cache(cache: Any) -> list[tuple[Tensor, Tensor]] | None:
    """L pairs of keys and values (B,P,H,K) from a transformers Cache, or from such pairs; None where it is empty.

    Views, not copies: a Cache holds (B,H,P,K).
    """
    if cache is None or not hasattr(cache, "get_seq_length"):
        return cache or None
    length = int(cache.get_seq_length())
    if length == 0:
        return None
    if hasattr(cache, "layers"):
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
    else:  # transformers < 4.56
        pairs = list(zip(cache.key_cache, cache.value_cache, strict=True))
    return [(k[:, :, :length].transpose(1, 2), v[:, :, :length].transpose(1, 2)) for k, v in pairs]


def write_cache(cache: Any, present: NativeCache | None, new_tokens: int) -> Any:
    """Append the last `new_tokens` positions of the native pairs (B,P+T,H,K) to a Cache, and hand it back.

    Where there is no Cache object the native pairs themselves are the cache.
    """
    if present is None or not hasattr(cache, "get_seq_length"):
        return present
    for layer, (keys, values) in enumerate(present):
        cache.update(keys[:, -new_tokens:].transpose(1, 2), values[:, -new_tokens:].transpose(1, 2), layer)
    return cache
