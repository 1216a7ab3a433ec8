"""Which part of a whole tensor a rank holds: the one place that knows, for every way of dividing tensors among ranks.

A tensor as it is stored, in checkpoints and by a single process, is whole. A live one may be a DTensor: cut along its
rows by FSDP2, along rows or columns by tensor parallelism, or along rows by the latter and then by the former.

A weight that holds several matrices, its parts, one after the other (linear.FusedLinear) is in another order
under tensor parallelism along its rows: rank t of N holds the t-th N-th of each part, one after the other, so that the
DTensor is the whole weight with its rows in rank-major order (rank, part, row) in place of (part, rank, row).
`parts` says of how many matrices; it changes nothing where a tensor is not cut so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from open_lm.distributed.param_names import clean_name
from open_lm.kernels.linear import FusedLinear

_TENSOR = "tensor"  # the mesh dimension of tensor parallelism


@dataclass(frozen=True)
class LocalBlock:
    """`view` (of shape `sizes`, of what this rank holds) is the part of the stored tensor that begins at `offsets`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    view: Tensor

    @property
    def region(self) -> tuple[slice, ...]:
        """The index of this part in the stored tensor."""
        return tuple(slice(begin, begin + size) for begin, size in zip(self.offsets, self.sizes, strict=True))


# ---------------------------------------------------------------------------------------------- plain numbers
def shard_range(rows: int, cuts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(first, number) of the rows that are left after cuts, each into `count` pieces, of which the `index`-th is kept.

    cuts: (count, index), in the order they are made. As torch.chunk cuts: pieces are equal, but for the last ones,
    which are smaller or empty.
    """
    first = 0
    for count, index in cuts:
        piece = -(-rows // count)
        skipped = min(index * piece, rows)
        first, rows = first + skipped, min(piece, rows - skipped)
    return first, rows


def stored_row_runs(first: int, number: int, rows: int, parts: int, ranks: int) -> list[tuple[int, int, int]]:
    """Where `number` rows from `first` on of a weight of `rows` rows in rank-major order stand in the stored one.

    Returns (first row there, first row here counted from `first`, number) of each run of rows that is one in both.
    ValueError where the parts do not divide among the ranks.
    """
    if parts == 1 or ranks == 1:
        return [(first, 0, number)]
    if rows % (parts * ranks):
        raise ValueError(f"{rows} rows, {parts} matrices in one, do not divide among {ranks} ranks")
    block = rows // (parts * ranks)
    runs, row = [], first
    while row < first + number:
        index, inside = divmod(row, block)
        rank, part = divmod(index, parts)
        run = min(block - inside, first + number - row)
        runs.append(((part * ranks + rank) * block + inside, row - first, run))
        row += run
    return runs


# ---------------------------------------------------------------------------------------------- live tensors
def fused_weight_parts(model: nn.Module) -> dict[str, int]:
    """The weights of a live model whose rows are in rank-major order, by clean name, with their numbers of parts."""
    return {
        clean_name(f"{name}.weight"): module.parts
        for name, module in model.named_modules()
        if isinstance(module, FusedLinear) and _tensor_ranks(next(module.parameters())) > 1
    }


def local_blocks(tensor: Tensor, parts: int = 1) -> list[LocalBlock]:
    """What this rank holds, as parts of the stored tensor with views of the live data; none where it holds nothing."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return [LocalBlock((0,) * tensor.dim(), tuple(tensor.shape), tensor)]
    local = tensor.to_local()
    if local.numel() == 0 < tensor.numel():
        return []
    ranges = [shard_range(size, _cuts(tensor, dim)) for dim, size in enumerate(tensor.shape)]
    firsts, sizes = [first for first, _ in ranges], tuple(size for _, size in ranges)
    if sizes != tuple(local.shape):
        raise ValueError(f"a rank holds {tuple(local.shape)} of {tuple(tensor.shape)} by {tensor.placements}")
    if not sizes:
        return [LocalBlock((), (), local)]
    runs = stored_row_runs(firsts[0], sizes[0], tensor.shape[0], parts, _tensor_ranks(tensor))
    return [
        LocalBlock((there, *firsts[1:]), (number, *sizes[1:]), local.narrow(0, here, number)) for there, here, number in runs
    ]


@torch.no_grad()
def copy_local_shard(tensor: Tensor, full: Tensor, parts: int = 1) -> None:
    """Copy this rank's part of `full`, a whole tensor in stored order, into `tensor`. No communication."""
    for box in local_blocks(tensor, parts):
        box.view.copy_(full[box.region])


@torch.no_grad()
def copy_from_rank0(tensor: Tensor, full: Tensor | None, parts: int = 1) -> None:
    """`copy_local_shard` with rank 0's `full`, which may be None elsewhere. Collective: each rank holds the whole for a moment."""
    if dist.is_initialized():
        sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if dist.get_rank() == 0:
            assert full is not None
            sent.copy_(full)
        dist.broadcast(_as_bytes(sent), src=0)
        full = sent
    assert full is not None
    copy_local_shard(tensor, full, parts)


@torch.no_grad()
def full_tensor(tensor: Tensor, parts: int = 1) -> Tensor:
    """The full tensor in stored order, on every rank; a tensor that is not divided itself. Collective.

    DTensor.full_tensor knows nothing of rank-major order, and misplaces rows where both FSDP2 and tensor parallelism
    cut them into uneven pieces.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    held = tensor.to_local()
    order = _order(tensor)
    for done in reversed(range(len(order))):
        dim, mesh_dim = order[done]
        before = [_cut(tensor, earlier) for along, earlier in order[:done] if along == dim]
        _, size = shard_range(tensor.shape[dim], before)
        held = _gathered(held, dim, size, tensor.device_mesh.get_group(mesh_dim))
    ranks = _tensor_ranks(tensor)
    if parts == 1 or ranks == 1:
        return held
    return held.unflatten(0, (ranks, parts, -1)).transpose(0, 1).flatten(0, 2)


def replica_ranks(tensor: Tensor, mesh: DeviceMesh | None, world_size: int) -> tuple[int, ...]:
    """The ranks that hold the same part of a tensor as this one, ascending.

    mesh: over all ranks, of which the tensor's own may be a slice of some of its dimensions; None where nothing is
    divided.
    """
    if not isinstance(tensor, DTensor):
        return tuple(range(world_size))
    own, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names
    divided = {mesh_dim for _, mesh_dim in _order(tensor)}
    if mesh is not None and names is not None and set(names) < set(mesh.mesh_dim_names or ()):
        assert mesh.mesh_dim_names is not None
        own, divided = mesh, {mesh.mesh_dim_names.index(names[mesh_dim]) for mesh_dim in divided}
    same = [at if dim in divided else slice(None) for dim, at in enumerate(_coordinate(own))]
    return tuple(sorted(own.mesh[tuple(same)].flatten().tolist()))


def _order(tensor: DTensor) -> list[tuple[int, int]]:
    """(tensor dimension, mesh dimension) of each cut, in the order in which they were made: by dimensions of the mesh,
    but what FSDP2 cut after tensor parallelism, though it stands before it in the mesh, comes last."""
    plain: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for mesh_dim, place in enumerate(tensor.placements):
        if hasattr(place, "dim"):  # in torch 2.13 a _StridedShard is no Shard
            (strided if hasattr(place, "split_factor") else plain).append((place.dim, mesh_dim))
    return [*plain, *reversed(strided)]


def _cuts(tensor: DTensor, dim: int) -> list[tuple[int, int]]:
    return [_cut(tensor, mesh_dim) for along, mesh_dim in _order(tensor) if along == dim]


def _cut(tensor: DTensor, mesh_dim: int) -> tuple[int, int]:
    """(pieces, which of them is this rank's)."""
    return tensor.device_mesh.size(mesh_dim), _coordinate(tensor.device_mesh)[mesh_dim]


def _coordinate(mesh: DeviceMesh) -> Sequence[int]:
    place = mesh.get_coordinate()
    assert place is not None, "every rank is in every mesh"
    return place


def _tensor_ranks(tensor: Tensor) -> int:
    """Among how many ranks tensor parallelism divides the rows; 1 where it does not."""
    names = (tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()
    if _TENSOR not in names:
        return 1
    assert isinstance(tensor, DTensor)
    mesh_dim = names.index(_TENSOR)
    return tensor.device_mesh.size(mesh_dim) if getattr(tensor.placements[mesh_dim], "dim", None) == 0 else 1


def _gathered(piece: Tensor, dim: int, size: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' pieces of a tensor of `size` along `dim`, put together. Pieces are sent padded to the largest."""
    count = dist.get_world_size(group)
    numbers = [shard_range(size, [(count, index)])[1] for index in range(count)]
    shape = list(piece.shape)
    shape[dim] = numbers[0]
    padded = piece.new_zeros(shape)
    padded.narrow(dim, 0, piece.shape[dim]).copy_(piece)
    received = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather([_as_bytes(each) for each in received], _as_bytes(padded), group)
    return torch.cat([each.narrow(dim, 0, number) for each, number in zip(received, numbers, strict=True)], dim)


def _as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory, which every backend sends, whatever the type."""
    return tensor.view(-1).view(torch.uint8)
