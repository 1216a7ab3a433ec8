"""A teacher's stored distributions, as the data loader passes them to the loss. Legend: N tokens, M ids of a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's distribution, at the temperature of the loss, as a few weighted ids.

    ids (N,M) int64, weights (N,M) float32, which are 0 for missing ids; entropies (N,) float32 of the complete
    distributions. `num_ids` is the number of ids that the distribution covers.
    """

    ids: Tensor
    weights: Tensor
    entropies: Tensor
    num_ids: int

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseTargets:
        """Apply a function to each tensor with a row per token."""
        return SparseTargets(function(self.ids), function(self.weights), function(self.entropies), self.num_ids)
