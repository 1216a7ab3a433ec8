"""Attention on a CPU for sequences of a shared prefix and several rests, stored one after another without padding.

Each rest attends to the prefix and causally to itself, as if it followed the prefix alone. The prefix needs no mask and
runs in the causal kernel; one call with a mask of rests x tokens computes all rests of a sequence. Short
sequences are padded to a common length and computed together, because a call for each costs more than its work.

Legend: N tokens of all sequences, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, tuple[int, ...]]  # number of tokens of a prefix and of each rest

_SHORT = 64  # tokens of sequences that are padded and computed together
_PADDED_PAIRS = 2**18  # pairs of tokens of a padded group, whose scores then stay in the cache


class PrefixAttention:
    """Attention within sequences, for the tensors of all layers of a forward pass.

    Args:
        spans: the sequences in order; they cover all N tokens.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self._long: list[tuple[slice, slice, Tensor | None]] = []  # prefix, rests, mask of the rests
        self._short: list[tuple[Tensor, Tensor]] = []  # indices of the tokens, mask
        short: list[tuple[int, Span]] = []
        start = 0
        for span in spans:
            shared, rests = span
            total = shared + sum(rests)
            if total <= _SHORT:
                short.append((start, span))
            else:
                split, end = start + shared, start + total
                mask = _visible(span)[shared:] if end > split else None
                self._long.append((slice(start, split), slice(split, end), mask))
            start += total
        for group in _groups(short):
            self._short.append(_padded(group))

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Compute attention with scores scaled by 1/sqrt(K), without gradients.

        Args:
            queries: (1,N,H,K) float on a CPU; under autocast all three tensors are converted to its dtype.
            keys: like the queries.
            values: like the queries.

        Returns:
            (1,N,H,K) in the dtype of the queries.
        """
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
        out = torch.empty(queries.shape, dtype=queries.dtype)
        heads_first = out.transpose(1, 2)
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        for prefix, rests, mask in self._long:
            if prefix.stop > prefix.start:
                heads_first[:, :, prefix] = F.scaled_dot_product_attention(
                    q[:, :, prefix], k[:, :, prefix], v[:, :, prefix], is_causal=True
                )
            if mask is not None:
                tokens = slice(prefix.start, rests.stop)
                heads_first[:, :, rests] = F.scaled_dot_product_attention(
                    q[:, :, rests], k[:, :, tokens], v[:, :, tokens], attn_mask=mask.to(q.dtype)
                )
        for indices, mask in self._short:
            rows, sources, contents = (x[0][indices].transpose(1, 2) for x in (queries, keys, values))
            mixed = F.scaled_dot_product_attention(rows, sources, contents, attn_mask=mask.to(q.dtype))
            # Padding repeats a sequence's last token, whose result is then written several times with equal values.
            out[0, indices] = mixed.transpose(1, 2)
        return out


def _visible(span: Span) -> Tensor:
    """Return the additive mask (T,T) float32 of a sequence: 0 where a token (row) attends to another, else -inf."""
    shared, rests = span
    segments = torch.repeat_interleave(torch.arange(1 + len(rests)), torch.tensor([shared, *rests]))
    is_visible = ((segments == 0)[None, :] | (segments[:, None] == segments[None, :])).tril()
    return torch.zeros(is_visible.shape).masked_fill_(~is_visible, float("-inf"))


def _groups(spans: Sequence[tuple[int, Span]]) -> list[list[tuple[int, Span]]]:
    """Return groups of (start, span) of similar length."""
    groups: list[list[tuple[int, Span]]] = []
    for item in sorted(spans, key=lambda item: -_length(item[1])):
        if groups and (len(groups[-1]) + 1) * _length(groups[-1][0][1]) ** 2 <= _PADDED_PAIRS:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _length(span: Span) -> int:
    return span[0] + sum(span[1])


def _padded(group: Sequence[tuple[int, Span]]) -> tuple[Tensor, Tensor]:
    """Return the indices (B,T) int64 of the tokens of sequences, and their additive mask (B,1,T,T) float32."""
    length = max(_length(span) for _, span in group)
    indices = torch.empty(len(group), length, dtype=torch.int64)
    mask = torch.full((len(group), 1, length, length), float("-inf"))
    for row, (start, span) in enumerate(group):
        size = _length(span)
        indices[row] = torch.arange(length).clamp(max=size - 1) + start
        visible = _visible(span)
        mask[row, 0, :size, :size] = visible
        mask[row, 0, size:, :size] = visible[-1]
    return indices, mask
