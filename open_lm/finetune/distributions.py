"""A few ids in place of a teacher's distribution over all ids: an unbiased sample, or the most likely ones.

The mean of `draw_ids` over many seeds is the distribution, so the gradient of the forward KL divergence, which is
linear in it, is unbiased (random sampling knowledge distillation, https://arxiv.org/abs/2503.16870). The most likely
ids are not: what they leave out is never learned, and they get more than their probability.
Legend: R tokens, K ids of the distribution, N draws, E stored ids of all tokens together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_lm.data.hashing import hash_key, hash_range

_UNIT = 2.0**-53


class StoredIds(NamedTuple):
    """counts (R,) int64, ids (E,) int64, and weights (E,): draws as int64, or probabilities as float32."""

    counts: Tensor
    ids: Tensor
    weights: Tensor


def uniform_numbers(key: int, tokens: int, draws: int) -> np.ndarray:
    """Return random numbers from 0 to below 1 that depend only on the key: float64 (tokens, draws)."""
    numbers: np.ndarray = (hash_range(hash_key(key), tokens * draws) >> np.uint64(11)) * _UNIT
    return numbers.reshape(tokens, draws)


def draw_ids(log_probs: Tensor, uniform: Tensor) -> StoredIds:
    """Draw ids from log_probs (R,K) with uniform numbers (R,N) float64; equal ids are counted together."""
    tokens, draws = uniform.shape
    sums = log_probs.double().exp().cumsum(-1)
    drawn = torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp_(max=log_probs.shape[1] - 1)
    drawn = drawn.sort(-1).values
    is_first = torch.ones_like(drawn, dtype=torch.bool)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    places = is_first.flatten().nonzero()[:, 0]
    ends = torch.cat((places[1:], places.new_tensor([tokens * draws])))
    return StoredIds(is_first.sum(-1), drawn[is_first], ends - places)


def most_likely_ids(log_probs: Tensor, count: int) -> StoredIds:
    """Return the `count` ids of log_probs (R,K) with the highest probabilities."""
    values, ids = log_probs.topk(min(count, log_probs.shape[1]), dim=-1)
    counts = torch.full((len(ids),), ids.shape[1], dtype=torch.int64)
    return StoredIds(counts, ids.flatten(), values.float().exp().flatten())


def entropies(log_probs: Tensor) -> Tensor:
    """Return the entropies (R,) float32 of log_probs (R,K)."""
    return -(log_probs.exp() * log_probs).nan_to_num(nan=0.0).sum(-1).float()
