"""Files on web servers (http, https), for reading only: in ranges where the server knows them, else as a whole."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from functools import partial
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from open_lm.errors import StorageError
from open_lm.storage_errors import IncompleteTransfer, full_disk_explained, with_retries
from open_lm.storage_files import BLOCK_BYTES, FileInfo, RangeReader, plain_tag

_TIMEOUT_S = 30.0


class WebBackend:
    def open(self, url: str) -> IO[bytes]:
        found, has_ranges = with_retries(partial(_look, url))
        if found is None:
            raise FileNotFoundError(url)
        if has_ranges:
            return RangeReader(found, partial(_fetch, found)).buffered()
        file = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
        with full_disk_explained(url, tempfile.gettempdir()):
            with_retries(partial(_fill, url, file))
        return file

    def read_range(self, url: str, start: int, length: int) -> bytes:
        with self.open(url) as file:
            file.seek(start)
            return file.read(length)

    def info(self, url: str) -> FileInfo | None:
        return with_retries(partial(_look, url))[0]

    def get(self, found: FileInfo, path: str) -> None:
        with self.open(found.url) as source, open(path, "wb") as file:
            shutil.copyfileobj(source, file, BLOCK_BYTES)

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        raise StorageError(f"{url}: files on a web server cannot be listed; name each file by its whole address")

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        return self.walk(pattern, True)

    def put(self, path: str, url: str) -> None:
        raise StorageError(f"{url}: a web server cannot be written to; choose a folder, s3:// or another store")

    def remove(self, url: str) -> None:
        raise StorageError(f"{url}: files on a web server cannot be removed")


@contextlib.contextmanager
def _answer(url: str, wanted: str | None = None) -> Iterator[Any]:
    headers = {"User-Agent": "open_lm", "Accept-Encoding": "identity", **({"Range": wanted} if wanted else {})}
    request = Request(quote(url, safe="%/:?#[]@!$&'()*+,;=~"), headers=headers)
    with urlopen(request, timeout=_TIMEOUT_S) as answer:
        yield answer


def _look(url: str) -> tuple[FileInfo | None, bool]:
    """What the server tells of a file, and whether it gives ranges; by a GET of one byte, as some forbid HEAD."""
    try:
        with _answer(url, "bytes=0-0") as answer:
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


def _fetch(found: FileInfo, start: int, length: int) -> bytes:
    def fetch() -> bytes:
        with _answer(found.url, f"bytes={start}-{start + length - 1}") as answer:
            now = _info(found.url, answer)
            if answer.status == 206 and (now.size, now.etag or now.mtime_s) != (
                found.size,
                found.etag or found.mtime_s,
            ):
                raise StorageError(f"{found.url}: the file was changed while it was being read; begin again")
            data: bytes = answer.read(length) if answer.status == 206 else b""
        if len(data) != length:
            raise IncompleteTransfer(f"{length} bytes were asked for at {start}, {len(data)} arrived")
        return data

    return with_retries(fetch)


def _fill(url: str, file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()
    with _answer(url) as answer:
        expected = _info(url, answer).size
        shutil.copyfileobj(answer, file, BLOCK_BYTES)
    if expected not in (-1, file.tell()):
        raise IncompleteTransfer(f"the server announced {expected} bytes, {file.tell()} arrived")
    file.seek(0)
