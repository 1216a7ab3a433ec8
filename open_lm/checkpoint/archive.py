"""torch.save's file format, written piece by piece: for contents larger than what a process may hold.

A file is a zip archive of uncompressed records: data.pkl, the content with a reference in place of each storage, and
data/N, the bytes of storage N, which begin at multiples of 64 so that they can be mapped into memory. torch.load and
Python's zipfile read it as they read torch.save's own.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from open_lm.errors import BrokenCheckpoint

_ALIGNMENT = 64
_ROOT = "archive"
# A record's header: 30 bytes, its name, a field of padding (4 bytes and more), and 20 bytes for sizes beyond 4 GiB.
_HEADER_BYTES, _PADDING_BYTES, _LARGE_SIZE_BYTES = 30, 4, 20
_PADDING_ID = 0x4246  # "FB", the field that torch pads with
_VERSION = "3\n"
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that is read when its bytes are written: `pieces()` gives them in order, each contiguous on the CPU.

    Where the same object stands at several places of a content, the tensors read back share their memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_archive(file: IO[bytes], content: Any) -> None:
    """Write `content`, dicts, lists and plain values with LazyTensors for tensors, to a file open for writing.

    At most one piece of a tensor is held at a time. BrokenCheckpoint where pieces do not make up their tensor.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, "data.pkl", [pickled.getvalue()])
        _write_record(archive, "byteorder", [sys.byteorder.encode()])
        for tensor, key in pickler.keys.items():
            written = _write_record(archive, f"data/{key}", (_bytes_of(piece) for piece in tensor.pieces()))
            if written != tensor.num_bytes:
                found = f"{written} bytes were found, {tensor.num_bytes} expected"
                raise BrokenCheckpoint(f"a tensor of shape {tuple(tensor.shape)} is incomplete: {found}")
        _write_record(archive, "version", [_VERSION.encode()])


class _Pickler(pickle.Pickler):
    """Pickles LazyTensors as torch pickles tensors; `keys` numbers their storages in the order they were met."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)  # torch's own, which its safe loader reads
        self.keys: dict[LazyTensor, str] = {}

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return NotImplemented
        strides = torch.empty(value.shape, dtype=value.dtype, device="meta").stride()
        no_gradient, no_hooks = False, OrderedDict()  # type: ignore[var-annotated]
        return torch._utils._rebuild_tensor_v2, (_Storage(value), 0, value.shape, strides, no_gradient, no_hooks)

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        key = self.keys.setdefault(tensor, str(len(self.keys)))
        return "storage", _STORAGES[tensor.dtype], key, "cpu", torch.Size(tensor.shape).numel()


@dataclass(frozen=True)
class _Storage:
    tensor: LazyTensor


def _bytes_of(piece: Tensor) -> Any:
    """The memory of a tensor, as what takes bytes takes it."""
    return piece.contiguous().reshape(-1).view(torch.uint8).numpy()


def _write_record(archive: zipfile.ZipFile, name: str, pieces: Iterable[Any]) -> int:
    """Write an aligned record and return its size; zipfile adds up its checksum."""
    record = zipfile.ZipInfo(f"{_ROOT}/{name}")
    assert archive.fp is not None
    fixed = _HEADER_BYTES + len(record.filename) + _PADDING_BYTES + _LARGE_SIZE_BYTES
    padding = -(archive.fp.tell() + fixed) % _ALIGNMENT
    record.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    written = 0
    with archive.open(record, "w", force_zip64=True) as target:
        for piece in pieces:
            written += target.write(piece)
    return written
