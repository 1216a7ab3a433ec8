"""The rows of an output layer that one rank holds when the vocabulary is sharded.

Legend: R tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class VocabShard:
    """The rows of the vocabulary on this rank of `group`: those from `first` on, out of `vocab_size`."""

    group: dist.ProcessGroup
    first: int
    vocab_size: int

    @staticmethod
    def of(weight: DTensor) -> VocabShard:
        """Return this rank's shard of a weight (V,D).

        Raises:
            ValueError: a sharding other than Shard(0) on a one-dimensional mesh, or a rank without a row.
        """
        mesh, vocab_size = weight.device_mesh, weight.shape[0]
        if mesh.ndim != 1 or weight.placements != (Shard(0),):
            raise ValueError(
                f"the weight has placements {weight.placements} on {mesh}, expected (Shard(0),) on a one-dimensional "
                "mesh"
            )
        rows_per_rank = -(-vocab_size // mesh.size())  # torch.chunk splits in this way
        if rows_per_rank * (mesh.size() - 1) >= vocab_size:
            raise ValueError(
                f"a vocabulary of {vocab_size} leaves some of {mesh.size()} ranks without a row; use fewer ranks"
            )
        return VocabShard(mesh.get_group(), rows_per_rank * mesh.get_local_rank(), vocab_size)

    def locate(self, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Return the columns of targets (R,) in this rank's `rows`, and whether they are there (R,) bool.

        The columns of other targets are arbitrary.
        """
        columns = targets - self.first
        return columns.clamp(0, rows - 1), (columns >= 0) & (columns < rows)

    def combine(self, log_sums: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return log(sum(exp(log_sums))) and the sum of target_logits over all ranks; both (R,). Collective."""
        peak = log_sums.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, self.group)
        both = torch.stack([(log_sums - peak).exp(), target_logits])
        dist.all_reduce(both, group=self.group)
        return peak + both[0].log(), both[1]
