"""Many npy members of one tar at once: the bytes that writing them one by one would give, made by numpy alone.

Members of one shape differ in their header only by the digits of the name and the checksum over it, and in their data.
So one member is laid out, repeated, and the parts that differ are filled in, without a step of Python per sequence.
"""

from __future__ import annotations

import io
import tarfile

import numpy as np

_CHECKSUM = slice(148, 154)  # six octal digits of the header's byte sum; a NUL and a space follow (POSIX ustar)


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
