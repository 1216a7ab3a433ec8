"""What all of storage's file systems share: addresses, what is known of a file, and reading a remote one in ranges."""

from __future__ import annotations

import io
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from open_lm.storage.retries import explained

T = TypeVar("T")
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
TEMP_MARK = ".open-lm-part-"
BLOCK_BYTES = 8 << 20
READ_TIMEOUT_S = 30.0
GIVEN_UP = 2  # a socket's timeout, in timeouts of a read: after it the thread of a request that was given up ends
CHUNK_BYTES = 256 << 10  # what has to come within a timeout: some thousand bytes a second are no stall
_BUFFER_BYTES = 256 << 10
PART_BYTES, _AT_ONCE = 32 << 20, 6  # of a whole file: long ranges, as each costs a store and the way to it a moment
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class FileInfo:
    """One file: its address, size in bytes, time of last change (seconds since the epoch) and the store's tag.

    The tag changes with the content. An unknown size is -1, an unknown time 0.0, an unknown tag empty.
    """

    url: str
    size: int
    mtime_s: float
    etag: str = ""


def local_path(url: str | os.PathLike[str]) -> str:
    """The file-system path of a local address, without `file://`."""
    text = os.fspath(url)
    return text[len("file://") :] if text.lower().startswith("file://") else text


def is_web(url: str) -> bool:
    """Whether a web server holds the file."""
    return url.lower().startswith(("http://", "https://"))


def is_temporary(name: str | os.PathLike[str]) -> bool:
    """Whether a file is one of `atomic_write`'s or `download`'s that is not complete yet (or was left by a crash)."""
    return TEMP_MARK in os.path.basename(os.fspath(name))


def temporary_name(target: str, tag: str) -> str:
    """The name of an incomplete or passing file beside `target`, which `is_temporary` knows."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}{TEMP_MARK}{tag}")


def plain_tag(tag: str | None) -> str:
    """A store's ETag without its quotes."""
    return (tag or "").strip('"')


def parse_bytes(text: str) -> int:
    """Bytes from words such as 4GB, 512MiB, 1.5g or a plain number; ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"expected a size such as 4GB or 512MiB, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def read_chunks(read: Callable[[int], bytes], alive: Callable[[], None]) -> Iterator[bytes]:
    """The pieces that `read(most_bytes)` gives until its end, with a sign of life for each."""
    while chunk := read(CHUNK_BYTES):
        alive()
        yield chunk


def read_in_parts(
    fetch: Callable[[int, int], T], num_bytes: int, *, part_bytes: int = 0, at_once: int = _AT_ONCE
) -> Iterator[T]:
    """A whole file in order, in parts of `part_bytes` (default: PART_BYTES), `at_once` of them held or on their way.

    `fetch(start, length)` gives exactly that or raises.
    """
    part_bytes = part_bytes or PART_BYTES
    if 0 < num_bytes <= part_bytes:
        yield fetch(0, num_bytes)
        return
    starts = iter(range(0, num_bytes, part_bytes))
    ahead: deque[_Ahead[T]] = deque()
    while True:
        while len(ahead) < at_once and (start := next(starts, None)) is not None:
            ahead.append(_Ahead(fetch, start, min(part_bytes, num_bytes - start)))
        if not ahead:
            return
        part = ahead.popleft().result()
        if part is None:
            raise RuntimeError("a file that is read in parts cannot be read on in a forked child")
        yield part


class RangeReader(io.RawIOBase):
    """A seekable remote file, read in blocks by `fetch(start, length)`, which gives exactly that or raises.

    While a file is read from front to back, a thread fetches the block after the one in use: two blocks are held.
    """

    def __init__(self, found: FileInfo, fetch: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self._found, self._fetch = found, fetch
        self._position = 0
        self._block, self._block_start = b"", 0
        self._ahead: _Ahead[bytes] | None = None

    def buffered(self) -> io.BufferedReader:
        return io.BufferedReader(self, _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._found.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._found.size:
            return 0
        if not self._block_start <= self._position < self._block_start + len(self._block):
            with explained(self._found.url):
                self._load()
        offset = self._position - self._block_start
        data = memoryview(self._block)[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _load(self) -> None:
        """Take the block that begins at the position, and have the one after it fetched if it is likely wanted."""
        start, ahead = self._position, self._ahead
        in_order = start == self._block_start + len(self._block)
        self._ahead, self._block = None, b""  # let go before the next comes
        data = ahead.result() if ahead is not None and ahead.start_byte == start else None
        self._block = self._fetch(start, self._length_at(start)) if data is None else data
        self._block_start, following = start, start + len(self._block)
        if in_order and following < self._found.size:
            self._ahead = _Ahead(self._fetch, following, self._length_at(following))

    def _length_at(self, start: int) -> int:
        return min(BLOCK_BYTES, self._found.size - start)

    def close(self) -> None:
        self._ahead, self._block = None, b""
        super().close()


class _Ahead(threading.Thread, Generic[T]):
    """One block on its way. A daemon: a reader that goes away, and the end of the process, need not wait for it."""

    def __init__(self, fetch: Callable[[int, int], T], start: int, length: int) -> None:
        super().__init__(name="open-lm-read-ahead", daemon=True)
        self.start_byte = start
        self._fetch, self._length = fetch, length
        self._data: T | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._data = self._fetch(self.start_byte, self._length)
        except Exception as error:
            self._error = error

    def result(self) -> T | None:
        """The block, or None in a forked child, to which the thread did not come along."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._data
