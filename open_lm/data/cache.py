"""Fetched shards in a folder that processes share: each is fetched once, none is removed while it is read.

Every file is locked (flock) as long as a process uses it, so that what a killed process leaves is known by the lock
that nobody holds:

    <key>-<sha256>.tar    a whole file; readers hold a shared lock, and whoever has it mapped still holds it
    <key>.part            on its way, under the exclusive lock of the one who fetches it; its length is the room that it
                          has been promised, so that all lengths together never exceed the limit
    .lock                 held for a moment by whoever looks for a file, makes room or gives a file its name

The key comes from the address and all that is known of the content before it is fetched, the sha256 from the content.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

_PART, _WHOLE = ".part", ".tar"
_OWN_NAME = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{64}\.tar|\.part)")  # whatever else lies there is let alone
_STEP_BYTES = 64 << 20  # room that is promised at a time to a file of unknown length
_BLOCK_BYTES = 4096  # a file takes whole blocks of the disk
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.001, 0.05

Fill = Callable[[IO[bytes], Callable[[int], None]], str]


class Held(NamedTuple):
    """An open file of a cache, which stays while it is open or mapped; `is_new` where it has just been fetched."""

    file: IO[bytes]
    sha256: str
    is_new: bool


class _NoRoomError(Exception):
    """What is in use leaves too little of the limit."""


class Cache:
    """A folder of files, at most `limit_bytes` together; without a limit it keeps only those in use.

    `patience_s` is how long one waits for another process whose fetching does not get on.
    """

    def __init__(self, folder: str, limit_bytes: int | None, patience_s: float) -> None:
        self.folder, self._limit_bytes, self._patience_s = folder, limit_bytes, patience_s
        self._is_swept = False

    def hold(self, identity: str, num_bytes: int, fill: Fill) -> Held | None:
        """The file of this identity, which `fill(file, grow)` fetches where it is not there; `fill` gives its sha256.

        `num_bytes` is its length, -1 where that is not known; `fill` calls `grow(length)` before the file gets that
        long. None: there is no room, or the process that fetches it does not get on. OSError of the folder, and
        whatever `fill` raises.
        """
        key = hashlib.sha256(identity.encode()).hexdigest()[:32]
        os.makedirs(self.folder, exist_ok=True)
        if not self._is_swept:
            self.trim()
        found = self._find(key)
        part = None if found else self._claim(key)
        return found if part is None else self._fill(key, part, num_bytes, fill)

    def _fill(self, key: str, part: IO[bytes], num_bytes: int, fill: Fill) -> Held | None:
        is_done = False
        try:
            found = self._find(key)
            if found is not None:  # another process has fetched it meanwhile
                return found
            self._promise(part, num_bytes)
            sha256 = fill(part, lambda length: self._grow(part, length))
            with self._locked():
                os.replace(self._path(key + _PART), self._path(f"{key}-{sha256}{_WHOLE}"))
                fcntl.flock(part, fcntl.LOCK_SH)
            is_done = True
            return Held(part, sha256, True)
        except _NoRoomError:
            return None
        finally:
            if not is_done:
                with contextlib.suppress(FileNotFoundError), self._locked():
                    os.unlink(self._path(key + _PART))
                part.close()

    def discard(self, held: Held) -> None:
        """Remove a file, which is broken; whoever has it open keeps it."""
        inode = os.fstat(held.file.fileno()).st_ino
        held.file.close()
        with self._locked():
            for entry in self._entries():
                if entry.inode() == inode:
                    os.unlink(entry.path)

    def trim(self) -> None:
        """Remove what killed processes left half fetched, what is too much, and without a limit all that is unused."""
        with self._locked():
            self._make_room(0)
        self._is_swept = True

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._path(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a child forked meanwhile has the file open too

    def _entries(self) -> list[os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            return [entry for entry in entries if _OWN_NAME.fullmatch(entry.name)]

    # --- one file ----------------------------------------------------------------------------------------------------
    def _find(self, key: str) -> Held | None:
        """The whole file of a key, locked against removal and known as the one used last."""
        with self._locked():
            for entry in self._entries():
                if entry.name.startswith(f"{key}-"):
                    file = open(entry.path, "rb")  # noqa: SIM115  (handed out)
                    fcntl.flock(file, fcntl.LOCK_SH)
                    with contextlib.suppress(PermissionError):  # another user's
                        os.utime(entry.path, ns=(time.time_ns(), entry.stat().st_mtime_ns))
                    return Held(file, entry.name.removesuffix(_WHOLE).rpartition("-")[2], False)
        return None

    def _claim(self, key: str) -> IO[bytes] | None:
        """The file to fetch into, exclusively locked; None where another process holds it and does not get on."""
        path = self._path(key + _PART)
        progress, since_s = (0, 0), time.monotonic()
        wait_s = _SHORTEST_WAIT_S
        while True:
            file = open(path, "r+b", opener=_creating)  # noqa: SIM115  (handed out)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, path):
                    return file
            except BlockingIOError:
                now = os.fstat(file.fileno())
                if progress != (now.st_ino, now.st_mtime_ns):
                    progress, since_s = (now.st_ino, now.st_mtime_ns), time.monotonic()
                elif time.monotonic() > since_s + self._patience_s:
                    file.close()
                    return None
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            file.close()

    # --- room --------------------------------------------------------------------------------------------------------
    def _grow(self, part: IO[bytes], length: int) -> None:
        """Make sure of room for a file that gets longer than was promised."""
        if self._limit_bytes is not None and length > os.fstat(part.fileno()).st_size:
            try:
                self._promise(part, length + _STEP_BYTES)
            except _NoRoomError:
                self._promise(part, length)

    def _promise(self, part: IO[bytes], num_bytes: int) -> None:
        if self._limit_bytes is None:
            return
        with self._locked():
            if not self._make_room(_on_disk(num_bytes) - _on_disk(os.fstat(part.fileno()).st_size)):
                raise _NoRoomError
            os.ftruncate(part.fileno(), max(0, num_bytes))

    def _make_room(self, num_bytes: int) -> bool:
        """Remove what was used longest ago until `num_bytes` fit; False where what is in use does not let them."""
        used, removable = 0, []
        for entry in self._entries():
            status = entry.stat()
            if entry.name.endswith(_PART) and _remove_unused(entry.path):
                continue
            used += _on_disk(status.st_size)
            if entry.name.endswith(_WHOLE):
                removable.append((status.st_atime_ns, _on_disk(status.st_size), entry.path))
        limit = -1 if self._limit_bytes is None else self._limit_bytes
        if num_bytes > limit >= 0:
            return False  # and nothing has to go for it
        for _, size, path in sorted(removable):
            if used + num_bytes <= limit:
                break
            if _remove_unused(path):
                used -= size
        return used + num_bytes <= limit


def _creating(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _on_disk(num_bytes: int) -> int:
    return -(-max(0, num_bytes) // _BLOCK_BYTES) * _BLOCK_BYTES


def _is_at(file: IO[bytes], path: str) -> bool:
    """Whether an open file is still the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _remove_unused(path: str) -> bool:
    """Remove a file that no process has locked; whether it is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except (BlockingIOError, PermissionError):
        return False
    except FileNotFoundError:
        pass
    return True
