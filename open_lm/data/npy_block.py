"""Many members of one tar at once, written and read by numpy alone, without a step of Python per sequence.

Npy members of one shape differ in their header only by the digits of the name and the checksum over it, and in their
data. To write them, one member is laid out, repeated, and the parts that differ are filled in. To read them, neighbours
are compared with one header that was parsed, and rows are gathered from the tar's bytes as from one array. What is not
exactly alike is left to those who go one by one: the result never depends on which way was taken.
"""

from __future__ import annotations

import io
import mmap
import tarfile
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Buffer = bytes | bytearray | memoryview | mmap.mmap
_BLOCK = tarfile.BLOCKSIZE
_NAME = slice(0, 100)
_CHECKSUM = slice(148, 154)  # six octal digits of the header's byte sum; a NUL and a space follow (POSIX ustar)
_CHECKSUM_FIELD = slice(148, 156)
_TYPE, _PREFIX = 156, slice(345, 500)
_SAME = np.r_[124:136, 154:157, 257:265, _PREFIX]  # size, end of the checksum, type, magic, prefix of the name
_LOOKAHEAD = 256  # headers compared at a time: a try that finds nothing alike stays cheap
_MAX_NPY_HEADER = 4096


def tar_header(name: str, size: int) -> bytes:
    """The header of a regular file of `size` bytes, without clock, owner or host."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


def npy_members(first: int, key_digits: int, rows: np.ndarray) -> np.ndarray:
    """The tar members of sequences `rows` (n, T), any integer type: uint8 (n, bytes of a member, a multiple of 512).

    They are named by `first`, first + 1, … in decimal with `key_digits` digits, followed by `.npy`.
    """
    number, key_digits_format = len(rows), f"0{key_digits}d"
    buffer = io.BytesIO()
    np.save(buffer, rows[0], allow_pickle=False)
    data_bytes = rows.shape[1] * rows.itemsize
    npy_header = buffer.getvalue()[:-data_bytes]
    size = len(npy_header) + data_bytes
    header = tar_header(f"{0:{key_digits_format}}.npy", size)
    template = np.zeros(tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, np.uint8)
    template[: tarfile.BLOCKSIZE] = np.frombuffer(header, np.uint8)
    start = tarfile.BLOCKSIZE + len(npy_header)
    template[tarfile.BLOCKSIZE : start] = np.frombuffer(npy_header, np.uint8)

    members = np.empty((number, len(template)), np.uint8)
    members[:] = template
    digits = _digits(np.arange(first, first + number), key_digits, 10)
    members[:, :key_digits] = digits + ord("0")
    checksums = int(header[_CHECKSUM], 8) + digits.sum(axis=1, dtype=np.int64)
    members[:, _CHECKSUM] = _digits(checksums, 6, 8) + ord("0")
    members[:, start : start + data_bytes] = np.ascontiguousarray(rows).view(np.uint8)
    return members


def _digits(values: np.ndarray, count: int, base: int) -> np.ndarray:
    """The last `count` digits of each value in `base`, most significant first: uint8 (n, count)."""
    powers = np.array([base**place for place in reversed(range(count))], np.int64)
    return (values[:, None] // powers % base).astype(np.uint8)


# --- reading ---------------------------------------------------------------------------------------------------------
def names_alike(data: Buffer, header: bytes, start: int, stride: int) -> list[str]:
    """Names of the regular files from byte `start` on, `stride` bytes apart, whose headers are like `header`: valid, of
    the same size and kind, with a plain name. Ends at the first other one; it may end before."""
    size_field = slice(start + 124, start + 136)
    if data[size_field] != header[124:136] or header[_TYPE] != ord("0") or any(header[_PREFIX]):
        return []
    count = min(_LOOKAHEAD, (len(data) - start) // stride)
    headers = np.ndarray((count, _BLOCK), np.uint8, data, start, (stride, 1))
    alike = (headers[:, _SAME] == np.frombuffer(header, np.uint8)[_SAME]).all(axis=1)
    digits = headers[:, _CHECKSUM]
    alike &= ((digits >= ord("0")) & (digits <= ord("7"))).all(axis=1)
    told = (digits.astype(np.int64) - ord("0")) @ (8 ** np.arange(5, -1, -1))
    sums = headers.sum(axis=1, dtype=np.int64) - headers[:, _CHECKSUM_FIELD].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    alike &= told == sums
    stop = count if alike.all() else int(np.argmin(alike))
    names = np.ascontiguousarray(headers[:stop, _NAME]).view("S100").ravel().tolist()
    return [name.partition(b"\0")[0].decode("utf-8", "surrogateescape") for name in names]


class _Place(Protocol):
    """Where a member's file lies, in bytes."""

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...


class NpyRows:
    """The npy members of a tar that are like its first one, as rows of one array in the tar's own bytes.

    `is_row` (n,) bool tells which of the members they are, `length` how many ids each has.
    """

    def __init__(self, data: Buffer, members: Sequence[_Place]) -> None:
        """ValueError where the first member is no 1-D npy array of integers, whole and in place."""
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
        self._row, inside = np.divmod(starts, _BLOCK)
        blocks = np.ndarray((len(data) // _BLOCK, _BLOCK), np.uint8, data)
        whole = -(-len(header) // _BLOCK)  # blocks that the npy header reaches into
        self.is_row: np.ndarray = (sizes == size) & (inside == 0)
        for number in range(whole):
            part = header[number * _BLOCK : (number + 1) * _BLOCK]
            found = blocks[np.where(self.is_row, self._row + number, 0), : len(part)]
            self.is_row &= (found == part).all(axis=1)
        rows = (len(data) - size) // _BLOCK + 1
        self._ids = np.ndarray((rows, self.length), dtype, data, len(header), (_BLOCK, dtype.itemsize))

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """The ids of members `numbers` (n,), all of them rows: (n, length) in the stored type, a copy."""
        ids: np.ndarray = self._ids[self._row[numbers]]
        return ids
