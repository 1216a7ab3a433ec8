"""What each rank writes of a (sharded) state, and its copy in host memory, from which a thread can write in peace."""

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

# A power of two: torch rounds pinned memory up to one.
_BLOCK_BYTES = 64 << 20
_ALIGNMENT_BYTES = 64


def own_chunks(
    tensors: Mapping[str, Tensor], private: Mapping[str, Tensor], parts: Mapping[str, int] | None = None
) -> list[tuple[WriteItem, Tensor]]:
    """What this rank writes: its parts of sharded tensors, its share of those that several ranks hold alike, and its
    `private` tensors whole; each in chunks, with a view of the live data.

    parts: of the weights that sharded_tensor.fused_weight_parts names. All ranks must name the tensors in the same order: who
    writes what follows from it without a word between them.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    meshes = [tensor.device_mesh for tensor in tensors.values() if isinstance(tensor, DTensor)]
    mesh = max(meshes, key=lambda each: each.ndim, default=None)
    loads: dict[tuple[int, ...], list[int]] = {}  # bytes written by each of the ranks that hold the same
    chunks: list[tuple[WriteItem, Tensor]] = []
    for name, tensor in tensors.items():
        same = replica_ranks(tensor, mesh, world_size)
        load = loads.setdefault(same, [0] * len(same))
        for item, view in _chunks(name, tensor, (parts or {}).get(name, 1)):
            least = load.index(min(load))
            load[least] += view.numel() * view.element_size()
            if same[least] == rank:
                chunks.append((item, view))
    for name, tensor in private.items():
        chunks += _chunks(name, tensor)
    return chunks


def _chunks(name: str, tensor: Tensor, parts: int = 1) -> Iterator[tuple[WriteItem, Tensor]]:
    """This rank's part of a tensor in pieces of up to CHUNK_BYTES, cut along the first dimension."""
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
    """Host memory for one copy of what a rank writes, used again from save to save; pinned where it comes from CUDA."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Bytes held, whether or not they are in use."""
        return sum(block.numel() for block in self._blocks)

    def copy(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous copies in host memory, valid until the next call. Waits for the device, if there is one."""
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
            place = self._blocks[number][used : used + length].view(view.dtype).view(view.shape)
            copies.append(place.copy_(view, non_blocking=True))
            used += -(-length // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if on_cuda:
            torch.cuda.synchronize()
        return copies
