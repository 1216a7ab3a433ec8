"""What `open_lm.storage` stands on: which file system an address belongs to, the local one, and all that fsspec knows.

Only this module knows fsspec; nothing but `open_lm.storage` calls it. Every backend retries its own requests.
"""

from __future__ import annotations

import contextlib
import glob as local_glob
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from open_lm.errors import StorageError
from open_lm.storage.paths import (
    BLOCK_BYTES,
    READ_TIMEOUT_S,
    SCHEME,
    TEMP_MARK,
    FileInfo,
    RangeReader,
    is_temporary,
    is_web,
    local_path,
    plain_tag,
    read_in_parts,
)
from open_lm.storage.retries import IncompleteTransfer, OtherSize, is_transient, watched, with_retries
from open_lm.storage.s3 import S3Backend
from open_lm.storage.web import WebBackend

# Before a scheme: reach it through fsspec, also where there is another way (s3, https).
FSSPEC_PREFIX = "fsspec+"
_UNWATCHED_BYTES = 2 << 20
T = TypeVar("T")
# fsspec file systems without folders, on which a new object replaces the old one in a single act.
_OBJECT_STORES = frozenset({"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf"})


class _Backend(Protocol):
    def open(self, url: str) -> IO[bytes]: ...
    def read_range(self, url: str, start: int, length: int) -> bytes: ...  # fewer bytes at the end of the file
    def info(self, url: str) -> FileInfo | None: ...
    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]: ...
    def glob(self, pattern: str) -> Iterator[FileInfo]: ...
    def parts(self, found: FileInfo) -> Iterator[bytes]: ...  # the whole file, in order
    def put(self, path: str, url: str) -> None: ...  # whole, and verified
    def remove(self, url: str) -> None: ...


def find_backend(url: str, timeout_s: float = READ_TIMEOUT_S) -> _Backend:
    """The file system of an address; its reads are given up and tried again after `timeout_s` without a byte."""
    scheme = _scheme(url)
    if scheme == "file":
        return _LocalBackend()
    if is_web(url):
        return WebBackend(timeout_s)
    return S3Backend(timeout_s) if scheme in ("s3", "s3a") else _FsspecBackend(scheme, timeout_s)


def has_backend(url: str) -> bool:
    """Whether any file system knows the scheme of an address."""
    scheme = _scheme(url)
    if scheme in ("file", "s3", "s3a") or is_web(url):
        return True
    import fsspec

    return scheme.removeprefix(FSSPEC_PREFIX) in fsspec.available_protocols()


def _scheme(url: str) -> str:
    match = SCHEME.match(url)
    return match.group(1).lower() if match else "file"


class _LocalBackend:
    def open(self, url: str) -> IO[bytes]:
        return open(local_path(url), "rb")

    def read_range(self, url: str, start: int, length: int) -> bytes:
        with self.open(url) as file:
            file.seek(start)
            return file.read(length)

    def info(self, url: str) -> FileInfo | None:
        path = local_path(url)
        if not os.path.isfile(path):
            return None
        status = os.stat(path)
        return FileInfo(path, status.st_size, status.st_mtime)

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        pattern = Path(local_path(url)).rglob("*") if recursive else Path(local_path(url)).glob("*")
        for path in pattern:
            with contextlib.suppress(FileNotFoundError):  # removed while we look
                found = self.info(str(path))
                if found is not None and not is_temporary(path):
                    yield found

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        for path in local_glob.iglob(local_path(pattern), recursive=True):
            with contextlib.suppress(FileNotFoundError):  # removed while we look
                found = self.info(path)
                if found is not None:
                    yield found

    def parts(self, found: FileInfo) -> Iterator[bytes]:
        with self.open(found.url) as file:
            yield from iter(partial(file.read, BLOCK_BYTES), b"")

    def put(self, path: str, url: str) -> None:
        shutil.copyfile(path, local_path(url))

    def remove(self, url: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(local_path(url))


class _FsspecBackend:
    """Every other scheme, through fsspec; its listings are never taken from a cache."""

    def __init__(self, scheme: str, timeout_s: float) -> None:
        import fsspec

        self._timeout_s = timeout_s
        self._scheme = scheme.removeprefix(FSSPEC_PREFIX)
        self._prefix = scheme[: -len(self._scheme)]  # of the addresses given and returned
        self._fs = fsspec.filesystem(self._scheme, use_listings_cache=False)

    def _own(self, url: str) -> str:
        """The address as fsspec knows it."""
        return url[len(self._prefix) :]

    def _url(self, name: str) -> str:
        return self._prefix + self._fs.unstrip_protocol(name)

    def _file_info(self, entry: dict[str, Any], url: str) -> FileInfo:
        changed = entry.get("mtime") or entry.get("LastModified") or entry.get("last_modified") or entry.get("created")
        mtime = changed.timestamp() if isinstance(changed, datetime) else 0.0
        if isinstance(changed, int | float):
            mtime = float(changed)
        size = -1 if entry.get("size") is None else int(entry["size"])
        return FileInfo(url, size, mtime, plain_tag(entry.get("ETag") or entry.get("etag")))

    def open(self, url: str) -> IO[bytes]:
        found = self.info(url)
        if found is None:
            raise FileNotFoundError(url)
        if found.size < 0:
            return with_retries(partial(self._fs.open, self._own(url), "rb"))
        return RangeReader(found, partial(self._fetch, found)).buffered()

    def read_range(self, url: str, start: int, length: int) -> bytes:
        with self.open(url) as file:
            file.seek(start)
            return file.read(length)

    def _fetch(self, found: FileInfo, start: int, length: int) -> bytes:
        data = self._fetch_unchecked(found, start, length)
        self._expect_unchanged(found)
        return data

    def _fetch_unchecked(self, found: FileInfo, start: int, length: int) -> bytes:
        def fetch() -> bytes:
            data: bytes = self._fs.cat_file(self._own(found.url), start=start, end=start + length)
            if len(data) != length:
                raise IncompleteTransfer(f"{length} bytes were asked for at {start}, {len(data)} arrived")
            return data

        return self._persistently(fetch, found.url)

    def _expect_unchanged(self, found: FileInfo) -> None:
        now = self.info(found.url) if found.etag else found
        if now is None or (now.size, now.etag) != (found.size, found.etag):
            raise StorageError(f"{found.url}: the file was changed while it was being read; begin again")

    def _as_it_is(self, found: FileInfo) -> FileInfo:
        """What the store tells of a file of which the caller may know no more than the size."""
        now = self.info(found.url)
        if now is None:
            raise FileNotFoundError(found.url)
        if -1 not in (found.size, now.size) and found.size != now.size:
            raise OtherSize(found.url, now.size, found.size)
        return now

    def _persistently(self, action: Callable[[], T], url: str) -> T:
        return with_retries(lambda: watched(lambda _alive: action(), url, self._timeout_s))

    def info(self, url: str) -> FileInfo | None:
        return self._persistently(partial(self._look, url), url)

    def _look(self, url: str) -> FileInfo | None:
        try:
            entry = self._fs.info(self._own(url))
        except FileNotFoundError as error:
            if is_transient(error):  # some file systems take any failure to look for an absence
                raise
            return None
        return self._file_info(entry, url) if entry["type"] == "file" else None

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        self._expect_listable(url)
        depth = None if recursive else 1
        try:
            found = with_retries(partial(self._fs.find, self._own(url), maxdepth=depth, detail=True))
        except FileNotFoundError:
            return
        yield from self._files(found)

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        self._expect_listable(pattern)
        yield from self._files(with_retries(partial(self._fs.glob, self._own(pattern), detail=True)))

    def _files(self, found: dict[str, Any]) -> Iterator[FileInfo]:
        return (self._file_info(entry, self._url(name)) for name, entry in found.items() if entry["type"] == "file")

    def _expect_listable(self, url: str) -> None:
        if is_web(self._own(url)):  # fsspec would guess from the links of whatever page is there
            WebBackend().walk(url, True)

    def parts(self, found: FileInfo) -> Iterator[bytes]:
        if not found.etag:
            found = self._as_it_is(found)
        if found.size < 0:
            with self.open(found.url) as file:
                yield from iter(partial(file.read, BLOCK_BYTES), b"")
            return
        # No sign of life comes out of a request, so that it has to be small; only file systems that are made for many
        # requests at once get them.
        at_once = {} if self._fs.async_impl else {"at_once": 1}
        yield from read_in_parts(
            partial(self._fetch_unchecked, found), found.size, part_bytes=_UNWATCHED_BYTES, **at_once
        )
        self._expect_unchanged(found)

    def put(self, path: str, url: str) -> None:
        expected = os.path.getsize(path)

        def put() -> None:
            self._put_once(path, self._own(url))
            found = self._look(url)
            if found is None or found.size != expected:
                held = found.size if found else "nothing"
                raise IncompleteTransfer(f"{expected} bytes were sent, the store holds {held}")

        with_retries(put)

    def _put_once(self, path: str, target: str) -> None:
        if self._scheme in _OBJECT_STORES:
            self._fs.put_file(path, target)
            return
        parent, _, name = target.rpartition("/")
        self._fs.makedirs(parent, exist_ok=True)
        temporary = f"{parent}/.{name}{TEMP_MARK}{os.getpid()}"
        self._fs.put_file(path, temporary)
        self._fs.mv(temporary, target)

    def remove(self, url: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            with_retries(partial(self._fs.rm_file, self._own(url)))
