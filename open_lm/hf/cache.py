"""Conversion between the native KV cache and the cache objects of transformers' generate().

Legend: B batch, T sequence, P cached positions, H heads, K head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

NativeCache = Sequence[Sequence[Tensor]]


def read_cache(cache: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Return L pairs of keys and values (B,P,H,K) of a transformers Cache, or `cache` if it already holds such pairs.

    The tensors are views; a Cache stores (B,H,P,K). An empty cache gives None.
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


def write_cache(cache: Any, native_cache: NativeCache | None, new_tokens: int) -> Any:
    """Append the last `new_tokens` positions of the native pairs (B,P+T,H,K) to a Cache and return it.

    Without a Cache object, return the native pairs.
    """
    if native_cache is None or not hasattr(cache, "get_seq_length"):
        return native_cache
    for layer, (keys, values) in enumerate(native_cache):
        cache.update(keys[:, -new_tokens:].transpose(1, 2), values[:, -new_tokens:].transpose(1, 2), layer)
    return cache
