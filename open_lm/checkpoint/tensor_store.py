"""Storage writer and reader for torch.distributed.checkpoint: raw tensor bytes in tensor_index.py's format, no pickle.

A "plan" is torch.distributed.checkpoint's list of the chunks that a rank writes or reads; a planner creates it.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from open_lm import storage
from open_lm.checkpoint.folders import INCOMPLETE, INDEX, remove_folder
from open_lm.checkpoint.tensor_index import (
    Index,
    StoredChunk,
    StoredTensor,
    checksum_of,
    read_chunks,
    read_index,
)
from open_lm.errors import CheckpointError, StorageError

# Maximum file size. A remote file is assembled on local disk before its upload: each rank needs this much free space.
FILE_BYTES = 1 << 30


class TensorWriter(StorageWriter):
    """A writer of one checkpoint, to which each rank contributes its own files; `finish` publishes it.

    extra: JSON values. names: all tensor names in the order of the index, with the names under which the tensors are
    stored (different ones for further names of a tied tensor). Tensors that it lacks are appended to the index.
    """

    def __init__(self, folder: str, step: int, extra: dict[str, Any], names: Mapping[str, str] | None = None) -> None:
        self.folder = folder.rstrip("/") if storage.is_remote(folder) else storage.local_path(folder.rstrip("/"))
        self._step, self._extra, self._names = step, extra, names or {}
        # Chosen by the coordinator: the folder to write to, and a file name prefix if that is the final folder.
        self._target, self._prefix = "", ""
        self.finished = False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.finished = False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if any(item.type == WriteItemType.BYTE_IO for item in plan.items):
            raise CheckpointError(f"{self.folder}: only tensors can be written; put all other values into `extra`")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Choose each rank's file names, and remove the files of an earlier attempt."""
        if storage.is_remote(self.folder) or os.path.isdir(self.folder):
            # An earlier checkpoint of the same step keeps its files until the new index is written.
            self._target, self._prefix = self.folder, f"{uuid.uuid4().hex[:8]}_"
        else:
            self._target = self.folder + INCOMPLETE
            remove_folder(self._target)
        storage.makedirs(self._target)
        names = (storage.join(self._target, f"{self._prefix}rank_{rank:05d}") for rank in range(len(plans)))
        return [SavePlan(plan.items, name, plan.planner_data) for plan, name in zip(plans, names, strict=True)]

    def abandon(self) -> None:
        """Remove the written files, unless the checkpoint is complete."""
        if self.finished or not self._target:
            return
        if self._prefix:
            self._remove_files(lambda name: name.startswith(self._prefix))
        else:
            remove_folder(self._target)

    def _remove_files(self, unwanted: Callable[[str], bool]) -> None:
        for url in storage.list_files(self._target):
            if unwanted(url.rpartition("/")[2]):
                storage.remove(url)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items to files of up to 1 GiB, each atomically."""
        results = []
        for number, items in enumerate(_split_by_file(plan.items)):
            url = f"{plan.storage_data}_{number:03d}.bin"
            name = os.path.basename(url)
            with storage.atomic_write(url) as file:
                position = 0
                for item in items:
                    data = _as_bytes(planner.resolve_data(item))
                    chunk = _stored_chunk(item, name, position, data)
                    file.write(data)
                    position += chunk.length
                    results.append(WriteResult(item.index, chunk.length, chunk))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write checkpoint.json, which completes the checkpoint."""
        chunks: dict[str, list[StoredChunk]] = {}
        files: dict[str, int] = {}
        for result in (result for rank_results in results for result in rank_results):
            chunk: StoredChunk = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(chunk)
            files[chunk.file] = max(files.get(chunk.file, 0), chunk.start + chunk.length)
        stored = {
            name: StoredTensor(tensor.properties.dtype, tuple(tensor.size), tuple(chunks[name]))
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        names = {**self._names, **{name: name for name in stored if name not in self._names}}
        tensors = {name: stored[first] for name, first in names.items()}
        aliases = {name: first for name, first in names.items() if name != first}
        index = Index(self._step, files, tensors, aliases, self._extra)
        storage.write_bytes(storage.join(self._target, INDEX), index.to_bytes())
        if not self._prefix:
            _publish(self._target, self.folder)
        self.finished = True
        if self._prefix:
            self._remove_files(lambda name: name not in (INDEX, *files))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _split_by_file(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Distribute items to files of at most FILE_BYTES, in order."""
    files: list[list[WriteItem]] = []
    free_bytes = 0
    for item in items:
        assert item.tensor_data is not None
        num_bytes = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if not files or num_bytes > free_bytes:
            files.append([])
            free_bytes = FILE_BYTES
        files[-1].append(item)
        free_bytes -= num_bytes
    return files


def _as_bytes(tensor: Any) -> memoryview:
    """Return a tensor's bytes, without copying if it is contiguous in host memory."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _stored_chunk(item: WriteItem, file: str, start: int, data: memoryview) -> StoredChunk:
    assert item.tensor_data is not None
    box = item.tensor_data.chunk
    return StoredChunk(tuple(box.offsets), tuple(box.sizes), file, start, data.nbytes, checksum_of(data))


def _publish(incomplete: str, folder: str) -> None:
    """Rename a complete folder to its final name."""
    try:
        os.rename(incomplete, folder)
        storage.sync_folder(os.path.dirname(os.path.abspath(folder)))
    except OSError as error:
        raise StorageError(f"could not rename the complete checkpoint {incomplete} to {folder} ({error})") from error


# ---------------------------------------------------------------------------------------------- reading
@dataclass
class TensorReader(StorageReader):
    """A reader of the tensors of a plan, in place; each chunk is read once, even if several items need it."""

    folder: str
    index: Index | None = field(default=None, repr=False)  # the index, if the caller has read it

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.index = self.index or read_index(self.folder)
        described: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks],
            )
            for name, tensor in self.index.tensors.items()
        }
        return Metadata(described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of a plan; raise CheckpointError if a chunk's checksum does not match."""
        assert self.index is not None
        items: dict[StoredChunk, list[ReadItem]] = {}
        requests: dict[StoredChunk, tuple[str, StoredTensor, StoredChunk]] = {}
        by_offsets = {(name, c.offsets): c for name, tensor in self.index.tensors.items() for c in tensor.chunks}
        for item in plan.items:
            name = item.storage_index.fqn
            chunk = by_offsets[name, tuple(item.storage_index.offset or ())]
            items.setdefault(chunk, []).append(item)
            requests[chunk] = (name, self.index.tensors[name], chunk)
        in_order = sorted(requests.values(), key=lambda entry: (entry[2].file, entry[2].start))
        for chunk, data in read_chunks(self.folder, in_order):
            for item in items[chunk]:
                _copy(data, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _copy(chunk: Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    """Copy the overlap of a stored chunk and a target tensor."""
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        chunk = chunk.narrow(dim, offset, length)
    target = planner.resolve_tensor(item).detach()
    target.copy_(chunk)
    planner.commit_tensor(item, target)
