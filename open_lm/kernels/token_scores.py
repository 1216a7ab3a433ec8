"""Scores of given tokens under a linear layer's softmax, computed over chunks of tokens without keeping the logits.

Evaluation needs the probability of a few tokens, and whether each is the most likely one. kernels/linear_loss.py
computes the losses of training and does not compare a token with all others.

Legend: N tokens, R hidden states (or those of a chunk), D model width, V rows of the weight: the vocabulary, or this
rank's shard of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_lm.kernels.native import evaluation as native
from open_lm.kernels.vocab_shard import VocabShard

_CHUNK_BYTES = 2**26  # float32 logits of a chunk
_BLOCK_BYTES = 2**20  # float32 probabilities per thread on a CPU, which stay in a core's cache
_TILE_ROWS, _TILE_COLUMNS = 512, 512  # of a tile of float32 logits that stays in a core's cache


class TokenScores(NamedTuple):
    """Scores of N tokens, each (N,) on the device of the hidden states.

    Attributes:
        log_probs: float32, the logarithm of the token's probability.
        max_log_probs: float32, that of the most likely token.
        is_greedy: bool, whether the token is the most likely one; of several, the first in the vocabulary.
    """

    log_probs: Tensor
    max_log_probs: Tensor
    is_greedy: Tensor


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    counts: Sequence[int] | None = None,
    soft_cap: float | None = None,
    num_ids: int | None = None,
) -> TokenScores:
    """Return the scores of tokens, given the hidden states that predict them. No gradients.

    Args:
        hidden: (R,D) float. The matrix product runs in the autocast dtype if autocast is on, else in the dtype of
            hidden.
        weight: (V,D) float, or a DTensor with Shard(0) over a one-dimensional mesh; hidden and targets must then be
            equal on all ranks of the mesh.
        targets: (N,) int64, ids of the tokens, in the order of the hidden states that predict them.
        bias: (V,) float, sharded like the weight; None for a layer without.
        counts: number of targets of each hidden state; None for one each.
        soft_cap: limit of the logits, cap * tanh(logit / cap); None for no limit.
        num_ids: number of ids that have a token; the softmax excludes the others. None for all.
    """
    head = _Head(weight, bias, soft_cap, num_ids, hidden)
    starts = np.cumsum([0, *([1] * len(hidden) if counts is None else counts)])
    is_float32 = head.shard is None and head.dtype == torch.float32 == hidden.dtype
    if is_float32 and native.supports(hidden, head.weight):
        parts = [_tiled_scores(head, hidden[a:b], targets, starts[a : b + 1]) for a, b in _chunks(hidden, _TILE_ROWS)]
        return TokenScores(*(torch.cat(values) for values in zip(*parts, strict=True)))
    rows = min(max(1, _CHUNK_BYTES // (4 * head.size)), len(hidden))
    # New memory for every chunk costs a CPU as much time as the softmax.
    buffer = hidden.new_empty(rows, head.num_ids) if is_float32 else None
    parts = []
    for a, b in _chunks(hidden, rows):
        logits = head.logits(hidden[a:b]) if buffer is None else head.tile(hidden[a:b], 0, buffer[: b - a])
        ids = targets[int(starts[a]) : int(starts[b])]
        parts.append(logits_scores(logits, ids, np.diff(starts[a : b + 1]), head.shard))
    return TokenScores(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _chunks(hidden: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of chunks of hidden states; an empty one if there are none."""
    for start in range(0, max(len(hidden), 1), max(1, rows)):
        yield start, min(start + max(1, rows), len(hidden))


def _tiled_scores(head: _Head, hidden: Tensor, targets: Tensor, starts: np.ndarray) -> TokenScores:
    """Compute the scores of hidden states (R,D) float32 in tiles of logits; row r has the targets from starts[r] on."""
    first = int(starts[0])
    offsets = torch.from_numpy(starts - first)
    sums = native.SoftmaxSums(offsets, targets[first : int(starts[-1])].contiguous())
    buffer = hidden.new_empty(len(hidden) * _TILE_COLUMNS)
    for start in range(0, head.num_ids, _TILE_COLUMNS):
        columns = min(_TILE_COLUMNS, head.num_ids - start)
        tile = buffer[: len(hidden) * columns].view(len(hidden), columns)
        sums.add(head.tile(hidden, start, tile), start)
    rows = torch.repeat_interleave(torch.arange(len(hidden)), offsets.diff())
    log_sums, maxima = sums.log_sums, sums.maxima
    max_log_probs = (maxima - log_sums)[rows]
    return TokenScores(sums.target_logits - log_sums[rows], max_log_probs, sums.tokens[rows] == sums.targets)


def most_likely_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: Any) -> Tensor:
    """Return the most likely token (N,) int64 for each hidden state (N,D); arguments as in `token_scores`."""
    head = _Head(weight, bias, settings.get("soft_cap"), settings.get("num_ids"), hidden)
    maxima, indices = head.logits(hidden).max(-1)
    return indices if head.shard is None else _first_peak(maxima, indices, head.shard)[1]


class _Head:
    """The output layer in the dtype of the matrix product, or this rank's rows of it."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, soft_cap: float | None, num_ids: int | None, hidden: Tensor
    ) -> None:
        self.shard = VocabShard.of(weight) if isinstance(weight, DTensor) else None
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        local_bias = bias.to_local() if isinstance(bias, DTensor) else bias
        dtype, self.device_type = hidden.dtype, hidden.device.type
        if torch.is_autocast_enabled(self.device_type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(self.device_type)
        self.dtype = dtype
        self.weight, self.bias = local.to(dtype), None if local_bias is None else local_bias.to(dtype)
        self.soft_cap, self.size = soft_cap, len(local)
        first = 0 if self.shard is None else self.shard.first
        self.num_ids = self.size if num_ids is None else min(max(num_ids - first, 0), self.size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (R,V) float32 of hidden states (R,D)."""
        with torch.autocast(self.device_type, enabled=False):
            logits = F.linear(hidden.to(self.dtype), self.weight, self.bias).float()
        logits = self._capped(logits)
        if self.num_ids < self.size:
            logits[:, self.num_ids :] = float("-inf")
        return logits

    def tile(self, hidden: Tensor, first: int, out: Tensor) -> Tensor:
        """Write the logits (R,C) of the columns from `first` on to `out`, and return it; all float32."""
        columns = slice(first, first + out.shape[1])
        with torch.autocast(self.device_type, enabled=False):
            torch.mm(hidden, self.weight[columns].t(), out=out)
        if self.bias is not None:
            out += self.bias[columns]
        return self._capped(out)

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def logits_scores(
    logits: Tensor, targets: Tensor, counts: Sequence[int] | np.ndarray | None = None, shard: VocabShard | None = None
) -> TokenScores:
    """Return the scores of tokens (N,) from logits (R,V) float32.

    `counts` as in `token_scores`; `shard` is this rank's shard of the vocabulary.
    """
    rows = torch.arange(len(logits), device=logits.device)
    if counts is not None:
        rows = rows.repeat_interleave(torch.as_tensor(counts, device=logits.device), output_size=len(targets))
    if shard is not None:
        return _sharded_scores(logits, targets, rows, shard)
    if logits.device.type == "cpu":
        return _cpu_scores(logits, targets, rows)
    log_sums = torch.logsumexp(logits, -1)
    maxima, indices = logits.max(-1)
    return TokenScores(logits[rows, targets] - log_sums[rows], (maxima - log_sums)[rows], indices[rows] == targets)


def _cpu_scores(logits: Tensor, targets: Tensor, rows: Tensor) -> TokenScores:
    """Compute `logits_scores` with softmax, which takes a quarter of the time of logsumexp on a CPU.

    The probabilities of a block of rows stay in the cache.
    """
    size = max(1, torch.get_num_threads() * _BLOCK_BYTES // (4 * logits.shape[1]))
    buffer = torch.empty(min(size, len(logits)), logits.shape[1])
    maxima, max_probs = logits.amax(-1), logits.new_empty(len(logits))
    for start, block in zip(range(0, len(logits), size), logits.split(size), strict=True):
        max_probs[start : start + size] = torch.softmax(block, -1, out=buffer[: len(block)]).amax(-1)
    max_log_probs, target_logits = max_probs.log(), logits[rows, targets]
    is_greedy = target_logits == maxima[rows]
    ties = is_greedy.nonzero()[:, 0]  # of equal logits, the first token counts
    is_greedy[ties] = logits[rows[ties]].argmax(-1) == targets[ties]
    return TokenScores(target_logits - maxima[rows] + max_log_probs[rows], max_log_probs[rows], is_greedy)


def _sharded_scores(logits: Tensor, targets: Tensor, rows: Tensor, shard: VocabShard) -> TokenScores:
    """Compute `logits_scores` from this rank's columns of the logits; equal on all ranks of the shard. Collective."""
    columns, owned = shard.locate(targets, logits.shape[1])
    local_sums = torch.logsumexp(logits, -1)[rows]
    log_sums, target_logits = shard.combine(local_sums, logits[rows, columns].where(owned, 0))
    peaks, tokens = _first_peak(*logits.max(-1), shard)
    return TokenScores(target_logits - log_sums, peaks[rows] - log_sums, tokens[rows] == targets)


def _first_peak(maxima: Tensor, indices: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return the highest logits (R,) of all ranks and the first tokens (R,) that have them. Collective.

    maxima and indices (R,) are the highest logits and their columns on this rank.
    """
    peaks = maxima.clone()
    dist.all_reduce(peaks, dist.ReduceOp.MAX, shard.group)
    tokens = (indices + shard.first).where(maxima == peaks, shard.vocab_size)
    dist.all_reduce(tokens, dist.ReduceOp.MIN, shard.group)
    return peaks, tokens
