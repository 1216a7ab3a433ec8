"""Softmax attention with grouped heads, sliding windows, soft caps and dropout, with torch's kernels.

Legend: B batch, Tq queries, Tk keys, H query heads, G key heads (a divisor of H), K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """How a layer's attention differs from plain causal attention with scores scaled by 1/sqrt(K).

    Attributes:
        scale: factor of the scores; None for 1/sqrt(K).
        soft_cap: limit c of the scores s: c tanh(s / c) (Gemma Team 2024, https://arxiv.org/abs/2408.00118).
        window: number of latest keys, including its own, that a query attends to (Beltagy et al. 2020,
            https://arxiv.org/abs/2004.05150).
        dropout: share of the attention weights that is set to 0.
    """

    scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None
    dropout: float = 0.0

    @property
    def is_plain(self) -> bool:
        return self == PLAIN

    def without_dropout(self) -> AttentionOptions:
        return replace(self, dropout=0.0) if self.dropout else self

    def is_limiting(self, num_keys: int) -> bool:
        """Return whether the window excludes any of `num_keys` keys."""
        return self.window is not None and self.window < num_keys


PLAIN = AttentionOptions()


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key heads for their query heads: x (B,Tk,G,K) -> (B,Tk,H,K); x itself if G is H."""
    groups = heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def windowed(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return which keys the window of each query includes, (Tq,Tk) bool; the last query has the last key's position."""
    offset = keys - queries
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset).triu(offset - window + 1)


def general_attention(  # noqa: PLR0917 (as the attention functions)
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    is_causal: bool = False,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Compute attention with all options except the window, which `mask` must include.

    Args:
        queries: (B,Tq,H,K) float.
        keys: (B,Tk,G,K) float; values likewise.
        values: (B,Tk,G,K) float.
        mask: bool, broadcasting to (B,H,Tq,Tk), true where a query may attend to a key; a bias of
            torch.nn.attention.bias if there is no soft cap; or None.
        is_causal: whether attention is causal, with as many keys as queries and no mask.
        options: the options of attention.

    Returns:
        (B,Tq,H,K) in the dtype of the queries.
    """
    if options.soft_cap is not None:
        return _capped_attention(queries, keys, values, mask, is_causal, options)
    if not _groups_are_fused(queries, mask):
        keys, values = (repeat_heads(x, queries.shape[2]) for x in (keys, values))
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    settings = {"enable_gqa": True} if k.shape[1] < q.shape[1] else {}
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=options.dropout, is_causal=is_causal, scale=options.scale, **settings
    )
    return out.transpose(1, 2).contiguous()


def _groups_are_fused(queries: Tensor, mask: Tensor | None) -> bool:
    """Return whether scaled_dot_product_attention has a fused kernel for grouped heads, which read each key once.

    Without it torch repeats the heads and stores all scores, so repeating them first saves memory.
    """
    dtype = queries.dtype
    if torch.is_autocast_enabled(queries.device.type):
        dtype = torch.get_autocast_dtype(queries.device.type)
    is_half = dtype in (torch.float16, torch.bfloat16)
    return queries.is_cuda and is_half and mask is None and queries.shape[-1] <= 256


def _capped_attention(  # noqa: PLR0917 (as `general_attention`)
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool, options: AttentionOptions
) -> Tensor:
    assert options.soft_cap is not None
    scale = queries.shape[-1] ** -0.5 if options.scale is None else options.scale
    keys, values = (repeat_heads(x, queries.shape[2]) for x in (keys, values))
    scores = torch.einsum("bqhd,bkhd->bhqk", queries * scale, keys)
    scores = torch.tanh(scores.float() / options.soft_cap) * options.soft_cap
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(torch.softmax(scores, dim=-1), options.dropout, training=options.dropout > 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(values.dtype), values).to(queries.dtype)
