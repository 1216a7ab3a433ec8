"""Helpers that all storage backends share: parse URLs, describe files and read remote files in ranges."""

from __future__ import annotations

import io
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar

from open_lm.storage.retries import wrap_errors

T = TypeVar("T")
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
TEMP_MARK = ".open-lm-part-"
_MAX_NAME_BYTES = 255  # of local file systems
BLOCK_BYTES = 8 << 20
READ_TIMEOUT_S = 30.0
# Socket timeout as a multiple of the read timeout: it ends the thread of a request that was abandoned.
SOCKET_TIMEOUT_FACTOR = 2
CHUNK_BYTES = 256 << 10  # must arrive within one read timeout; slower than some kB/s counts as a stall
_BUFFER_BYTES = 256 << 10
PART_BYTES, _NUM_PARALLEL = 32 << 20, 6  # for complete files: large ranges, because each request adds latency
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class FileInfo:
    """A file's URL, size in bytes, modification time (seconds since 1970) and ETag.

    The ETag changes with the content. An unknown size is -1, an unknown time 0.0, an unknown ETag empty.
    """

    url: str
    size: int
    mtime_s: float
    etag: str = ""


def is_web(url: str) -> bool:
    """Return whether the URL is an http or https URL."""
    return url.lower().startswith(("http://", "https://"))


def is_temporary(name: str | os.PathLike[str]) -> bool:
    """Return whether a file is an incomplete one of `atomic_write` or `download` (in progress, or left by a crash)."""
    return TEMP_MARK in os.path.basename(os.fspath(name))


def temporary_name(target: str, tag: str) -> str:
    """Return a name in the folder of `target` for a temporary file that `is_temporary` recognizes."""
    folder, name = os.path.split(target)
    end = f"{TEMP_MARK}{tag}"
    start = os.fsdecode(os.fsencode(f".{name}")[: _MAX_NAME_BYTES - len(end)])
    return os.path.join(folder, start + end)


def is_open_at(file: IO[Any], path: str) -> bool:
    """Return whether a local path still names this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def strip_etag(tag: str | None) -> str:
    """Return a store's ETag without its quotes."""
    return (tag or "").strip('"')


def parse_bytes(text: str) -> int:
    """Parse a size such as 4GB, 512MiB, 1.5g or a plain number of bytes; raise ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"expected a size such as 4GB or 512MiB, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def split_lines(text: str) -> list[str]:
    """Split a text into lines without their ends: "\\n" or "\\r\\n". The end of the last line may be missing.

    `str.splitlines` also splits at characters that JSON strings and prompts may hold, such as U+2028, U+0085 and form
    feeds. A byte order mark at the start is dropped.
    """
    lines = text.removeprefix("\ufeff").split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_chunks(read: Callable[[int], bytes], heartbeat: Callable[[], None]) -> Iterator[bytes]:
    """Yield what `read(max_bytes)` returns until it is empty, and call `heartbeat` for each chunk."""
    while chunk := read(CHUNK_BYTES):
        heartbeat()
        yield chunk


def read_in_parts(
    fetch: Callable[[int, int], T], num_bytes: int, *, part_bytes: int = 0, num_parallel: int = _NUM_PARALLEL
) -> Iterator[T]:
    """Yield a complete file in order, in parts of `part_bytes` (default: PART_BYTES).

    At most `num_parallel` parts are being fetched or held in memory. `fetch(start, length)` returns exactly that
    range or raises.
    """
    part_bytes = part_bytes or PART_BYTES
    if 0 < num_bytes <= part_bytes:
        yield fetch(0, num_bytes)
        return
    starts = iter(range(0, num_bytes, part_bytes))
    pending: deque[_ReadAhead[T]] = deque()
    while True:
        while len(pending) < num_parallel and (start := next(starts, None)) is not None:
            pending.append(_ReadAhead(fetch, start, min(part_bytes, num_bytes - start)))
        if not pending:
            return
        part = pending.popleft().result()
        if part is None:
            raise RuntimeError("a forked child cannot continue a read in parts that its parent started")
        yield part


class RangeReader(io.RawIOBase):
    """A seekable remote file, read in blocks with `fetch(start, length)`, which returns exactly that range or raises.

    During a sequential read, a thread prefetches the next block, so two blocks are in memory.
    """

    def __init__(self, file_info: FileInfo, fetch: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self._file_info, self._fetch = file_info, fetch
        self._position = 0
        self._block, self._block_start = b"", 0
        self._ahead: _ReadAhead[bytes] | None = None

    def buffered(self) -> io.BufferedReader:
        """Return a buffered reader of this file."""
        return io.BufferedReader(self, _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file_info.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._file_info.size:
            return 0
        if not self._block_start <= self._position < self._block_start + len(self._block):
            with wrap_errors(self._file_info.url):
                self._load()
        offset = self._position - self._block_start
        data = memoryview(self._block)[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _load(self) -> None:
        """Load the block at the current position, and prefetch the next one if the read is sequential."""
        start, ahead = self._position, self._ahead
        is_sequential = start == self._block_start + len(self._block)
        self._ahead, self._block = None, b""  # free the memory before the next block arrives
        data = ahead.result() if ahead is not None and ahead.start_byte == start else None
        self._block = self._fetch(start, self._length_at(start)) if data is None else data
        self._block_start, next_start = start, start + len(self._block)
        if is_sequential and next_start < self._file_info.size:
            self._ahead = _ReadAhead(self._fetch, next_start, self._length_at(next_start))

    def _length_at(self, start: int) -> int:
        return min(BLOCK_BYTES, self._file_info.size - start)

    def close(self) -> None:
        self._ahead, self._block = None, b""
        super().close()


class _ReadAhead(threading.Thread, Generic[T]):
    """A thread that fetches one block; a daemon, so that neither a closed reader nor process exit waits for it."""

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
        """Wait and return the block, or None in a forked child, where the parent's thread does not exist."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._data
