"""torch.distributed.checkpoint's way to storage: tensors as raw bytes in the format of tensor_index.py, no pickle."""

from __future__ import annotations

import contextlib
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

# A remote file is put together on local disk before it is sent: so much room each rank needs there.
FILE_BYTES = 1 << 30


class TensorWriter(StorageWriter):
    """Writes one checkpoint; each rank its own files. `finish` makes it appear.

    extra: JSON-able. names: in the order of the index, each with the name under which the tensor is written, which is
    another one for a tied tensor's further names; what it lacks follows at the end.
    """

    def __init__(self, folder: str, step: int, extra: dict[str, Any], names: Mapping[str, str] | None = None) -> None:
        self.folder = folder.rstrip("/") if storage.is_remote(folder) else storage.local_path(folder.rstrip("/"))
        self._step, self._extra, self._names = step, extra, names or {}
        # Where the coordinator has the files written to, and what their names begin with if that is in place.
        self._target, self._prefix = "", ""
        self.finished = False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.finished = False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if any(item.type == WriteItemType.BYTE_IO for item in plan.items):
            raise CheckpointError(f"{self.folder}: only tensors can be written; everything else belongs into `extra`")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Decide where the files go, clear away what an earlier try left there, and tell each rank."""
        if storage.is_remote(self.folder) or os.path.isdir(self.folder):
            # Beside those of an earlier checkpoint of the same step, until the index names the new ones.
            self._target, self._prefix = self.folder, f"{uuid.uuid4().hex[:8]}_"
        else:
            self._target = self.folder + INCOMPLETE
            remove_folder(self._target)
        storage.makedirs(self._target)
        names = (storage.join(self._target, f"{self._prefix}rank_{rank:05d}") for rank in range(len(plans)))
        return [SavePlan(plan.items, name, plan.planner_data) for plan, name in zip(plans, names, strict=True)]

    def abandon(self) -> None:
        """Remove what was written, if it is not a complete checkpoint yet."""
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
        """Write this rank's items into files of up to 1 GiB, each whole or not at all."""
        results = []
        for number, items in enumerate(_by_file(plan.items)):
            url = f"{plan.storage_data}_{number:03d}.bin"
            name = os.path.basename(url)
            with storage.atomic_write(url) as file:
                position = 0
                for item in items:
                    data = _bytes_of(planner.resolve_data(item))
                    chunk = _stored_chunk(item, name, position, data)
                    file.write(data)
                    position += chunk.length
                    results.append(WriteResult(item.index, chunk.length, chunk))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write checkpoint.json; from here on the checkpoint is complete."""
        chunks: dict[str, list[StoredChunk]] = {}
        files: dict[str, int] = {}
        for result in (result for of_rank in results for result in of_rank):
            chunk: StoredChunk = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(chunk)
            files[chunk.file] = max(files.get(chunk.file, 0), chunk.start + chunk.length)
        stored = {
            name: StoredTensor(found.properties.dtype, tuple(found.size), tuple(chunks[name]))
            for name, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
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


def _by_file(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    files: list[list[WriteItem]] = []
    room = 0
    for item in items:
        assert item.tensor_data is not None
        num_bytes = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if not files or num_bytes > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(item)
        room -= num_bytes
    return files


def _bytes_of(tensor: Any) -> memoryview:
    """A tensor's elements as they lie in (host) memory; copied only where it is not contiguous or elsewhere."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _stored_chunk(item: WriteItem, file: str, start: int, data: memoryview) -> StoredChunk:
    assert item.tensor_data is not None
    place = item.tensor_data.chunk
    return StoredChunk(tuple(place.offsets), tuple(place.sizes), file, start, data.nbytes, checksum_of(data))


def _publish(incomplete: str, folder: str) -> None:
    """Rename a whole folder into place."""
    try:
        os.rename(incomplete, folder)
        _sync_folder(os.path.dirname(os.path.abspath(folder)))
    except OSError as error:
        raise StorageError(f"{folder}: the finished checkpoint could not be renamed into place ({error})") from error


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------------------------- reading
@dataclass
class TensorReader(StorageReader):
    """Reads a checkpoint into the tensors of a plan, in place; each chunk once, whatever needs it."""

    folder: str
    index: Index | None = field(default=None, repr=False)  # where the caller has read it already

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
        """CheckpointError where a chunk's bytes are not those that were written."""
        assert self.index is not None
        items: dict[StoredChunk, list[ReadItem]] = {}
        wanted: dict[StoredChunk, tuple[str, StoredTensor, StoredChunk]] = {}
        by_place = {(name, c.offsets): c for name, tensor in self.index.tensors.items() for c in tensor.chunks}
        for item in plan.items:
            name = item.storage_index.fqn
            chunk = by_place[name, tuple(item.storage_index.offset or ())]
            items.setdefault(chunk, []).append(item)
            wanted[chunk] = (name, self.index.tensors[name], chunk)
        in_order = sorted(wanted.values(), key=lambda entry: (entry[2].file, entry[2].start))
        for chunk, part in read_chunks(self.folder, in_order):
            for item in items[chunk]:
                _copy(part, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _copy(part: Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        part = part.narrow(dim, offset, length)
    target = planner.resolve_tensor(item).detach()
    target.copy_(part)
    planner.commit_tensor(item, target)
