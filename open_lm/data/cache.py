"""A folder of downloaded shards that several processes share: each is downloaded once, none is removed while in use.

Every file is locked (flock) as long as a process uses it. A file without a lock was left by a process that ended:

    <key>-<sha256>.tar    a complete file; readers hold a shared lock, also while it is only mapped
    <key>.part            a download in progress, exclusively locked by its process; its length is the space reserved
                          for it, so that all lengths together never exceed the limit
    .lock                 locked briefly to look up a file, free space or rename a file

The key is a hash of the address and of everything known about the content before the download.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Literal, NamedTuple

from open_lm.storage.paths import is_open_at

_PARTIAL, _COMPLETE = ".part", ".tar"
_CACHE_NAME = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{64}\.tar|\.part)")  # other files in the folder are not touched
_RESERVE_BYTES = 64 << 20  # reserved at a time for a file of unknown length
_BLOCK_BYTES = 4096  # a file occupies full disk blocks
_MIN_WAIT_S, _MAX_WAIT_S = 0.001, 0.05

Fill = Callable[[IO[bytes], Callable[[int], None]], str]


class CacheEntry(NamedTuple):
    """An open file of a cache, which is not removed while it is open or mapped; `is_new` if it was just downloaded."""

    file: IO[bytes]
    sha256: str
    is_new: bool


class CacheFullError(Exception):
    """A cache whose files in use leave too little space within the limit."""


class StalledDownloadError(Exception):
    """A file that another process downloads without making progress."""


class Cache:
    """A folder of files with at most `limit_bytes` in total; without a limit it keeps only the files in use.

    `stall_timeout_s` is how long to wait for another process whose download makes no progress. `evicts` says which of
    its unused files a full cache removes for a new one: those used longest ago, those used last, or none. Passes over
    more files than fit need "newest": the file used longest ago is the next to be used.
    """

    def __init__(
        self,
        folder: str,
        limit_bytes: int | None,
        stall_timeout_s: float,
        *,
        evicts: Literal["oldest", "newest", "none"] = "oldest",
    ) -> None:
        self.folder, self._limit_bytes, self._stall_timeout_s = folder, limit_bytes, stall_timeout_s
        self._evicts = evicts
        self._is_trimmed = False

    def get(self, identity: str, num_bytes: int, fill: Fill) -> CacheEntry:
        """Return the file of this identity; if it is missing, download it with `fill(file, grow)`.

        `num_bytes` is its length, -1 if unknown. `fill` calls `grow(length)` before the file becomes that long, and
        returns the sha256. CacheFullError, StalledDownloadError, OSError from the folder, and any error of `fill`.
        """
        key = _key(identity)
        os.makedirs(self.folder, exist_ok=True)
        if not self._is_trimmed:
            self.trim()
        return self._find(key) or self._fill(key, self._lock_partial(key), num_bytes, fill)

    def _fill(self, key: str, part: IO[bytes], num_bytes: int, fill: Fill) -> CacheEntry:
        is_done = False
        try:
            entry = self._find(key)
            if entry is not None:  # another process downloaded it in the meantime
                return entry
            self._reserve(part, num_bytes)
            sha256 = fill(part, lambda length: self._grow(part, length))
            with self._locked():
                os.replace(self._path(key + _PARTIAL), self._path(f"{key}-{sha256}{_COMPLETE}"))
                fcntl.flock(part, fcntl.LOCK_SH)
            is_done = True
            return CacheEntry(part, sha256, True)
        finally:
            if not is_done:
                with contextlib.suppress(FileNotFoundError), self._locked():
                    os.unlink(self._path(key + _PARTIAL))
                part.close()

    def count(self, identities: Iterable[str]) -> int:
        """Return how many of these files the cache has."""
        if not os.path.isdir(self.folder):
            return 0
        keys = {entry.name.partition("-")[0] for entry in self._entries() if entry.name.endswith(_COMPLETE)}
        return sum(_key(identity) in keys for identity in identities)

    def discard(self, entry: CacheEntry) -> None:
        """Remove a damaged file; processes that have it open keep it."""
        inode = os.fstat(entry.file.fileno()).st_ino
        entry.file.close()
        with self._locked():
            for other in self._entries():
                if other.inode() == inode:
                    os.unlink(other.path)

    def trim(self) -> None:
        """Remove incomplete files of killed processes, files beyond the limit, and without a limit all unused files."""
        with self._locked():
            self._free_space(0)
        self._is_trimmed = True

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._path(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a child forked in the meantime has the file open too

    def _entries(self) -> list[os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            return [entry for entry in entries if _CACHE_NAME.fullmatch(entry.name)]

    # --- one file ----------------------------------------------------------------------------------------------------
    def _find(self, key: str) -> CacheEntry | None:
        """Open the complete file of a key, lock it against removal and mark it as used last."""
        with self._locked():
            for entry in self._entries():
                if entry.name.startswith(f"{key}-"):
                    file = open(entry.path, "rb")  # noqa: SIM115  (returned)
                    fcntl.flock(file, fcntl.LOCK_SH)
                    with contextlib.suppress(PermissionError):  # a file of another user
                        os.utime(entry.path, ns=(time.time_ns(), entry.stat().st_mtime_ns))
                    return CacheEntry(file, entry.name.removesuffix(_COMPLETE).rpartition("-")[2], False)
        return None

    def _lock_partial(self, key: str) -> IO[bytes]:
        """Open and lock the file to download to; wait for a process that has it locked as long as it progresses."""
        path = self._path(key + _PARTIAL)
        progress, since_s = (0, 0), time.monotonic()
        wait_s = _MIN_WAIT_S
        while True:
            file = open(path, "r+b", opener=_open_or_create)  # noqa: SIM115  (returned)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_open_at(file, path):
                    return file
            except BlockingIOError:
                now = os.fstat(file.fileno())
                if progress != (now.st_ino, now.st_mtime_ns):
                    progress, since_s = (now.st_ino, now.st_mtime_ns), time.monotonic()
                elif time.monotonic() > since_s + self._stall_timeout_s:
                    file.close()
                    raise StalledDownloadError(f"received nothing for {self._stall_timeout_s:g} s") from None
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _MAX_WAIT_S)
            file.close()

    # --- space -------------------------------------------------------------------------------------------------------
    def _grow(self, part: IO[bytes], length: int) -> None:
        """Reserve space for a file that becomes longer than its reservation."""
        if self._limit_bytes is not None and length > os.fstat(part.fileno()).st_size:
            try:
                self._reserve(part, length + _RESERVE_BYTES)
            except CacheFullError:
                self._reserve(part, length)

    def _reserve(self, part: IO[bytes], num_bytes: int) -> None:
        if self._limit_bytes is None:
            return
        with self._locked():
            if not self._free_space(_on_disk(num_bytes) - _on_disk(os.fstat(part.fileno()).st_size)):
                raise CacheFullError
            os.ftruncate(part.fileno(), max(0, num_bytes))

    def _free_space(self, num_bytes: int) -> bool:
        """Remove unused files until `num_bytes` fit; return False if the others prevent that."""
        used, removable = 0, []
        for entry in self._entries():
            status = entry.stat()
            if entry.name.endswith(_PARTIAL) and _remove_unused(entry.path):
                continue
            used += _on_disk(status.st_size)
            if entry.name.endswith(_COMPLETE) and self._evicts != "none":
                removable.append((status.st_atime_ns, _on_disk(status.st_size), entry.path))
        limit = -1 if self._limit_bytes is None else self._limit_bytes
        if num_bytes > limit >= 0:
            return False  # it can never fit, so remove nothing for it
        for _, size, path in sorted(removable, reverse=self._evicts == "newest"):
            if used + num_bytes <= limit:
                break
            if _remove_unused(path):
                used -= size
        return used + num_bytes <= limit


def _key(identity: str) -> str:
    return hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _on_disk(num_bytes: int) -> int:
    return -(-max(0, num_bytes) // _BLOCK_BYTES) * _BLOCK_BYTES


def _remove_unused(path: str) -> bool:
    """Remove a file unless a process has it locked; return whether it is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except (BlockingIOError, PermissionError):
        return False
    except FileNotFoundError:
        pass
    return True
