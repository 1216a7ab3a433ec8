"""Verify that a shard's file matches its manifest; each file is hashed once, not by every process that reads it.

Hashing runs at about 1 GB/s, a few percent of the time that decoding takes: enough to share the result among the
workers of a rank.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from open_lm.data.block_sums import BlockSums

if TYPE_CHECKING:
    from open_lm.data.order import Source

_CHUNK_BYTES = 1 << 20
_verified: set[str] = set()  # record names that this process need not check again


@dataclass(frozen=True)
class Expected:
    """A manifest's values for a shard's file: size in bytes, or None, and sha256 in hex, or "".

    `block_sums` and `num_sequences` are known together.
    """

    num_bytes: int | None = None
    sha256: str = ""
    block_sums: BlockSums | None = None
    num_sequences: int = 0

    def problem(self, num_bytes: int, sha256: str) -> str:
        """Describe how a file of this size and sha256 (in hex) differs; "" if it does not."""
        if self.num_bytes is not None and num_bytes != self.num_bytes:
            return f"has {num_bytes} bytes, expected {self.num_bytes}"
        if self.sha256 and sha256 != self.sha256:
            return f"has the sha256 {sha256}, expected {self.sha256}"
        return ""


def expected_files(sources: Sequence[Source]) -> dict[str, Expected]:
    """Return what manifests list for the shards' files, by address."""
    return {
        url: Expected(num_bytes, sha256, sums, (size or 0) if sums else 0)
        for source in sources
        for url, num_bytes, sha256, sums, size in zip(
            source.shards, source.num_bytes, source.sha256, source.block_sums, source.sizes, strict=True
        )
        if sha256 or num_bytes is not None
    }


def verify(file: IO[bytes], expected: Expected, folder: str | None) -> str:
    """Describe how an open file differs from what is expected; "" if it does not.

    A verified file is not hashed again until its inode, size or time changes: not by this process, and not by others
    that pass the same private `folder`, where the results are recorded.
    """
    size = os.fstat(file.fileno()).st_size
    if not expected.sha256 or expected.num_bytes not in (None, size):
        return expected.problem(size, "")
    name = _record_name(file, expected.sha256)
    if name in _verified:
        return ""
    if folder is None:
        problem = expected.problem(size, _hash(file))
    else:
        with open(_record_path(folder, name), "ab") as record:
            fcntl.flock(record, fcntl.LOCK_EX)  # other processes wait here, which costs less than hashing too
            problem = "" if record.tell() else expected.problem(size, _hash(file))
            if not problem:
                record.write(b"verified\n")
    if not problem:
        _verified.add(name)
    return problem


def record_verified(file: IO[bytes], sha256: str, folder: str | None) -> None:
    """Record that an open file, just written, has this sha256."""
    name = _record_name(file, sha256)
    _verified.add(name)
    if folder is not None:
        with open(_record_path(folder, name), "wb") as record:
            record.write(b"verified\n")


def _record_name(file: IO[bytes], sha256: str) -> str:
    """Return the name of the record for the present state of a file."""
    now = os.fstat(file.fileno())
    parts = f"{now.st_dev} {now.st_ino} {now.st_size} {now.st_mtime_ns} {sha256}"
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _record_path(folder: str, name: str) -> str:
    records = os.path.join(folder, "whole")  # existing caches have this name
    os.makedirs(records, exist_ok=True)
    return os.path.join(records, name)


def _hash(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while data := file.read(_CHUNK_BYTES):
        digest.update(data)
    return digest.hexdigest()
