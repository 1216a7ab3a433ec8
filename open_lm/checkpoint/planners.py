"""Planners for torch.distributed.checkpoint, which lists the tensor chunks to write or read in a "plan" per rank.

They do not depend on how a tensor is sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from open_lm.distributed.sharded_tensor import LocalBlock


class StagedPlanner(DefaultSavePlanner):
    """A save planner for chunks that this rank has copied to host memory."""

    def __init__(self, items: list[WriteItem], copies: list[Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._items = items
        self._copies = {item.index: copy for item, copy in zip(items, copies, strict=True)}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._copies[write_item.index]


class BlockPlanner(DefaultLoadPlanner):
    """A load planner that reads this rank's local shards (blocks) of each tensor, in place."""

    def __init__(self, local_blocks: dict[str, list[LocalBlock]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._local_blocks = local_blocks
        self._views = {(name, block.offsets): block.view for name, blocks in local_blocks.items() for block in blocks}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, blocks in self._local_blocks.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            chunks = [ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes)) for block in blocks]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._views[index.fqn, tuple(index.offset or ())]
