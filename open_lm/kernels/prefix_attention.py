"""Attention on a CPU for prompts that share prefixes, stored in one sequence in which every shared token occurs once.

The sequence consists of pieces. The tokens of a piece attend to ranges of earlier tokens, which all of them see, and
causally to each other. Float32 with narrow heads uses a native kernel; for others, pieces of similar size are padded
and computed together with torch's kernel, because a call for each costs more than its work.

Legend: N tokens of the sequence, P pieces, M ranges, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels.native import evaluation as native

_MAX_NATIVE_WIDTH = 32  # torch's matrix products are faster for wider heads
_LONG = 64  # tokens of a piece without a prefix that is computed separately, without a mask
_PADDED_PAIRS = 2**18  # pairs of tokens of a padded group, whose scores then stay in the cache


class Piece(NamedTuple):
    """Consecutive tokens of a sequence: from `start` on, before `stop`, after the tokens of `prefix`.

    `prefix` has disjoint ranges (start, stop) of earlier tokens, in the order of their positions.
    """

    start: int
    stop: int
    prefix: tuple[tuple[int, int], ...]

    @property
    def keys(self) -> int:
        """The number of tokens that the last one sees, itself included."""
        return sum(stop - start for start, stop in self.prefix) + self.stop - self.start


class PrefixAttention:
    """Attention within pieces, for the tensors of all layers of a forward pass.

    Args:
        pieces: the pieces in order; they cover all N tokens.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        ends = np.cumsum([0, *(len(piece.prefix) for piece in pieces)])
        rows = [(p.start, p.stop, ends[i], ends[i + 1]) for i, p in enumerate(pieces)]
        self._table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        self._ranges = np.array([span for p in pieces for span in p.prefix], dtype=np.int64).reshape(-1, 2)
        self._groups: list[tuple[Tensor, Tensor, Tensor]] | None = None

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
        tensors = (queries[0], keys[0], values[0])
        if queries.shape[-1] <= _MAX_NATIVE_WIDTH and native.supports(*tensors):
            return native.prefix_attention(*tensors, self._table, self._ranges)[None]
        return self._padded_attention(*tensors)[None]

    def _padded_attention(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Compute attention (N,H,K) with torch's kernel."""
        out = torch.empty(queries.shape, dtype=queries.dtype)
        for piece in filter(_is_plain, self._pieces):
            tokens = slice(piece.start, piece.stop)
            q, k, v = (x[tokens].transpose(0, 1)[None] for x in (queries, keys, values))
            out[tokens] = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
        if self._groups is None:
            others = [piece for piece in self._pieces if not _is_plain(piece)]
            self._groups = [_padded(group) for group in _groups(others)]
        for rows, sources, mask in self._groups:
            q, k, v = (x[index].transpose(1, 2) for x, index in ((queries, rows), (keys, sources), (values, sources)))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
            # Padding repeats a piece's last token, whose result is then written several times with equal values.
            out[rows] = mixed.transpose(1, 2)
        return out


def _is_plain(piece: Piece) -> bool:
    """Return whether a piece is computed separately, as a causal sequence."""
    return not piece.prefix and piece.stop - piece.start > _LONG


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Return groups of pieces of similar size."""
    groups: list[list[Piece]] = []
    longest = 0
    for piece in sorted(pieces, key=lambda piece: (-piece.keys, piece.start - piece.stop)):
        longest = max(longest, piece.stop - piece.start)
        if groups and (len(groups[-1]) + 1) * groups[-1][0].keys * longest <= _PADDED_PAIRS:
            groups[-1].append(piece)
        else:
            groups.append([piece])
            longest = piece.stop - piece.start
    return groups


def _padded(group: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of the queries (B,Q) and keys (B,T) int64 of B pieces, and an additive mask (B,1,Q,T) float32.

    The mask is 0 where a query attends to a key, else -inf.
    """
    num_queries, num_keys = max(p.stop - p.start for p in group), max(p.keys for p in group)
    rows = torch.empty(len(group), num_queries, dtype=torch.int64)
    sources = torch.zeros(len(group), num_keys, dtype=torch.int64)
    mask = torch.empty(len(group), 1, num_queries, num_keys)
    for index, piece in enumerate(group):
        rows[index] = torch.arange(piece.start, piece.start + num_queries).clamp(max=piece.stop - 1)
        spans = [torch.arange(*span) for span in (*piece.prefix, (piece.start, piece.stop))]
        sources[index, : piece.keys] = torch.cat(spans)
        last = rows[index] - piece.start + piece.keys - (piece.stop - piece.start)  # the key of each query itself
        is_hidden = torch.arange(num_keys)[None, :] > last[:, None]
        mask[index, 0] = torch.zeros(num_queries, num_keys).masked_fill_(is_hidden, float("-inf"))
    return rows, sources, mask
