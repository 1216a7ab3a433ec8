"""Work on whole matrices of sharded parameters, divided among all ranks.

Each matrix has one owner. The ranks that hold one copy of it together with the owner send it their parts, it works on
the whole, and sends every rank its part back, those of other copies (--fsdp-hybrid) too: two all-to-alls a step,
however many matrices there are. Ranks that each hold a whole copy (DDP) only send results.
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

Place = tuple[tuple[int, ...], tuple[int, ...]]  # of a part in the whole tensor: offsets and sizes
Work = Callable[[list[Tensor]], None]  # on stacks (U, m, n), in place


def assign_matrices(tensors: Sequence[Tensor], parts: Sequence[int]) -> list[MatrixAssignment]:
    """The division of the work on parameters (U m, n) or (U, m, n) among all ranks, whose copies are taken to be the
    same; `parts` is U of those with two dimensions. Collective."""
    alike: dict[tuple[int, ...], list[int]] = {}  # by the ranks that hold one copy together
    for number, tensor in enumerate(tensors):
        alike.setdefault(_holders_of_one_copy(tensor), []).append(number)
    return [
        MatrixAssignment(holders, numbers, [tensors[i] for i in numbers], [parts[i] for i in numbers])
        for holders, numbers in alike.items()
    ]


class MatrixAssignment:
    """The division of some parameters' matrices among all ranks, for work to be done at every step.

    Args:
        holders: the ranks that hold this rank's copy of each tensor together; none where it holds all of each.
        numbers: where the tensors stand in the list that `apply` is given.
        tensors, parts: as `assign_matrices` has them.

    Collective.
    """

    def __init__(self, holders: tuple[int, ...], numbers: list[int], tensors: list[Tensor], parts: list[int]) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._numbers, self._parts, self._holders = numbers, parts, holders
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        self._device = compute_device(tensors[0])
        self._alone = ranks == 1
        self._rank = 0 if self._alone else dist.get_rank()
        own = [[(box.offsets, box.sizes) for box in local_blocks(*pair)] for pair in zip(tensors, parts, strict=True)]
        self._places: list[list[list[Place]]] = [own] * ranks  # the parts of each tensor that each rank holds
        if not self._alone:
            dist.all_gather_object(self._places, own)
        costs = [
            math.prod(shape) * min(shape[-1], shape[-2] // n) for shape, n in zip(self._shapes, parts, strict=True)
        ]
        owners = _balanced(costs, ranks)
        self._owned = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]

    def apply(self, tensors: Sequence[Tensor], work: Work) -> None:
        """Call `work` once, with the matrices that this rank owns of `tensors`, and bring what it makes of them to all
        ranks: tensors of one type, shaped and sharded as the parameters are, changed in place. Collective."""
        mine = [tensors[number] for number in self._numbers]
        wholes = self._gathered(mine) if self._holders else {i: local_tensor(mine[i]) for i in self._owned[self._rank]}
        moved = {i: whole.to(self._device) for i, whole in wholes.items()}
        work([_stack(whole, self._parts[i]) for i, whole in moved.items()])
        if self._alone:
            for i, whole in moved.items():
                if whole is not wholes[i]:
                    wholes[i].copy_(whole)
        else:
            self._scatter(moved, mine)

    def _gathered(self, tensors: list[Tensor]) -> dict[int, Tensor]:
        """The tensors that this rank owns, whole and in stored order, by number."""
        owned = self._owned[self._rank]
        places = [
            [(i, place) for i in owned for place in of_rank[i]] if rank in self._holders else []
            for rank, of_rank in enumerate(self._places)
        ]
        shapes = [[sizes for _, (_, sizes) in of_rank] for of_rank in places]
        outgoing = [views if rank in self._holders else [] for rank, views in enumerate(self._views(tensors))]
        received = self._exchange(outgoing, shapes, tensors[0].dtype)
        wholes = {i: torch.empty(self._shapes[i], dtype=tensors[0].dtype, device=self._device) for i in owned}
        for of_rank, pieces in zip(places, received, strict=True):
            for (i, place), piece in zip(of_rank, pieces, strict=True):
                _at(wholes[i], place).copy_(piece)
        return wholes

    def _scatter(self, wholes: dict[int, Tensor], tensors: list[Tensor]) -> None:
        """Give every rank its parts of the tensors that this rank owns, and fill `tensors` with what it is given."""
        outgoing = [
            [_at(whole, place) for i, whole in wholes.items() for place in of_rank[i]] for of_rank in self._places
        ]
        views = self._views(tensors)
        shapes = [[tuple(view.shape) for view in of_rank] for of_rank in views]
        received = self._exchange(outgoing, shapes, tensors[0].dtype)
        for of_rank, pieces in zip(views, received, strict=True):
            for view, piece in zip(of_rank, pieces, strict=True):
                view.copy_(piece)

    def _views(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """What this rank holds of the tensors, by owner."""
        return [[box.view for i in owned for box in local_blocks(tensors[i], self._parts[i])] for owned in self._owned]

    def _exchange(
        self, outgoing: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """Send each rank its tensors of `outgoing`; returns those of each rank, whose shapes are known beforehand."""
        flat = [tensor.reshape(-1) for of_rank in outgoing for tensor in of_rank]
        sent = torch.cat(flat).to(self._device) if flat else torch.empty(0, dtype=dtype, device=self._device)
        sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
        received = torch.empty(sum(map(sum, sizes)), dtype=dtype, device=self._device)
        # As bytes, because not every backend exchanges bfloat16.
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [sum(of_rank) * dtype.itemsize for of_rank in sizes],
            [sum(tensor.numel() for tensor in of_rank) * dtype.itemsize for of_rank in outgoing],
        )
        pieces = iter(received.split([size for of_rank in sizes for size in of_rank]))
        return [[next(pieces).view(shape) for shape in of_rank] for of_rank in shapes]


def _divided_dimensions(tensor: Tensor) -> list[int]:
    """The dimensions of its mesh along which a tensor is divided among several ranks."""
    if not isinstance(tensor, DTensor):
        return []
    sizes = tensor.device_mesh.shape
    return [dim for dim, place in enumerate(tensor.placements) if sizes[dim] > 1 and not place.is_replicate()]


def _holders_of_one_copy(tensor: Tensor) -> tuple[int, ...]:
    """The ranks that hold this rank's copy of a tensor together, ascending; none where it holds all of it."""
    divided = _divided_dimensions(tensor)
    if not isinstance(tensor, DTensor) or not divided:
        return ()
    own = tensor.device_mesh.get_coordinate()
    assert own is not None
    index = tuple(slice(None) if dim in divided else at for dim, at in enumerate(own))
    return tuple(tensor.device_mesh.mesh[index].flatten().tolist())


def _balanced(costs: list[int], ranks: int) -> list[int]:
    """An owner for each cost: the dearest first, each to the rank that has least so far."""
    owners, loads = [0] * len(costs), [0] * ranks
    for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


def _at(whole: Tensor, place: Place) -> Tensor:
    offsets, sizes = place
    return whole[tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))]


def _stack(whole: Tensor, parts: int) -> Tensor:
    """(U m, n) or (U, m, n) -> (U, m, n), a view."""
    return whole if whole.dim() == 3 else whole.unflatten(0, (parts, -1))
