"""The mapping between full tensors and the local shards of DTensors, for every kind of sharding.

Checkpoints and single processes hold full tensors. During training a tensor may be a DTensor: sharded along dimension 0
by FSDP2, along dimension 0 or 1 by tensor parallelism, or along dimension 0 by tensor parallelism and then by FSDP2.

A weight that fuses several matrices along dimension 0 (of a module with the attribute `parts`, such as
`linear.FusedLinear`) has another row order under tensor parallelism: rank t of N holds the t-th N-th of every fused
matrix. The rows of the DTensor are therefore in rank-major order (rank, matrix, row) instead of the stored order
(matrix, rank, row). The argument `parts` is the number of fused matrices; it has no effect on tensors that are not
sharded this way.
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

_TENSOR_DIM_NAME = "tensor"  # the mesh dimension of tensor parallelism


@dataclass(frozen=True)
class LocalBlock:
    """A rectangular block of the stored tensor that this rank holds.

    `view` has the shape `sizes` and shares the memory of the local shard; the block starts at `offsets` of the stored
    tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    view: Tensor

    @property
    def index(self) -> tuple[slice, ...]:
        """The index of this block in the stored tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))


# ---------------------------------------------------------------------------------------------- index arithmetic
def shard_range(rows: int, splits: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return (first row, number of rows) of a local shard after several splits.

    splits: (number of shards, index of this rank's shard) of each split, in the order in which they are applied. Shards
    have the sizes of torch.chunk: all are equal except for the last ones, which are smaller or empty.
    """
    first = 0
    for count, index in splits:
        shard_size = -(-rows // count)
        skipped = min(index * shard_size, rows)
        first, rows = first + skipped, min(shard_size, rows - skipped)
    return first, rows


def stored_row_runs(first: int, num_rows: int, total_rows: int, parts: int, ranks: int) -> list[tuple[int, int, int]]:
    """Map `num_rows` rows from `first` on of a rank-major weight with `total_rows` rows to rows of the stored weight.

    Return (first row in the stored weight, first row relative to `first`, number of rows) for each run of rows that is
    contiguous in both. Raise ValueError if the fused matrices cannot be divided among the ranks.
    """
    if parts == 1 or ranks == 1:
        return [(first, 0, num_rows)]
    if total_rows % (parts * ranks):
        raise ValueError(f"{total_rows} rows of {parts} fused matrices are not divisible among {ranks} ranks")
    block = total_rows // (parts * ranks)
    runs, row = [], first
    while row < first + num_rows:
        index, offset = divmod(row, block)
        rank, part = divmod(index, parts)
        run = min(block - offset, first + num_rows - row)
        runs.append(((part * ranks + rank) * block + offset, row - first, run))
        row += run
    return runs


# ---------------------------------------------------------------------------------------------- tensors
def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, sharing its memory, or the tensor itself if it is not a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fused_weight_parts(model: nn.Module) -> dict[str, int]:
    """Return the clean names of the parameters that are in rank-major order, with the number of matrices fused in each.

    These are weights and biases of fused layers, and parameters of their adapters.
    """
    return {
        clean_name(f"{name}.{parameter}"): parts
        for name, module in model.named_modules()
        if isinstance(parts := getattr(module, "parts", None), int)
        for parameter, value in module.named_parameters(recurse=False)
        if _tensor_parallel_ranks(value) > 1
    }


def local_blocks(tensor: Tensor, parts: int = 1) -> list[LocalBlock]:
    """Return the blocks of the stored tensor that this rank holds; an empty list if its local shard is empty."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return [LocalBlock((0,) * tensor.dim(), tuple(tensor.shape), tensor)]
    local = tensor.to_local()
    if local.numel() == 0 < tensor.numel():
        return []
    ranges = [shard_range(size, _splits(tensor, dim)) for dim, size in enumerate(tensor.shape)]
    offsets, sizes = [first for first, _ in ranges], tuple(size for _, size in ranges)
    if sizes != tuple(local.shape):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} with placements {tensor.placements} has a local shard of shape "
            f"{tuple(local.shape)}, expected {sizes}"
        )
    if not sizes:
        return [LocalBlock((), (), local)]
    runs = stored_row_runs(offsets[0], sizes[0], tensor.shape[0], parts, _tensor_parallel_ranks(tensor))
    return [
        LocalBlock((stored_row, *offsets[1:]), (num_rows, *sizes[1:]), local.narrow(0, local_row, num_rows))
        for stored_row, local_row, num_rows in runs
    ]


@torch.no_grad()
def copy_local_shard(tensor: Tensor, full: Tensor, parts: int = 1) -> None:
    """Copy this rank's shard of `full`, a full tensor in stored order, into `tensor`. No communication."""
    for block in local_blocks(tensor, parts):
        block.view.copy_(full[block.index])


@torch.no_grad()
def copy_from_rank0(tensor: Tensor, full: Tensor | None, parts: int = 1) -> None:
    """Copy this rank's shard of rank 0's `full`, which may be None on other ranks, into `tensor`. Collective.

    Each rank holds the full tensor temporarily.
    """
    if dist.is_initialized():
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if dist.get_rank() == 0:
            assert full is not None
            buffer.copy_(full)
        dist.broadcast(_as_bytes(buffer), src=0)
        full = buffer
    assert full is not None
    copy_local_shard(tensor, full, parts)


@torch.no_grad()
def full_tensor(tensor: Tensor, parts: int = 1) -> Tensor:
    """Gather the full tensor in stored order on every rank; return a plain tensor unchanged. Collective.

    DTensor.full_tensor does not restore rank-major order, and misplaces rows if both FSDP2 and tensor parallelism split
    them unevenly.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.to_local()
    order = _split_order(tensor)
    for position in reversed(range(len(order))):
        dim, mesh_dim = order[position]
        earlier_splits = [_split(tensor, earlier) for other, earlier in order[:position] if other == dim]
        _, size = shard_range(tensor.shape[dim], earlier_splits)
        gathered = _all_gather(gathered, dim, size, tensor.device_mesh.get_group(mesh_dim))
    ranks = _tensor_parallel_ranks(tensor)
    if parts == 1 or ranks == 1:
        return gathered
    return gathered.unflatten(0, (ranks, parts, -1)).transpose(0, 1).flatten(0, 2)


def replica_ranks(tensor: Tensor, mesh: DeviceMesh | None, world_size: int) -> tuple[int, ...]:
    """Return the ranks that hold the same shard of `tensor` as this rank, in ascending order.

    mesh: the mesh of all ranks, of which the tensor's own mesh may be a slice; None if nothing is sharded.
    """
    if not isinstance(tensor, DTensor):
        return tuple(range(world_size))
    tensor_mesh, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names
    sharded_dims = {mesh_dim for _, mesh_dim in _split_order(tensor)}
    if mesh is not None and names is not None and set(names) < set(mesh.mesh_dim_names or ()):
        assert mesh.mesh_dim_names is not None
        tensor_mesh = mesh
        sharded_dims = {mesh.mesh_dim_names.index(names[mesh_dim]) for mesh_dim in sharded_dims}
    index = [at if dim in sharded_dims else slice(None) for dim, at in enumerate(_coordinate(tensor_mesh))]
    return tuple(sorted(tensor_mesh.mesh[tuple(index)].flatten().tolist()))


def _split_order(tensor: DTensor) -> list[tuple[int, int]]:
    """Return (tensor dimension, mesh dimension) of each split, in the order in which they were applied.

    That is the order of the mesh dimensions, except that FSDP2 splits after tensor parallelism although its mesh
    dimension comes first.
    """
    plain: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for mesh_dim, placement in enumerate(tensor.placements):
        if hasattr(placement, "dim"):  # from torch 2.13 on, _StridedShard is not a subclass of Shard
            (strided if hasattr(placement, "split_factor") else plain).append((placement.dim, mesh_dim))
    return [*plain, *reversed(strided)]


def _splits(tensor: DTensor, dim: int) -> list[tuple[int, int]]:
    return [_split(tensor, mesh_dim) for other, mesh_dim in _split_order(tensor) if other == dim]


def _split(tensor: DTensor, mesh_dim: int) -> tuple[int, int]:
    """Return (number of shards, index of this rank's shard)."""
    return tensor.device_mesh.size(mesh_dim), _coordinate(tensor.device_mesh)[mesh_dim]


def _coordinate(mesh: DeviceMesh) -> Sequence[int]:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "every rank is in every mesh"
    return coordinate


def _tensor_parallel_ranks(tensor: Tensor) -> int:
    """Return the number of ranks that tensor parallelism splits dimension 0 over; 1 if it does not."""
    names = (tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()
    if _TENSOR_DIM_NAME not in names:
        return 1
    assert isinstance(tensor, DTensor)
    mesh_dim = names.index(_TENSOR_DIM_NAME)
    return tensor.device_mesh.size(mesh_dim) if getattr(tensor.placements[mesh_dim], "dim", None) == 0 else 1


def _all_gather(shard: Tensor, dim: int, size: int, group: dist.ProcessGroup) -> Tensor:
    """Gather the ranks' shards of a tensor of `size` along `dim`. Shards are padded to the size of the largest."""
    count = dist.get_world_size(group)
    shard_sizes = [shard_range(size, [(count, index)])[1] for index in range(count)]
    shape = list(shard.shape)
    shape[dim] = shard_sizes[0]
    padded = shard.new_zeros(shape)
    padded.narrow(dim, 0, shard.shape[dim]).copy_(shard)
    received = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather([_as_bytes(buffer) for buffer in received], _as_bytes(padded), group)
    return torch.cat([b.narrow(dim, 0, length) for b, length in zip(received, shard_sizes, strict=True)], dim)


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor viewed as bytes, which every backend can send."""
    return tensor.view(-1).view(torch.uint8)
