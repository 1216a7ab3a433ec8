"""Write files in the format of torch.save one chunk at a time, for contents that do not fit into memory.

A file is a zip archive of uncompressed records: data.pkl, the pickled content with a reference in place of each
storage, and data/N, the bytes of storage N. Storages are aligned to 64 bytes so that they can be memory-mapped.
torch.load and Python's zipfile read these files like those of torch.save.
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
# A record's header: 30 bytes, its name, a padding field (at least 4 bytes), and 20 bytes for sizes above 4 GiB.
_HEADER_BYTES, _PADDING_BYTES, _LARGE_SIZE_BYTES = 30, 4, 20
_PADDING_ID = 0x4246  # "FB", the ID of torch's padding field
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
    """A tensor whose data is read only when it is written; `chunks()` yields it in order as CPU tensors.

    If the same object occurs several times in a content, the tensors that torch.load returns share their memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_archive(file: IO[bytes], content: Any) -> None:
    """Write `content` (dicts, lists and plain values, with LazyTensors for tensors) to a file open for writing.

    At most one chunk of a tensor is in memory at a time. Raise BrokenCheckpoint if the chunks of a tensor do not have
    its size.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, "data.pkl", [pickled.getvalue()])
        _write_record(archive, "byteorder", [sys.byteorder.encode()])
        for tensor, key in pickler.keys.items():
            written_bytes = _write_record(archive, f"data/{key}", (_as_bytes(chunk) for chunk in tensor.chunks()))
            if written_bytes != tensor.num_bytes:
                raise BrokenCheckpoint(
                    f"a tensor of shape {tuple(tensor.shape)} is incomplete: found {written_bytes} bytes, "
                    f"expected {tensor.num_bytes}"
                )
        _write_record(archive, "version", [_VERSION.encode()])


class _Pickler(pickle.Pickler):
    """A pickler that writes LazyTensors like torch writes tensors; `keys` maps them to storage numbers, in order."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)  # the protocol of torch.save, which torch.load(weights_only=True) reads
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


def _as_bytes(tensor: Tensor) -> Any:
    """Return a tensor's data as a uint8 array, which supports the buffer protocol."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _write_record(archive: zipfile.ZipFile, name: str, chunks: Iterable[Any]) -> int:
    """Write an aligned record, and return its size in bytes; zipfile computes the checksum."""
    record = zipfile.ZipInfo(f"{_ROOT}/{name}")
    assert archive.fp is not None
    fixed = _HEADER_BYTES + len(record.filename) + _PADDING_BYTES + _LARGE_SIZE_BYTES
    padding = -(archive.fp.tell() + fixed) % _ALIGNMENT
    record.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    num_bytes = 0
    with archive.open(record, "w", force_zip64=True) as target:
        for chunk in chunks:
            num_bytes += target.write(chunk)
    return num_bytes
