"""Select the tensor chunks that each rank writes, and stage them in host memory for the background writer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from open_lm.checkpoint.tensor_index import CHUNK_BYTES
from open_lm.distributed.sharded_tensor import local_blocks, replica_ranks

# A power of two, because torch rounds pinned allocations up to one.
_BLOCK_BYTES = 64 << 20
_ALIGNMENT_BYTES = 64


def chunks_to_write(
    tensors: Mapping[str, Tensor], rank_tensors: Mapping[str, Tensor], parts: Mapping[str, int] | None = None
) -> list[tuple[WriteItem, Tensor]]:
    """Return the chunks that this rank writes, each with a view of the live data.

    They are its local shards of sharded tensors, 1/n of the tensors that n ranks replicate, and its `rank_tensors`,
    which no other rank has.

    parts: the number of parts of the weights that sharded_tensor.fused_weight_parts lists. All ranks must list the
    tensors in the same order, because the assignment of chunks to ranks follows from it without communication.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    meshes = [tensor.device_mesh for tensor in tensors.values() if isinstance(tensor, DTensor)]
    mesh = max(meshes, key=lambda each: each.ndim, default=None)
    load_bytes: dict[tuple[int, ...], list[int]] = {}  # bytes assigned to each rank of a group of replicas
    chunks: list[tuple[WriteItem, Tensor]] = []
    for name, tensor in tensors.items():
        replicas = replica_ranks(tensor, mesh, world_size)
        loads = load_bytes.setdefault(replicas, [0] * len(replicas))
        for item, view in _chunks(name, tensor, (parts or {}).get(name, 1)):
            least = loads.index(min(loads))
            loads[least] += view.numel() * view.element_size()
            if replicas[least] == rank:
                chunks.append((item, view))
    for name, tensor in rank_tensors.items():
        chunks += _chunks(name, tensor)
    return chunks


def _chunks(name: str, tensor: Tensor, parts: int = 1) -> Iterator[tuple[WriteItem, Tensor]]:
    """Yield this rank's local shard in chunks of up to CHUNK_BYTES, split along the first dimension."""
    for box in local_blocks(tensor, parts):
        rows = box.sizes[0] if box.sizes else 1
        step = max(1, CHUNK_BYTES // max(1, math.prod(box.sizes[1:]) * tensor.element_size()))
        for start in range(0, max(rows, 1), step):
            view = box.view.narrow(0, start, min(step, rows - start)) if rows > step else box.view
            offsets = torch.Size([box.offsets[0] + start, *box.offsets[1:]] if box.offsets else [])
            data = TensorWriteData(
                ChunkStorageMetadata(offsets, view.shape), TensorProperties(dtype=tensor.dtype), tensor.shape
            )
            yield WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data), view


class HostCopies:
    """Host memory for one copy of a rank's chunks, reused for every save; pinned if the tensors are on CUDA."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Allocated bytes, in use or not."""
        return sum(block.numel() for block in self._blocks)

    def copy(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Return contiguous copies in host memory, valid until the next call. Synchronizes with the device."""
        on_cuda = any(view.is_cuda for view in views)
        copies: list[Tensor] = []
        number, used = 0, 0
        for view in views:
            length = view.numel() * view.element_size()
            while number < len(self._blocks) and used + length > self._blocks[number].numel():
                number, used = number + 1, 0
            if number == len(self._blocks):
                size = max(length, _BLOCK_BYTES)
                self._blocks.append(torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda))
            copy = self._blocks[number][used : used + length].view(view.dtype).view(view.shape)
            copies.append(copy.copy_(view, non_blocking=True))
            used += -(-length // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if on_cuda:
            torch.cuda.synchronize()
        return copies
