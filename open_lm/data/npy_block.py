"""Write and read many npy members of a tar at once, with numpy operations instead of a Python loop per sequence.

The headers of npy members of one shape differ only in the digits of the name and the checksum. To write members, one is
built, repeated, and the differing bytes are filled in. To read them, the following headers are compared with one parsed
header, and rows are gathered from the tar's bytes as from one array. Members with other headers are processed one by
one, with the same result.
"""

from __future__ import annotations

import io
import mmap
import tarfile
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

Buffer = bytes | bytearray | memoryview | mmap.mmap
_BLOCK = tarfile.BLOCKSIZE
_NAME = slice(0, 100)
_CHECKSUM = slice(148, 154)  # six octal digits of the header's byte sum; a NUL and a space follow (POSIX ustar)
_CHECKSUM_FIELD = slice(148, 156)
_TYPE, _PREFIX = 156, slice(345, 500)
_EQUAL_BYTES = np.r_[124:136, 154:157, 257:265, _PREFIX]  # size, end of checksum, type, magic, name prefix
_LOOKAHEAD = 256  # headers compared at a time, so that a comparison without a match stays cheap
_MAX_NPY_HEADER = 4096


def tar_header(name: str, size: int) -> bytes:
    """Return the header of a regular file of `size` bytes, without time, owner or host."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


def npy_members(first: int, key_digits: int, rows: np.ndarray) -> np.ndarray:
    """Return the tar members of sequences `rows` (n, T) of any integer type: uint8 (n, bytes per member).

    The bytes per member are a multiple of 512. The names are `first`, first + 1, … in decimal with `key_digits` digits,
    followed by `.npy`.
    """
    count, key_format = len(rows), f"0{key_digits}d"
    buffer = io.BytesIO()
    np.save(buffer, rows[0], allow_pickle=False)
    data_bytes = rows.shape[1] * rows.itemsize
    npy_header = buffer.getvalue()[:-data_bytes]
    size = len(npy_header) + data_bytes
    header = tar_header(f"{0:{key_format}}.npy", size)
    template = np.zeros(tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, np.uint8)
    template[: tarfile.BLOCKSIZE] = np.frombuffer(header, np.uint8)
    start = tarfile.BLOCKSIZE + len(npy_header)
    template[tarfile.BLOCKSIZE : start] = np.frombuffer(npy_header, np.uint8)

    members = np.empty((count, len(template)), np.uint8)
    members[:] = template
    digits = _digits(np.arange(first, first + count), key_digits, 10)
    members[:, :key_digits] = digits + ord("0")
    checksums = int(header[_CHECKSUM], 8) + digits.sum(axis=1, dtype=np.int64)
    members[:, _CHECKSUM] = _digits(checksums, 6, 8) + ord("0")
    members[:, start : start + data_bytes] = np.ascontiguousarray(rows).view(np.uint8)
    return members


def _digits(values: np.ndarray, count: int, base: int) -> np.ndarray:
    """Return the last `count` digits of each value in `base`, most significant first: uint8 (n, count)."""
    powers = np.array([base**place for place in reversed(range(count))], np.int64)
    return (values[:, None] // powers % base).astype(np.uint8)


# --- reading ---------------------------------------------------------------------------------------------------------
def matching_names(data: Buffer, header: bytes, start: int, stride: int) -> list[str]:
    """Return the names of the regular files from byte `start` on, `stride` bytes apart, whose headers match `header`.

    A match is valid, has the same size and kind, and a plain name. The list ends before the first file that does not
    match, or earlier.
    """
    size_field = slice(start + 124, start + 136)
    if data[size_field] != header[124:136] or header[_TYPE] != ord("0") or any(header[_PREFIX]):
        return []
    count = min(_LOOKAHEAD, (len(data) - start) // stride)
    headers = np.ndarray((count, _BLOCK), np.uint8, data, start, (stride, 1))
    is_match = (headers[:, _EQUAL_BYTES] == np.frombuffer(header, np.uint8)[_EQUAL_BYTES]).all(axis=1)
    digits = headers[:, _CHECKSUM]
    is_match &= ((digits >= ord("0")) & (digits <= ord("7"))).all(axis=1)
    checksums = (digits.astype(np.int64) - ord("0")) @ (8 ** np.arange(5, -1, -1))
    sums = headers.sum(axis=1, dtype=np.int64) - headers[:, _CHECKSUM_FIELD].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    is_match &= checksums == sums
    stop = count if is_match.all() else int(np.argmin(is_match))
    names = np.ascontiguousarray(headers[:stop, _NAME]).view("S100").ravel().tolist()
    return [name.partition(b"\0")[0].decode("utf-8", "surrogateescape") for name in names]


class _ByteRange(Protocol):
    """The position of a member in the tar, in bytes."""

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...


class NpyRows:
    """The npy members of a tar with the same npy header as its first one, as rows of one array on the tar's bytes.

    `is_row` (n,) bool marks those members, `length` is the number of ids of each.
    """

    def __init__(self, data: Buffer, members: Sequence[_ByteRange]) -> None:
        """Raise ValueError if the first member is not a complete 1-D npy array of integers."""
        offset, size = members[0].offset, members[0].size
        with io.BytesIO(bytes(data[offset : offset + min(size, _MAX_NPY_HEADER)])) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not version 1.0 of the npy format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            header = np.frombuffer(file.getvalue()[: file.tell()], np.uint8)
        if len(shape) != 1 or dtype.kind not in "iu" or shape[0] * dtype.itemsize + len(header) != size or not shape[0]:
            raise ValueError("not a 1-D array of integers")
        self.length: int = shape[0]
        starts = np.fromiter((member.offset for member in members), np.int64, len(members))
        sizes = np.fromiter((member.size for member in members), np.int64, len(members))
        self._row, misalignment = np.divmod(starts, _BLOCK)
        blocks = np.ndarray((len(data) // _BLOCK, _BLOCK), np.uint8, data)
        header_blocks = -(-len(header) // _BLOCK)
        self.is_row: np.ndarray = (sizes == size) & (misalignment == 0)
        for number in range(header_blocks):
            part = header[number * _BLOCK : (number + 1) * _BLOCK]
            found = blocks[np.where(self.is_row, self._row + number, 0), : len(part)]
            self.is_row &= (found == part).all(axis=1)
        rows = (len(data) - size) // _BLOCK + 1
        self._ids = np.ndarray((rows, self.length), dtype, data, len(header), (_BLOCK, dtype.itemsize))

    @cached_property
    def rows(self) -> np.ndarray | None:
        """The ids (n, length) of all members without copying them; None if they are not evenly spaced."""
        steps = np.diff(self._row)
        if not self.is_row.all() or len(set(steps.tolist())) > 1:
            return None
        return self._ids[int(self._row[0]) :: int(steps[0]) if len(steps) else 1][: len(self._row)]

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """Return a copy of the ids of members `numbers` (n,), all of them rows: (n, length) in the stored type."""
        ids: np.ndarray = self._ids[self._row[numbers]]
        return ids
