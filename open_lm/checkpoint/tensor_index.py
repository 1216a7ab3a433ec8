"""Define the format of sharded checkpoints, and read them without a process group.

A checkpoint is a folder:

    rank_00000_000.bin …   tensor chunks of each rank as raw bytes (row-major, little-endian), without gaps
    checkpoint.json        the location of each chunk, with checksums of the chunks and of itself; written last: if it
                           exists, the checkpoint is complete

On local disks the folder is written as `….incomplete` and renamed when it is complete. On remote stores, and if the
folder already exists, files are written in place with a new random prefix. Writing checkpoint.json then atomically
publishes the checkpoint or replaces the previous one.
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
# A checksum covers one chunk, so a chunk is always read completely; it is small compared with most tensors.
CHUNK_BYTES = 16 << 20
_WORKERS_REMOTE = 8
_WORKERS_LOCAL = 2
# Chunks with a smaller gap between them are read as one range.
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
    """The location of a box of one tensor: `length` bytes from offset `start` of `file`, with their CRC-32."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    checksum: int


@dataclass(frozen=True)
class StoredTensor:
    """The dtype and shape of a full tensor, and the chunks that cover it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Index:
    """The content of checkpoint.json.

    files: sizes in bytes by name. aliases: for the second and further names of a tied tensor, the name under which it
    is stored. tensors: all tensors, including aliases.
    """

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
        text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
        body = text[:-1]  # without the closing brace, so that the checksum of the text becomes the last entry
        return body + _CHECKSUM_KEY + hashlib.sha256(body).hexdigest().encode() + b'"}'

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> Index:
        """Parse checkpoint.json; raise CheckpointError if any bit has changed, or if a newer version wrote it."""
        body, _, checksum = data.rpartition(_CHECKSUM_KEY)
        if checksum != hashlib.sha256(body).hexdigest().encode() + b'"}':
            raise BrokenCheckpoint(f"{url}: truncated or changed since it was written; use an earlier checkpoint")
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise CheckpointError(f"{url}: found format {content['format']}, expected {FORMAT}; use a newer open_lm")
        entries = content["tensors"]
        aliases = {name: entry["same_as"] for name, entry in entries.items() if "same_as" in entry}
        tensors = {name: _tensor_from(entries[aliases.get(name, name)], name, url) for name in entries}
        return cls(content["step"], content["files"], tensors, aliases, content["extra"])


def dtype_name(dtype: torch.dtype) -> str:
    """Return the stored name of a dtype, e.g. `bfloat16`; raise CheckpointError if the format does not support it."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise CheckpointError(f"tensors of type {name} cannot be stored; expected one of {', '.join(_DTYPES)}")
    return name


def _entry_of(tensor: StoredTensor) -> dict[str, Any]:
    chunks = [asdict(chunk) for chunk in tensor.chunks]
    return {"dtype": dtype_name(tensor.dtype), "shape": tensor.shape, "chunks": chunks}


def _tensor_from(entry: dict[str, Any], name: str, url: str) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{url}: {name} has type {entry['dtype']}, which this version does not support")
    chunks = tuple(
        StoredChunk(**{**chunk, "offsets": tuple(chunk["offsets"]), "sizes": tuple(chunk["sizes"])})
        for chunk in entry["chunks"]
    )
    return StoredTensor(_DTYPES[entry["dtype"]], tuple(entry["shape"]), chunks)


def read_index_bytes(folder: str) -> bytes:
    """Return the bytes of checkpoint.json; raise CheckpointError if the folder has none."""
    url = storage.join(folder, INDEX)
    try:
        return storage.read_bytes(url)
    except StorageError as error:
        raise CheckpointError(f"{folder}: no complete checkpoint ({error})") from error


def read_index(folder: str) -> Index:
    """Read checkpoint.json; raise CheckpointError if it is missing or broken."""
    return Index.from_bytes(read_index_bytes(folder), storage.join(folder, INDEX))


def incomplete_reason(folder: str) -> str | None:
    """Return why a folder is not a complete checkpoint, or None.

    Reads checkpoint.json and the sizes of the files; the tensor data is checked when it is read.
    """
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
    """Return the CRC-32 of bytes.

    It is the fastest checksum of Python's standard library (4.3 GB/s on one measured core; adler32 3.3, sha256 1.6,
    sha1 1.1, blake2b 1.0), releases the GIL, and detects every burst error of up to 32 bits. It does not protect
    against forgery.
    """
    return zlib.crc32(data)


def read_chunks(
    folder: str, requests: Sequence[tuple[str, StoredTensor, StoredChunk]]
) -> Iterator[tuple[StoredChunk, Tensor]]:
    """Yield the requested chunks in order, each as a verified tensor with the chunk's sizes and dtype.

    requests: (name, tensor, chunk). Adjacent chunks are read as one range, and several ranges are read in parallel;
    about 16 MiB per worker are in memory.

    Raises:
        BrokenCheckpoint: a file is truncated or changed; names the file and the tensor.
        StorageError: the store fails to return existing data.
    """
    workers = _WORKERS_REMOTE if storage.is_remote(folder) else _WORKERS_LOCAL
    pending: deque[Future[list[tuple[StoredChunk, Tensor]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="checkpoint-read") as pool:
        try:
            for group in _adjacent_groups(requests):
                pending.append(pool.submit(_read_group, folder, group))
                if len(pending) > workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _adjacent_groups(
    requests: Sequence[tuple[str, StoredTensor, StoredChunk]],
) -> Iterator[list[tuple[str, StoredTensor, StoredChunk]]]:
    """Group consecutive requests for adjacent chunks of one file, up to CHUNK_BYTES."""
    group: list[tuple[str, StoredTensor, StoredChunk]] = []
    for item in requests:
        chunk = item[2]
        if group:
            first, last = group[0][2], group[-1][2]
            gap = chunk.start - (last.start + last.length)
            total = chunk.start + chunk.length - first.start
            if chunk.file != last.file or not 0 <= gap <= _GAP_BYTES or total > CHUNK_BYTES:
                yield group
                group = []
        group.append(item)
    if group:
        yield group


def _read_group(folder: str, group: list[tuple[str, StoredTensor, StoredChunk]]) -> list[tuple[StoredChunk, Tensor]]:
    first, last = group[0][2], group[-1][2]
    url, length = storage.join(folder, first.file), last.start + last.length - first.start
    others = f" and {len(group) - 1} more" if len(group) > 1 else ""
    try:
        data = _read_range(url, first.start, length)
    except StorageError as error:
        file_info = storage.info(url) if storage.is_remote(url) else None
        if file_info is not None and file_info.size >= first.start + length:
            raise  # the store fails, but the file is complete: an earlier checkpoint would not help
        raise BrokenCheckpoint(
            f"{error}; this range contains {group[0][0]}{others}; use an earlier checkpoint"
        ) from error
    tensors = []
    for name, tensor, chunk in group:
        begin = chunk.start - first.start
        chunk_data = data[begin : begin + chunk.length]
        checksum = checksum_of(chunk_data.numpy())
        if checksum != chunk.checksum:
            raise BrokenCheckpoint(
                f"{url}: checksum mismatch in the {chunk.length} bytes at offset {chunk.start}, which contain {name}: "
                f"found CRC-32 {checksum:08x}, expected {chunk.checksum:08x}; use an earlier checkpoint"
            )
        if begin % tensor.dtype.itemsize:  # a view as a wider dtype must be aligned
            chunk_data = chunk_data.clone()
        tensors.append((chunk, chunk_data.view(tensor.dtype).view(chunk.sizes)))
    return tensors


def _read_range(url: str, start: int, length: int) -> Tensor:
    """Return a range of a file, (length,) uint8."""
    data = torch.empty(length, dtype=torch.uint8)
    if length == 0:
        return data
    if storage.is_remote(url):
        data.numpy()[:] = np.frombuffer(storage.read_range(url, start, length), dtype=np.uint8)
        return data
    with storage.open_file(url) as file:
        file.seek(start)
        num_bytes = file.readinto(data.numpy())  # type: ignore[attr-defined]  # typing.IO does not declare it
    if num_bytes != length:
        raise StorageError(f"{url}: truncated: expected {length} bytes at offset {start}, found {num_bytes}")
    return data


class StoredTensors:
    """The tensors of a local or remote checkpoint, read one at a time without a process group or a model."""

    def __init__(self, folder: str) -> None:
        """Read the index; raise CheckpointError if `folder` is not a complete checkpoint."""
        self.folder = folder
        self._index = read_index(folder)
        self.step = self._index.step
        self.extra = self._index.extra

    def names(self, prefix: str = "") -> list[str]:
        """Return all names with a prefix, including all names of tied tensors, in the order of the model."""
        return [name for name in self._index.tensors if name.startswith(prefix)]

    def stored_name(self, name: str) -> str:
        """Return the name under which a tensor is stored; it differs for the further names of a tied tensor."""
        return self._index.aliases.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._index.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._index.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """Return the full tensor in host memory."""
        full = torch.empty(self.shape(name), dtype=self.dtype(name))
        for offsets, chunk in self.chunks(name):
            box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, chunk.shape, strict=True))
            full[box] = chunk
        return full

    def chunks(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield (offsets, chunk) of a tensor by ascending offsets.

        This is the order of the elements in memory, unless the tensor was sharded along another dimension than the
        first.
        """
        tensor = self._index.tensors[name]
        ordered = sorted(tensor.chunks, key=lambda chunk: chunk.offsets)
        for chunk, data in read_chunks(self.folder, [(name, tensor, chunk) for chunk in ordered]):
            yield chunk.offsets, data
