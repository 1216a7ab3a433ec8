"""Distribute operations on full matrices of sharded parameters over all ranks.

Each matrix is assigned to one owner rank. The ranks that together hold one copy of it, the owner among them, send their
shards to the owner. The owner processes the full matrix and sends each rank its shard of the result, also to ranks that
hold other copies (--fsdp-hybrid). This takes two all-to-alls per step for any number of matrices. Ranks that each hold
a full copy (DDP) exchange only results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_lm.distributed.sharded_tensor import local_blocks
from open_lm.optim.adamw import compute_device, local_tensor

Region = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a block of the full tensor
MatrixFunction = Callable[[list[Tensor]], None]  # changes stacks (U, m, n) in place


def assign_matrices(tensors: Sequence[Tensor], parts: Sequence[int]) -> list[MatrixAssignment]:
    """Assign the matrices of parameters (U m, n) or (U, m, n) to all ranks; replicas are assumed equal. Collective.

    `parts` is the number U of matrices fused in a parameter of two dimensions.
    """
    by_group: dict[tuple[int, ...], list[int]] = {}  # by the ranks that together hold one copy
    for index, tensor in enumerate(tensors):
        by_group.setdefault(_shard_group(tensor), []).append(index)
    return [
        MatrixAssignment(group, indices, [tensors[i] for i in indices], [parts[i] for i in indices])
        for group, indices in by_group.items()
    ]


class MatrixAssignment:
    """The assignment of some parameters' matrices to all ranks, computed once and applied at every step. Collective.

    Args:
        shard_group: the ranks that together hold this rank's copy of each tensor; empty if it holds full tensors.
        indices: the positions of the tensors in the list that is passed to `apply`.
        tensors: these tensors, see `assign_matrices`.
        parts: the number of matrices fused in each of them.
    """

    def __init__(
        self, shard_group: tuple[int, ...], indices: list[int], tensors: list[Tensor], parts: list[int]
    ) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._indices, self._parts, self._shard_group = indices, parts, shard_group
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        self._device = compute_device(tensors[0])
        self._is_single = ranks == 1
        self._rank = 0 if self._is_single else dist.get_rank()
        local = [[(b.offsets, b.sizes) for b in local_blocks(*pair)] for pair in zip(tensors, parts, strict=True)]
        self._regions: list[list[list[Region]]] = [local] * ranks  # by rank and tensor
        if not self._is_single:
            dist.all_gather_object(self._regions, local)
        costs = [
            math.prod(shape) * min(shape[-1], shape[-2] // n) for shape, n in zip(self._shapes, parts, strict=True)
        ]
        owners = _balance(costs, ranks)
        self._owned = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]

    def apply(self, tensors: Sequence[Tensor], function: MatrixFunction) -> None:
        """Call `function` once, with the matrices that this rank owns, and send the results to all ranks. Collective.

        tensors: tensors of one dtype, shaped and sharded like the parameters; they are changed in place.
        """
        assigned = [tensors[index] for index in self._indices]
        if self._shard_group:
            full = self._gather(assigned)
        else:
            full = {i: local_tensor(assigned[i]) for i in self._owned[self._rank]}
        on_device = {i: tensor.to(self._device) for i, tensor in full.items()}
        function([_stack(tensor, self._parts[i]) for i, tensor in on_device.items()])
        if self._is_single:
            for i, tensor in on_device.items():
                if tensor is not full[i]:
                    full[i].copy_(tensor)
        else:
            self._scatter(on_device, assigned)

    def _gather(self, tensors: list[Tensor]) -> dict[int, Tensor]:
        """Return the full tensors that this rank owns, in stored order, by index."""
        owned = self._owned[self._rank]
        sources = [
            [(i, region) for i in owned for region in regions[i]] if rank in self._shard_group else []
            for rank, regions in enumerate(self._regions)
        ]
        shapes = [[sizes for _, (_, sizes) in blocks] for blocks in sources]
        outgoing = [views if rank in self._shard_group else [] for rank, views in enumerate(self._views(tensors))]
        received = self._all_to_all(outgoing, shapes, tensors[0].dtype)
        full = {i: torch.empty(self._shapes[i], dtype=tensors[0].dtype, device=self._device) for i in owned}
        for blocks, values in zip(sources, received, strict=True):
            for (i, region), value in zip(blocks, values, strict=True):
                _at(full[i], region).copy_(value)
        return full

    def _scatter(self, full: dict[int, Tensor], tensors: list[Tensor]) -> None:
        """Send every rank its shards of the full tensors that this rank owns; copy received shards to `tensors`."""
        outgoing = [
            [_at(tensor, region) for i, tensor in full.items() for region in regions[i]] for regions in self._regions
        ]
        views = self._views(tensors)
        shapes = [[tuple(view.shape) for view in of_owner] for of_owner in views]
        received = self._all_to_all(outgoing, shapes, tensors[0].dtype)
        for of_owner, values in zip(views, received, strict=True):
            for view, value in zip(of_owner, values, strict=True):
                view.copy_(value)

    def _views(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """Return views of this rank's blocks of the tensors, by owner."""
        return [
            [block.view for i in owned for block in local_blocks(tensors[i], self._parts[i])] for owned in self._owned
        ]

    def _all_to_all(
        self, outgoing: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """Send each rank its tensors of `outgoing`; return the tensors from each rank, whose shapes are given."""
        flat = [tensor.reshape(-1) for of_rank in outgoing for tensor in of_rank]
        sent = torch.cat(flat).to(self._device) if flat else torch.empty(0, dtype=dtype, device=self._device)
        sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
        received = torch.empty(sum(map(sum, sizes)), dtype=dtype, device=self._device)
        # As bytes, because not every backend supports bfloat16.
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [sum(of_rank) * dtype.itemsize for of_rank in sizes],
            [sum(tensor.numel() for tensor in of_rank) * dtype.itemsize for of_rank in outgoing],
        )
        values = iter(received.split([size for of_rank in sizes for size in of_rank]))
        return [[next(values).view(shape) for shape in of_rank] for of_rank in shapes]


def _shard_group(tensor: Tensor) -> tuple[int, ...]:
    """Return the ranks that together hold this rank's copy of a tensor, ascending; empty if this rank holds it all."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    is_split = [size > 1 and not p.is_replicate() for size, p in zip(mesh.shape, tensor.placements, strict=True)]
    index = tuple(slice(None) if split else at for split, at in zip(is_split, coordinate, strict=True))
    return tuple(mesh.mesh[index].flatten().tolist()) if any(is_split) else ()


def _balance(costs: list[int], ranks: int) -> list[int]:
    """Return an owner for each cost: the most expensive first, each to the rank with the smallest load so far."""
    owners, loads = [0] * len(costs), [0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def _at(full: Tensor, region: Region) -> Tensor:
    offsets, sizes = region
    return full[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]


def _stack(tensor: Tensor, parts: int) -> Tensor:
    """Return a view (U, m, n) of a tensor (U m, n) or (U, m, n)."""
    return tensor if tensor.dim() == 3 else tensor.unflatten(0, (parts, -1))
