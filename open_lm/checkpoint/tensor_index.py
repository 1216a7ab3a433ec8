"""The format of a sharded checkpoint, and reading it without a process group.

A checkpoint is a folder:

    rank_00000_000.bin …   raw bytes of tensors' chunks (row-major, little-endian), one after the other, from each rank
    checkpoint.json        what is where, with a checksum of each chunk and of itself; written last: where it is, the
                           checkpoint is complete

On local disks the folder is written as `….incomplete` and renamed when it is whole. On remote stores, and where a
checkpoint of that step is there already, it is written in place, to files whose names begin with something new: so the
one act of writing checkpoint.json makes it appear, or replaces the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_lm import storage
from open_lm.checkpoint.folders import INDEX
from open_lm.errors import BrokenCheckpoint, CheckpointError, StorageError

FORMAT = 1
# A chunk is what one checksum covers: who needs a part of it reads it whole, so it is small beside a tensor.
CHUNK_BYTES = 16 << 20
_WORKERS_REMOTE = 8
_WORKERS_LOCAL = 2
# Chunks with no more than this between them are read as one range.
_GAP_BYTES = 64 << 10
_CHECKSUM_KEY = b',"checksum":"'
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip


@dataclass(frozen=True)
class StoredChunk:
    """A box of one tensor, and `length` bytes from byte `start` of `file` that hold it; checksum: its CRC-32."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    checksum: int


@dataclass(frozen=True)
class StoredTensor:
    """The whole tensor's dtype and shape, and the chunks that fill it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Index:
    """What checkpoint.json says. files: number of bytes by name. aliases: further names of tied tensors, which are
    stored once, and the name under which; `tensors` has them all."""

    step: int
    files: dict[str, int]
    tensors: dict[str, StoredTensor]
    aliases: dict[str, str]
    extra: dict[str, Any]

    def to_bytes(self) -> bytes:
        tensors = {
            name: {"same_as": self.aliases[name]} if name in self.aliases else _entry_of(tensor)
            for name, tensor in self.tensors.items()
        }
        content = {"format": FORMAT, "step": self.step, "files": self.files, "tensors": tensors, "extra": self.extra}
        text = json.dumps(content, separators=(",", ":")).encode()
        body = text[:-1]  # without the last brace: the checksum of all before it comes in as the last entry
        return body + _CHECKSUM_KEY + hashlib.sha256(body).hexdigest().encode() + b'"}'

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> Index:
        """CheckpointError where one bit is not as it was written, or where a later version wrote it."""
        body, _, checksum = data.rpartition(_CHECKSUM_KEY)
        if checksum != hashlib.sha256(body).hexdigest().encode() + b'"}':
            raise BrokenCheckpoint(f"{url}: is truncated or changed since it was written; use an earlier checkpoint")
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise CheckpointError(f"{url}: has format {content['format']}, expected {FORMAT}; use a newer open_lm")
        entries = content["tensors"]
        aliases = {name: entry["same_as"] for name, entry in entries.items() if "same_as" in entry}
        tensors = {name: _tensor_from(entries[aliases.get(name, name)], name, url) for name in entries}
        return cls(content["step"], content["files"], tensors, aliases, content["extra"])


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16; CheckpointError for a type that the format lacks."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise CheckpointError(f"tensors of type {name} cannot be stored; expected one of {', '.join(_DTYPES)}")
    return name


def _entry_of(tensor: StoredTensor) -> dict[str, Any]:
    chunks = [asdict(chunk) for chunk in tensor.chunks]
    return {"dtype": dtype_name(tensor.dtype), "shape": tensor.shape, "chunks": chunks}


def _tensor_from(entry: dict[str, Any], name: str, url: str) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{url}: {name} is of type {entry['dtype']}, which this version does not know")
    chunks = tuple(
        StoredChunk(**{**chunk, "offsets": tuple(chunk["offsets"]), "sizes": tuple(chunk["sizes"])})
        for chunk in entry["chunks"]
    )
    return StoredTensor(_DTYPES[entry["dtype"]], tuple(entry["shape"]), chunks)


def read_index_bytes(folder: str) -> bytes:
    """checkpoint.json as it is; CheckpointError where the folder has none."""
    url = storage.join(folder, INDEX)
    try:
        return storage.read_bytes(url)
    except StorageError as error:
        raise CheckpointError(f"{folder}: there is no complete checkpoint ({error})") from error


def read_index(folder: str) -> Index:
    """CheckpointError where checkpoint.json is missing or broken."""
    return Index.from_bytes(read_index_bytes(folder), storage.join(folder, INDEX))


def incompleteness(folder: str) -> str | None:
    """Why a folder is no whole checkpoint, or None. Reads checkpoint.json and lists the folder: bytes of tensors are
    checked when they are read."""
    try:
        index = read_index(folder)
        sizes = {os.path.basename(item.url): item.size for item in storage.list_infos(folder)}
    except (CheckpointError, StorageError) as error:
        return str(error)
    for name, num_bytes in index.files.items():
        if sizes.get(name) != num_bytes:
            found = f"has {sizes[name]} bytes" if name in sizes else "is missing"
            return f"{storage.join(folder, name)} {found}, expected {num_bytes} bytes"
    return None


# ---------------------------------------------------------------------------------------------- reading
def checksum_of(data: Any) -> int:
    """CRC-32 of bytes. Of what Python brings along it is the fastest by far (4.3 GB/s on one core here; adler32 3.3,
    sha256 1.6, sha1 1.1, blake2b 1.0), works without the interpreter's lock, and finds every error of up to 32 bits
    in a row; against forgery nothing here protects."""
    return zlib.crc32(data)


def read_chunks(
    folder: str, wanted: Sequence[tuple[str, StoredTensor, StoredChunk]]
) -> Iterator[tuple[StoredChunk, Tensor]]:
    """The chunks in the order asked for, each a tensor of its sizes and dtype, verified.

    wanted: (name, tensor, chunk). Neighbours in a file are read as one range; some ranges are read at the same time, so
    that about 16 MiB for each worker are held. BrokenCheckpoint names the file and the tensor that are broken;
    StorageError where a store does not give what it has.
    """
    workers = _WORKERS_REMOTE if storage.is_remote(folder) else _WORKERS_LOCAL
    pending: deque[Future[list[tuple[StoredChunk, Tensor]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="checkpoint-read") as pool:
        try:
            for group in _neighbours(wanted):
                pending.append(pool.submit(_read_group, folder, group))
                if len(pending) > workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _neighbours(
    wanted: Sequence[tuple[str, StoredTensor, StoredChunk]],
) -> Iterator[list[tuple[str, StoredTensor, StoredChunk]]]:
    group: list[tuple[str, StoredTensor, StoredChunk]] = []
    for item in wanted:
        chunk = item[2]
        if group:
            first, last = group[0][2], group[-1][2]
            gap = chunk.start - (last.start + last.length)
            together = chunk.start + chunk.length - first.start
            if chunk.file != last.file or not 0 <= gap <= _GAP_BYTES or together > CHUNK_BYTES:
                yield group
                group = []
        group.append(item)
    if group:
        yield group


def _read_group(folder: str, group: list[tuple[str, StoredTensor, StoredChunk]]) -> list[tuple[StoredChunk, Tensor]]:
    first, last = group[0][2], group[-1][2]
    url, length = storage.join(folder, first.file), last.start + last.length - first.start
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    try:
        data = _read_range(url, first.start, length)
    except StorageError as error:
        whole = storage.info(url) if storage.is_remote(url) else None
        if whole is not None and whole.size >= first.start + length:
            raise  # the store is at fault, not the checkpoint: an earlier one is no better
        raise BrokenCheckpoint(f"{error}; it holds {group[0][0]}{more}; use an earlier checkpoint") from error
    found = []
    for name, tensor, chunk in group:
        begin = chunk.start - first.start
        part = data[begin : begin + chunk.length]
        checksum = checksum_of(part.numpy())
        if checksum != chunk.checksum:
            raise BrokenCheckpoint(
                f"{url}: the {chunk.length} bytes from {chunk.start} on, which hold {name}, changed since they were "
                f"written (CRC-32 {checksum:08x}, expected {chunk.checksum:08x}); use an earlier checkpoint"
            )
        if begin % tensor.dtype.itemsize:  # a view as a wider type must be aligned
            part = part.clone()
        found.append((chunk, part.view(tensor.dtype).view(chunk.sizes)))
    return found


def _read_range(url: str, start: int, length: int) -> Tensor:
    """(length,) uint8."""
    data = torch.empty(length, dtype=torch.uint8)
    if length == 0:
        return data
    if storage.is_remote(url):
        data.numpy()[:] = np.frombuffer(storage.read_range(url, start, length), dtype=np.uint8)
        return data
    with storage.open_file(url) as file:
        file.seek(start)
        found = file.readinto(data.numpy())  # type: ignore[attr-defined]  # IO lacks what binary files have
    if found != length:
        raise StorageError(f"{url}: cut short: {length} bytes were expected at {start}, {found} are there")
    return data


class StoredTensors:
    """The tensors of a checkpoint, local or remote, for tools: no process group, no model, one tensor at a time."""

    def __init__(self, folder: str) -> None:
        """CheckpointError where `folder` is no complete checkpoint."""
        self.folder = folder
        self._index = read_index(folder)
        self.step = self._index.step
        self.extra = self._index.extra

    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with `prefix`, a tied tensor's every name, in the order of the model."""
        return [name for name in self._index.tensors if name.startswith(prefix)]

    def stored_name(self, name: str) -> str:
        """The name under which the bytes are stored: another one for the second name of a tied tensor."""
        return self._index.aliases.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._index.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._index.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor in host memory."""
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        for offsets, chunk in self.chunks(name):
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, chunk.shape, strict=True))
            whole[place] = chunk
        return whole

    def chunks(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(offsets, part) of a tensor, by ascending offsets: pieces of one read after the other are one after the
        other in memory too, unless the tensor was sharded along another dimension than its first."""
        tensor = self._index.tensors[name]
        ordered = sorted(tensor.chunks, key=lambda chunk: chunk.offsets)
        for chunk, part in read_chunks(self.folder, [(name, tensor, chunk) for chunk in ordered]):
            yield chunk.offsets, part
