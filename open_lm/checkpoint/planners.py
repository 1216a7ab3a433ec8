"""What torch.distributed.checkpoint is told to write and to read: neither knows how a rank's parts came about."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from open_lm.distributed.sharded_tensor import LocalBlock


class StagedPlanner(DefaultSavePlanner):
    """Plans what this rank has copied to host memory."""

    def __init__(self, items: list[WriteItem], copies: list[Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._items = items
        self._copies = {item.index: copy for item, copy in zip(items, copies, strict=True)}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._copies[write_item.index]


class BoxPlanner(DefaultLoadPlanner):
    """Plans to read what this rank holds of each tensor, in place."""

    def __init__(self, held: dict[str, list[LocalBlock]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._held = held
        self._views = {(name, box.offsets): box.view for name, parts in held.items() for box in parts}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, held in self._held.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            wanted = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in held]
            items += create_read_items_for_chunk_list(name, stored, wanted)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._views[index.fqn, tuple(index.offset or ())]
