"""Whether a shard's file holds what its manifest says; asked once for each file, not by every process that reads it.

Hashing takes about a gigabyte a second, some percent of the time that decoding takes: enough to let the workers of a
rank share the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from dataclasses import dataclass
from typing import IO

_CHUNK_BYTES = 1 << 20
_known: set[str] = set()  # what this process need not ask again


@dataclass(frozen=True)
class Expected:
    """What a manifest says of a shard's file: size in bytes, or None, and sha256 in hex, or ""."""

    num_bytes: int | None = None
    sha256: str = ""

    def problem(self, num_bytes: int, sha256: str) -> str:
        """How a file of this size and sha256 (in hex) differs from what is expected; empty where it does not."""
        if self.num_bytes is not None and num_bytes != self.num_bytes:
            return f"has {num_bytes} bytes, expected are {self.num_bytes}"
        if self.sha256 and sha256 != self.sha256:
            return f"has the sha256 {sha256}, expected is {self.sha256}"
        return ""


def verify(file: IO[bytes], expected: Expected, folder: str | None) -> str:
    """How an open file differs from what is expected; empty where it does not.

    A file that was found whole is not hashed again until its inode, size or time changes: not by this process, nor by
    any other one that is given the same `folder` of notes, a private one.
    """
    size = os.fstat(file.fileno()).st_size
    if not expected.sha256 or expected.num_bytes not in (None, size):
        return expected.problem(size, "")
    note = _note(file, expected.sha256)
    if note in _known:
        return ""
    if folder is None:
        problem = expected.problem(size, _hash(file))
    else:
        with open(_place(folder, note), "ab") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX)  # who else wants to know waits, which is cheaper than hashing too
            problem = "" if mark.tell() else expected.problem(size, _hash(file))
            if not problem:
                mark.write(b"whole\n")
    if not problem:
        _known.add(note)
    return problem


def note_verified(file: IO[bytes], sha256: str, folder: str | None) -> None:
    """Note that an open file, just written, has this sha256."""
    note = _note(file, sha256)
    _known.add(note)
    if folder is not None:
        with open(_place(folder, note), "wb") as mark:
            mark.write(b"whole\n")


def _note(file: IO[bytes], sha256: str) -> str:
    """The name of the note on a file as it is now."""
    now = os.fstat(file.fileno())
    parts = f"{now.st_dev} {now.st_ino} {now.st_size} {now.st_mtime_ns} {sha256}"
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _place(folder: str, note: str) -> str:
    notes = os.path.join(folder, "whole")
    os.makedirs(notes, exist_ok=True)
    return os.path.join(notes, note)


def _hash(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while data := file.read(_CHUNK_BYTES):
        digest.update(data)
    return digest.hexdigest()
