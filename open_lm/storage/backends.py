"""Choose the storage backend for a path or URL, and implement the local and the fsspec backend.

Only this module imports fsspec, and only `open_lm.storage` calls it. Every backend retries its own requests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from open_lm.errors import StorageError
from open_lm.storage.checksums import negotiate
from open_lm.storage.paths import (
    BLOCK_BYTES,
    READ_TIMEOUT_S,
    SCHEME,
    TEMP_MARK,
    FileInfo,
    RangeReader,
    is_temporary,
    is_web,
    read_in_parts,
    strip_etag,
)
from open_lm.storage.retries import (
    CHANGED_DURING_READ,
    IncompleteTransfer,
    SizeMismatch,
    is_transient,
    run_with_stall_timeout,
    with_retries,
)
from open_lm.storage.s3 import S3Backend, plain_config
from open_lm.storage.web import WebBackend
from open_lm.system.names import glob_paths, local_path

# Prefix of a scheme: use fsspec even if the scheme has its own backend (s3, https).
FSSPEC_PREFIX = "fsspec+"
_FSSPEC_REQUEST_BYTES = 2 << 20
_S3_SCHEMES = ("s3", "s3a")
T = TypeVar("T")
# fsspec file systems without folders, where a new object replaces the old one atomically.
_OBJECT_STORES = frozenset({"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf"})


class _Backend(Protocol):
    def open(self, url: str) -> IO[bytes]: ...
    def read_range(self, url: str, start: int, length: int) -> list[bytes]: ...  # in chunks; fewer bytes at the end
    def info(self, url: str) -> FileInfo | None: ...
    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]: ...
    def glob(self, pattern: str) -> Iterator[FileInfo]: ...
    def parts(self, file_info: FileInfo) -> Iterator[bytes]: ...  # the complete file, in order
    def put(self, path: str, url: str) -> None: ...  # atomic, and verified after the upload
    def remove(self, url: str) -> None: ...


def find_backend(url: str, timeout_s: float = READ_TIMEOUT_S) -> _Backend:
    """Return the backend of a path or URL; it retries a read that receives no byte for `timeout_s` seconds."""
    scheme = _scheme(url)
    if scheme == "file":
        return _LocalBackend()
    if is_web(url):
        return WebBackend(timeout_s)
    return S3Backend(timeout_s) if scheme in _S3_SCHEMES else _FsspecBackend(scheme, timeout_s)


def has_backend(url: str) -> bool:
    """Return whether a backend exists for the scheme of a URL."""
    scheme = _scheme(url)
    if scheme in ("file", *_S3_SCHEMES) or is_web(url):
        return True
    import fsspec

    return scheme.removeprefix(FSSPEC_PREFIX) in fsspec.available_protocols()


def _scheme(url: str) -> str:
    match = SCHEME.match(url)
    return match.group(1).lower() if match else "file"


class _LocalBackend:
    """The local file system."""

    def open(self, url: str) -> IO[bytes]:
        return open(local_path(url), "rb")

    def read_range(self, url: str, start: int, length: int) -> list[bytes]:
        with self.open(url) as file:
            file.seek(start)
            return [file.read(length)]

    def info(self, url: str) -> FileInfo | None:
        path = local_path(url)
        if not os.path.isfile(path):
            return None
        status = os.stat(path)
        return FileInfo(path, status.st_size, status.st_mtime)

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        pattern = Path(local_path(url)).rglob("*") if recursive else Path(local_path(url)).glob("*")
        for path in pattern:
            with contextlib.suppress(FileNotFoundError):  # removed during the walk
                file_info = self.info(str(path))
                if file_info is not None and not is_temporary(path):
                    yield file_info

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        for path in glob_paths(local_path(pattern)):
            with contextlib.suppress(FileNotFoundError):  # removed during the walk
                file_info = self.info(path)
                if file_info is not None:
                    yield file_info

    def parts(self, file_info: FileInfo) -> Iterator[bytes]:
        with self.open(file_info.url) as file:
            yield from iter(partial(file.read, BLOCK_BYTES), b"")

    def put(self, path: str, url: str) -> None:
        shutil.copyfile(path, local_path(url))

    def remove(self, url: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(local_path(url))


class _FsspecBackend:
    """All other schemes, through fsspec with its listings cache disabled."""

    def __init__(self, scheme: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._scheme = scheme.removeprefix(FSSPEC_PREFIX)
        self._prefix = scheme[: -len(self._scheme)]  # FSSPEC_PREFIX if the caller's URLs have it, else empty
        self._fs = self._file_system(plain=False)

    def _file_system(self, plain: bool) -> Any:
        """Return fsspec's file system, for an S3 store without checksum fields if `plain`."""
        import fsspec

        options: dict[str, Any] = {}
        if plain:
            options["config_kwargs"] = plain_config()
        return fsspec.filesystem(self._scheme, use_listings_cache=False, **options)

    def _negotiate(self, action: Callable[[Any], T]) -> T:
        """Return `action(file system)`, for an S3 store that refuses checksum fields without them."""
        if self._scheme not in _S3_SCHEMES:
            return action(self._fs)
        return negotiate(lambda plain: action(self._file_system(plain)))

    def _fsspec_url(self, url: str) -> str:
        """Return the URL that fsspec expects, without our prefix."""
        return url[len(self._prefix) :]

    def _url(self, name: str) -> str:
        return self._prefix + self._fs.unstrip_protocol(name)

    def _file_info(self, entry: dict[str, Any], url: str) -> FileInfo:
        modified = entry.get("mtime") or entry.get("LastModified") or entry.get("last_modified") or entry.get("created")
        mtime_s = modified.timestamp() if isinstance(modified, datetime) else 0.0
        if isinstance(modified, int | float):
            mtime_s = float(modified)
        size = -1 if entry.get("size") is None else int(entry["size"])
        return FileInfo(url, size, mtime_s, strip_etag(entry.get("ETag") or entry.get("etag")))

    def open(self, url: str) -> IO[bytes]:
        file_info = self.info(url)
        if file_info is None:
            raise FileNotFoundError(url)
        if file_info.size < 0:
            return with_retries(partial(self._fs.open, self._fsspec_url(url), "rb"))
        return RangeReader(file_info, partial(self._fetch, file_info)).buffered()

    def read_range(self, url: str, start: int, length: int) -> list[bytes]:
        with self.open(url) as file:
            file.seek(start)
            return [file.read(length)]

    def _fetch(self, file_info: FileInfo, start: int, length: int) -> bytes:
        data = self._fetch_unchecked(file_info, start, length)
        self._check_unchanged(file_info)
        return data

    def _fetch_unchecked(self, file_info: FileInfo, start: int, length: int) -> bytes:
        def fetch() -> bytes:
            url = self._fsspec_url(file_info.url)
            data: bytes = self._negotiate(lambda fs: fs.cat_file(url, start=start, end=start + length))
            if len(data) != length:
                raise IncompleteTransfer(f"requested {length} bytes at offset {start}, received {len(data)}")
            return data

        return self._retry(fetch, file_info.url)

    def _check_unchanged(self, file_info: FileInfo) -> None:
        current = self.info(file_info.url) if file_info.etag else file_info
        if current is None or (current.size, current.etag) != (file_info.size, file_info.etag):
            raise StorageError(f"{file_info.url}: {CHANGED_DURING_READ}")

    def _current_info(self, file_info: FileInfo) -> FileInfo:
        """Return the store's information on a file; raise SizeMismatch if the caller expects another size."""
        current = self.info(file_info.url)
        if current is None:
            raise FileNotFoundError(file_info.url)
        if -1 not in (file_info.size, current.size) and file_info.size != current.size:
            raise SizeMismatch(file_info.url, current.size, file_info.size)
        return current

    def _retry(self, action: Callable[[], T], url: str) -> T:
        return with_retries(lambda: run_with_stall_timeout(lambda _heartbeat: action(), url, self._timeout_s))

    def info(self, url: str) -> FileInfo | None:
        return self._retry(partial(self._request_info, url), url)

    def _request_info(self, url: str) -> FileInfo | None:
        try:
            entry = self._fs.info(self._fsspec_url(url))
        except FileNotFoundError as error:
            if is_transient(error):  # some file systems report every failed request as a missing file
                raise
            return None
        return self._file_info(entry, url) if entry["type"] == "file" else None

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        self._check_listable(url)
        depth = None if recursive else 1
        try:
            entries = with_retries(partial(self._fs.find, self._fsspec_url(url), maxdepth=depth, detail=True))
        except FileNotFoundError:
            return
        yield from self._files(entries)

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        self._check_listable(pattern)
        yield from self._files(with_retries(partial(self._fs.glob, self._fsspec_url(pattern), detail=True)))

    def _files(self, entries: dict[str, Any]) -> Iterator[FileInfo]:
        return (self._file_info(entry, self._url(name)) for name, entry in entries.items() if entry["type"] == "file")

    def _check_listable(self, url: str) -> None:
        if is_web(self._fsspec_url(url)):  # fsspec would guess a listing from the links of an HTML page
            WebBackend().walk(url, True)

    def parts(self, file_info: FileInfo) -> Iterator[bytes]:
        if not file_info.etag:
            file_info = self._current_info(file_info)
        if file_info.size < 0:
            with self.open(file_info.url) as file:
                yield from iter(partial(file.read, BLOCK_BYTES), b"")
            return
        # fsspec gives no heartbeat during a request, so requests must be small to finish within the timeout.
        # Only asynchronous file systems support parallel requests.
        options = {} if self._fs.async_impl else {"num_parallel": 1}
        yield from read_in_parts(
            partial(self._fetch_unchecked, file_info), file_info.size, part_bytes=_FSSPEC_REQUEST_BYTES, **options
        )
        self._check_unchanged(file_info)

    def put(self, path: str, url: str) -> None:
        expected = os.path.getsize(path)

        def put() -> None:
            self._put_once(path, self._fsspec_url(url))
            stored = self._request_info(url)
            if stored is None or stored.size != expected:
                size = f"{stored.size} bytes" if stored else "no such file"
                raise IncompleteTransfer(f"sent {expected} bytes, but the store has {size} after the upload")

        with_retries(put)

    def _put_once(self, path: str, target: str) -> None:
        if self._scheme in _OBJECT_STORES:
            self._negotiate(lambda fs: fs.put_file(path, target))
            return
        parent, _, name = target.rpartition("/")
        self._fs.makedirs(parent, exist_ok=True)
        temporary = f"{parent}/.{name}{TEMP_MARK}{os.getpid()}"
        self._fs.put_file(path, temporary)
        self._fs.mv(temporary, target)

    def remove(self, url: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            with_retries(partial(self._fs.rm_file, self._fsspec_url(url)))
