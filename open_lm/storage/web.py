"""Read-only access to web servers (http, https): in ranges if the server supports them, else as one download."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from functools import partial
from typing import IO, Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from open_lm.errors import StorageError
from open_lm.storage.paths import (
    CHUNK_BYTES,
    READ_TIMEOUT_S,
    SOCKET_TIMEOUT_FACTOR,
    FileInfo,
    RangeReader,
    read_chunks,
    read_in_parts,
    strip_etag,
)
from open_lm.storage.retries import (
    CHANGED_DURING_READ,
    IncompleteTransfer,
    SizeMismatch,
    run_with_stall_timeout,
    with_retries,
    wrap_disk_full_errors,
)

T = TypeVar("T")


class WebBackend:
    """Files on a web server; listing, writing and removing raise StorageError."""

    def __init__(self, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s

    def open(self, url: str) -> IO[bytes]:
        file_info, supports_ranges = self._probe(url)
        if file_info is None:
            raise FileNotFoundError(url)
        if supports_ranges:
            return RangeReader(file_info, partial(self._fetch, file_info)).buffered()
        return self._download(url)

    def read_range(self, url: str, start: int, length: int) -> list[bytes]:
        with self.open(url) as file:
            file.seek(start)
            return [file.read(length)]

    def info(self, url: str) -> FileInfo | None:
        return self._probe(url)[0]

    def parts(self, file_info: FileInfo) -> Iterator[bytes]:
        current, supports_ranges = self._probe(file_info.url)
        if current is not None and -1 not in (file_info.size, current.size) and file_info.size != current.size:
            raise SizeMismatch(file_info.url, current.size, file_info.size)
        if current is not None and supports_ranges:
            yield from read_in_parts(partial(self._fetch, current), current.size)
            return
        with self._download(file_info.url) as file:
            yield from iter(partial(file.read, CHUNK_BYTES), b"")

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        raise StorageError(f"{url}: files on a web server cannot be listed; give the full URL of each file")

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        return self.walk(pattern, True)

    def put(self, path: str, url: str) -> None:
        raise StorageError(f"{url}: a web server cannot be written to; choose a folder, s3:// or another store")

    def remove(self, url: str) -> None:
        raise StorageError(f"{url}: files on a web server cannot be removed")

    def _probe(self, url: str) -> tuple[FileInfo | None, bool]:
        return self._retry(lambda _heartbeat: _probe(url, self._timeout_s), url)

    def _fetch(self, file_info: FileInfo, start: int, length: int) -> bytes:
        return self._retry(partial(_fetch, file_info, start, length, self._timeout_s), file_info.url)

    def _download(self, url: str) -> IO[bytes]:
        with wrap_disk_full_errors(url, tempfile.gettempdir()):
            return self._retry(partial(_download, url, self._timeout_s), url)

    def _retry(self, action: Callable[[Callable[[], None]], T], url: str) -> T:
        return with_retries(lambda: run_with_stall_timeout(action, url, self._timeout_s))


@contextlib.contextmanager
def _get(url: str, timeout_s: float, byte_range: str | None = None) -> Iterator[Any]:
    """Send a GET request, and yield the response."""
    headers = {"User-Agent": "open_lm", "Accept-Encoding": "identity", **({"Range": byte_range} if byte_range else {})}
    request = Request(quote(url, safe="%/:?#[]@!$&'()*+,;=~"), headers=headers)
    with urlopen(request, timeout=SOCKET_TIMEOUT_FACTOR * timeout_s) as response:
        yield response


def _probe(url: str, timeout_s: float) -> tuple[FileInfo | None, bool]:
    """Return a file's information and whether the server supports ranges: a GET of one byte, as some forbid HEAD."""
    try:
        with _get(url, timeout_s, "bytes=0-0") as response:
            return _info(url, response), response.status == 206
    except HTTPError as error:
        if error.code == 416:  # an empty file has no first byte
            return FileInfo(url, 0, 0.0), True
        if error.code in (404, 410):
            return None, False
        raise


def _info(url: str, response: Any) -> FileInfo:
    headers = response.headers
    is_range = response.status == 206
    size = headers.get("Content-Range", "").rpartition("/")[2] if is_range else headers.get("Content-Length")
    modified = headers.get("Last-Modified")
    mtime_s = parsedate_to_datetime(modified).timestamp() if modified else 0.0
    return FileInfo(url, int(size) if size and size.isdigit() else -1, mtime_s, strip_etag(headers.get("ETag")))


def _fetch(file_info: FileInfo, start: int, length: int, timeout_s: float, heartbeat: Callable[[], None]) -> bytes:
    """Return one range of a file; raise StorageError if it is no longer the file that `file_info` describes."""
    with _get(file_info.url, timeout_s, f"bytes={start}-{start + length - 1}") as response:
        current = _info(file_info.url, response)
        is_range = response.status == 206
        if is_range and _version(current) != _version(file_info):
            raise StorageError(f"{file_info.url}: {CHANGED_DURING_READ}")
        data = b"".join(read_chunks(response.read, heartbeat)) if is_range else b""
    if len(data) != length:
        raise IncompleteTransfer(f"requested {length} bytes at offset {start}, received {len(data)}")
    return data


def _version(file_info: FileInfo) -> tuple[int, str | float]:
    return file_info.size, file_info.etag or file_info.mtime_s


def _download(url: str, timeout_s: float, heartbeat: Callable[[], None]) -> IO[bytes]:
    """Download a file from a server without ranges to a temporary file; a retry downloads it from the start."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
    with _get(url, timeout_s) as response:
        expected = _info(url, response).size
        for chunk in read_chunks(response.read, heartbeat):
            file.write(chunk)
    if expected not in (-1, file.tell()):
        raise IncompleteTransfer(f"the server announced {expected} bytes, received {file.tell()}")
    file.seek(0)
    return file
