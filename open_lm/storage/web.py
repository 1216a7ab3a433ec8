"""Files on web servers (http, https), for reading only: in ranges where the server knows them, else as a whole."""

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
    GIVEN_UP,
    READ_TIMEOUT_S,
    FileInfo,
    RangeReader,
    plain_tag,
    read_chunks,
    read_in_parts,
)
from open_lm.storage.retries import IncompleteTransfer, OtherSize, full_disk_explained, watched, with_retries

T = TypeVar("T")


class WebBackend:
    def __init__(self, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s

    def open(self, url: str) -> IO[bytes]:
        found, has_ranges = self._look(url)
        if found is None:
            raise FileNotFoundError(url)
        if has_ranges:
            return RangeReader(found, partial(self._fetch, found)).buffered()
        return self._whole(url)

    def read_range(self, url: str, start: int, length: int) -> bytes:
        with self.open(url) as file:
            file.seek(start)
            return file.read(length)

    def info(self, url: str) -> FileInfo | None:
        return self._look(url)[0]

    def parts(self, found: FileInfo) -> Iterator[bytes]:
        now, has_ranges = self._look(found.url)
        if now is not None and -1 not in (found.size, now.size) and found.size != now.size:
            raise OtherSize(found.url, now.size, found.size)
        if now is not None and has_ranges:
            yield from read_in_parts(partial(self._fetch, now), now.size)
            return
        with self._whole(found.url) as file:
            yield from iter(partial(file.read, CHUNK_BYTES), b"")

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        raise StorageError(f"{url}: files on a web server cannot be listed; name each file by its whole address")

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        return self.walk(pattern, True)

    def put(self, path: str, url: str) -> None:
        raise StorageError(f"{url}: a web server cannot be written to; choose a folder, s3:// or another store")

    def remove(self, url: str) -> None:
        raise StorageError(f"{url}: files on a web server cannot be removed")

    def _look(self, url: str) -> tuple[FileInfo | None, bool]:
        return self._persistently(lambda _alive: _look(url, self._timeout_s), url)

    def _fetch(self, found: FileInfo, start: int, length: int) -> bytes:
        return self._persistently(partial(_fetch, found, start, length, self._timeout_s), found.url)

    def _whole(self, url: str) -> IO[bytes]:
        with full_disk_explained(url, tempfile.gettempdir()):
            return self._persistently(partial(_whole, url, self._timeout_s), url)

    def _persistently(self, action: Callable[[Callable[[], None]], T], url: str) -> T:
        return with_retries(lambda: watched(action, url, self._timeout_s))


@contextlib.contextmanager
def _answer(url: str, timeout_s: float, wanted: str | None = None) -> Iterator[Any]:
    headers = {"User-Agent": "open_lm", "Accept-Encoding": "identity", **({"Range": wanted} if wanted else {})}
    request = Request(quote(url, safe="%/:?#[]@!$&'()*+,;=~"), headers=headers)
    with urlopen(request, timeout=GIVEN_UP * timeout_s) as answer:
        yield answer


def _look(url: str, timeout_s: float) -> tuple[FileInfo | None, bool]:
    """What the server tells of a file, and whether it gives ranges; by a GET of one byte, as some forbid HEAD."""
    try:
        with _answer(url, timeout_s, "bytes=0-0") as answer:
            return _info(url, answer), answer.status == 206
    except HTTPError as error:
        if error.code == 416:  # an empty file has no first byte
            return FileInfo(url, 0, 0.0), True
        if error.code in (404, 410):
            return None, False
        raise


def _info(url: str, answer: Any) -> FileInfo:
    headers = answer.headers
    size = (
        headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else headers.get("Content-Length")
    )
    changed = headers.get("Last-Modified")
    time = parsedate_to_datetime(changed).timestamp() if changed else 0.0
    return FileInfo(url, int(size) if size and size.isdigit() else -1, time, plain_tag(headers.get("ETag")))


def _fetch(found: FileInfo, start: int, length: int, timeout_s: float, alive: Callable[[], None]) -> bytes:
    """One range of a file that is still the one `found` describes."""
    with _answer(found.url, timeout_s, f"bytes={start}-{start + length - 1}") as answer:
        now = _info(found.url, answer)
        if answer.status == 206 and (now.size, now.etag or now.mtime_s) != (found.size, found.etag or found.mtime_s):
            raise StorageError(f"{found.url}: the file was changed while it was being read; begin again")
        data = b"".join(read_chunks(answer.read, alive)) if answer.status == 206 else b""
    if len(data) != length:
        raise IncompleteTransfer(f"{length} bytes were asked for at {start}, {len(data)} arrived")
    return data


def _whole(url: str, timeout_s: float, alive: Callable[[], None]) -> IO[bytes]:
    """A file from a server without ranges, as a temporary one: after a fault it has to begin again."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
    with _answer(url, timeout_s) as answer:
        expected = _info(url, answer).size
        for chunk in read_chunks(answer.read, alive):
            file.write(chunk)
    if expected not in (-1, file.tell()):
        raise IncompleteTransfer(f"the server announced {expected} bytes, {file.tell()} arrived")
    file.seek(0)
    return file
