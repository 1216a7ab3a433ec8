"""Scores of given tokens under a linear layer's softmax, computed over chunks of tokens without keeping the logits.

Evaluation needs the probability of a few tokens, and whether each is the most likely one. kernels/linear_loss.py
computes the losses of training and does not compare a token with all others.

Legend: N tokens, R tokens of a chunk, D model width, V rows of the weight: the vocabulary, or this rank's shard of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_lm.kernels.vocab_shard import VocabShard

_CHUNK_BYTES = 2**26  # float32 logits of a chunk
_BLOCK_BYTES = 2**20  # float32 probabilities per thread on a CPU, which stay in a core's cache
_MIN_PROBABILITY = 1e-30  # smaller probabilities are too close to underflow to take their logarithm
_TIE = 1 - 1e-5  # probabilities closer than this may be ordered otherwise than their logits


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
    soft_cap: float | None = None,
    num_ids: int | None = None,
) -> TokenScores:
    """Return the scores of tokens, given the hidden states that predict them. No gradients.

    Args:
        hidden: (N,D) float. The matrix product runs in the autocast dtype if autocast is on, else in the dtype of
            hidden.
        weight: (V,D) float, or a DTensor with Shard(0) over a one-dimensional mesh; hidden and targets must then be
            equal on all ranks of the mesh.
        targets: (N,) int64, ids of the tokens.
        bias: (V,) float, sharded like the weight; None for a layer without.
        soft_cap: limit of the logits, cap * tanh(logit / cap); None for no limit.
        num_ids: number of ids that have a token; the softmax excludes the others. None for all.
    """
    head = _Head(weight, bias, soft_cap, num_ids, hidden)
    rows = min(max(1, _CHUNK_BYTES // (4 * head.size)), len(hidden))
    buffer = hidden.new_empty(rows, head.size) if head.dtype == torch.float32 == hidden.dtype else None
    chunks = zip(hidden.split(rows or 1), targets.split(rows or 1), strict=True)
    parts = [logits_scores(head.logits(part, buffer), ids, head.shard) for part, ids in chunks]
    return TokenScores(*(torch.cat(values) for values in zip(*parts, strict=True)))


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

    def logits(self, hidden: Tensor, buffer: Tensor | None = None) -> Tensor:
        """Return the logits (R,V) float32 of hidden states (R,D), in the buffer (at least R,V) if there is one.

        New memory for every chunk costs a CPU as much time as the softmax.
        """
        with torch.autocast(self.device_type, enabled=False):
            if buffer is None:
                logits = F.linear(hidden.to(self.dtype), self.weight, self.bias).float()
            else:
                logits = torch.mm(hidden, self.weight.t(), out=buffer[: len(hidden)])
                logits = logits if self.bias is None else logits.add_(self.bias)
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        if self.num_ids < self.size:
            logits[:, self.num_ids :] = float("-inf")
        return logits


def logits_scores(logits: Tensor, targets: Tensor, shard: VocabShard | None = None) -> TokenScores:
    """Return the scores of tokens (R,) from logits (R,V) float32; `shard` is this rank's shard of the vocabulary."""
    if shard is not None:
        return _sharded_scores(logits, targets, shard)
    if logits.device.type == "cpu":
        return _cpu_scores(logits, targets)
    log_sums = torch.logsumexp(logits, -1)
    maxima, indices = logits.max(-1)
    return TokenScores(_at(logits, targets) - log_sums, maxima - log_sums, indices == targets)


def _cpu_scores(logits: Tensor, targets: Tensor) -> TokenScores:
    """Compute `logits_scores` with softmax, which takes a quarter of the time of logsumexp on a CPU.

    The probabilities of a block of rows stay in the cache.
    """
    rows = max(1, torch.get_num_threads() * _BLOCK_BYTES // (4 * logits.shape[1]))
    buffer = torch.empty(min(rows, len(logits)), logits.shape[1])
    parts = []
    for block, ids in zip(logits.split(rows), targets.split(rows), strict=True):
        probs = torch.softmax(block, -1, out=buffer[: len(block)])
        parts.append(torch.stack((_at(probs, ids), probs.amax(-1))))
    target_probs, max_probs = torch.cat(parts, dim=1)
    log_probs = target_probs.log()
    small = (target_probs < _MIN_PROBABILITY).nonzero()[:, 0]
    if len(small):
        log_probs[small] = _at(logits[small], targets[small]) - torch.logsumexp(logits[small], -1)
    is_greedy = target_probs >= max_probs * _TIE
    candidates = is_greedy.nonzero()[:, 0]
    is_greedy[candidates] = logits[candidates].argmax(-1) == targets[candidates]
    return TokenScores(log_probs, max_probs.log(), is_greedy)


def _sharded_scores(logits: Tensor, targets: Tensor, shard: VocabShard) -> TokenScores:
    """Compute `logits_scores` from this rank's columns of the logits; equal on all ranks of the shard. Collective."""
    columns, owned = shard.locate(targets, logits.shape[1])
    log_sums, target_logits = shard.combine(torch.logsumexp(logits, -1), _at(logits, columns).where(owned, 0))
    peaks, tokens = _first_peak(*logits.max(-1), shard)
    return TokenScores(target_logits - log_sums, peaks - log_sums, tokens == targets)


def _first_peak(maxima: Tensor, indices: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return the highest logits (R,) of all ranks and the first tokens (R,) that have them. Collective.

    maxima and indices (R,) are the highest logits and their columns on this rank.
    """
    peaks = maxima.clone()
    dist.all_reduce(peaks, dist.ReduceOp.MAX, shard.group)
    tokens = (indices + shard.first).where(maxima == peaks, shard.vocab_size)
    dist.all_reduce(tokens, dist.ReduceOp.MIN, shard.group)
    return peaks, tokens


def _at(values: Tensor, columns: Tensor) -> Tensor:
    return values.gather(1, columns[:, None])[:, 0]
