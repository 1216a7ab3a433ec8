"""The bytes of a piece: opened, decompressed, counted, hashed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, cast

from open_lm import storage
from open_lm.datapreprocess.readers.base import BadDocument, Block, BrokenFile, Document, Piece, excerpt
from open_lm.datapreprocess.readers.compression import decompressed

_COMPRESSED_BYTES, _PLAIN_BYTES = 256 << 10, 1 << 20
_BLOCK_CHARACTERS, _BLOCK_DOCUMENTS = 1 << 20, 1024
_ROWS = re.compile(r"(.*)\?rows=(\d+):(\d+)", re.DOTALL)


def split_rows(url: str) -> tuple[str, tuple[int, int] | None]:
    """The address of a file and the rows [first, last) that are wanted of it (`FILE?rows=FIRST:LAST`), None for all."""
    match = _ROWS.fullmatch(url)
    return (match[1], (int(match[2]), int(match[3]))) if match else (url, None)


class Source:
    """The bytes of one piece as they are read: counted, and hashed on the way.

    `bytes_read` is the input consumed so far, `lines` what the format has counted of lines or rows. `digest` is the
    sha256 of the bytes that the piece covers, once all of them were read.
    """

    def __init__(self, piece: Piece, compression: str) -> None:
        self.piece, self.compression = piece, compression
        self.path, self.rows = split_rows(piece.url)
        self.bytes_read = self.lines = 0
        self.digest: str | None = None
        self._hash = hashlib.sha256()

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file, seekable; what storage cannot read of it is a BrokenFile."""
        try:
            with storage.open_file(self.path) as file:
                yield file
        except OSError as error:
            text = str(error)
            message = text if self.path in text else f"{self.path}: cannot be read ({text})"
            raise BrokenFile("unreadable", message) from error

    def blocks(self) -> Iterator[bytes]:
        """The content of the whole file, decompressed, a block at a time."""
        if self.compression:
            return decompressed(self._raw_blocks(_COMPRESSED_BYTES), self.compression, self.path)
        return self._raw_blocks(_PLAIN_BYTES)

    def _raw_blocks(self, block_bytes: int) -> Iterator[bytes]:
        with self.open() as file:
            while block := file.read(self._at_once(block_bytes)):
                self._take(block)
                yield block
        self._finish()

    def _at_once(self, most_bytes: int) -> int:
        """No more than the piece holds: room for a large block costs more than a tiny file takes to read."""
        return min(most_bytes, self.piece.num_bytes + 1) if self.piece.num_bytes else most_bytes

    def line_blocks(self) -> Iterator[bytes]:
        """The lines that begin in the bytes [start, end) of the piece, in blocks that end anywhere."""
        start, end = self.piece.start, self.piece.end
        position = max(start - 1, 0)  # a line begins at `start` only where the byte before ends another
        inside = start == 0
        with self.open() as file:
            file.seek(position)
            while block := file.read(self._at_once(_PLAIN_BYTES)):
                self._take(block[max(start - position, 0) : max(end - position, 0)])
                first = 0 if inside else block.find(b"\n") + 1
                inside = inside or first > 0
                if first and position + first >= end:  # the first line that begins here is another piece's
                    break
                if inside:
                    last = block.find(b"\n", max(end - 1 - position, first))  # the end of the last line to give
                    yield block[first : last + 1] if last >= 0 else block[first:]
                    if last >= 0:
                        break
                position += len(block)
        self._finish()

    @contextlib.contextmanager
    def open_seekable(self) -> Iterator[IO[bytes]]:
        """The content as a seekable file; a compressed one is unpacked to disk first.

        Of one whose compressed data breaks off, the content before the break is given before the error is raised.
        """
        if not self.compression:
            with self.open() as file:
                yield file
            return
        fault: BrokenFile | None = None
        with tempfile.TemporaryFile() as unpacked:
            try:
                unpacked.writelines(self.blocks())
            except BrokenFile as error:
                fault = error
            try:
                yield unpacked
            except BrokenFile as error:
                raise fault or error from None
        if fault is not None:
            raise fault

    @contextlib.contextmanager
    def open_forwards(self) -> Iterator[IO[bytes]]:
        """The uncompressed file for a reader that seeks forwards only: what it skips, and the rest, is hashed too."""
        with self.open() as file:
            forward = _ForwardFile(file, self._take)
            yield cast(IO[bytes], forward)
            forward.read_rest()
        self._finish()

    @property
    def at_start(self) -> bool:
        """Whether what comes next is the beginning of the file."""
        return not self.lines and not self.piece.start

    def block(self, documents: Sequence[Document], bad: Sequence[BadDocument] = ()) -> Block:
        return Block(list(documents), list(bad), self.bytes_read)

    def in_blocks(self, found: Iterable[Document | BadDocument]) -> Iterator[Block]:
        """What is found one by one, in blocks; before a BrokenFile comes what was found."""
        documents: list[Document] = []
        bad: list[BadDocument] = []
        size = 0
        fault: BrokenFile | None = None
        try:
            for item in found:
                if isinstance(item, BadDocument):
                    bad.append(item)
                else:
                    documents.append(item)
                    size += len(item)
                if size >= _BLOCK_CHARACTERS or len(documents) + len(bad) >= _BLOCK_DOCUMENTS:
                    yield self.block(documents, bad)
                    documents, bad, size = [], [], 0
        except BrokenFile as error:
            fault = error
        if documents or bad:
            yield self.block(documents, bad)
        if fault is not None:
            raise fault

    def bad(self, kind: str, line: int, detail: str, content: bytes | str = b"") -> BadDocument:
        """What is wrong with the line, row or (0) the whole of this piece."""
        detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
        return BadDocument(kind, self.piece.url, line, detail, self.piece.start, excerpt(content))

    def nothing(self) -> BadDocument:
        return self.bad("empty file", 0, "the file holds nothing")

    def _take(self, data: bytes) -> None:
        self.bytes_read += len(data)
        self._hash.update(data)

    def _finish(self) -> None:
        self.digest = None if self.rows else self._hash.hexdigest()


class _ForwardFile(io.RawIOBase):
    """Reads in order through a seekable file, in blocks; seeking forwards reads what lies between."""

    def __init__(self, file: IO[bytes], take: Callable[[bytes], None]) -> None:
        self._file, self._take = file, take
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._buffer, self._position, self._buffer_start = b"", 0, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            return self._size
        self._position = offset
        return offset

    def read(self, count: int = -1) -> bytes:
        wanted = self._size if count < 0 else min(self._position + count, self._size)
        parts = []
        while self._position < wanted:
            if self._position >= self._buffer_start + len(self._buffer):
                self._fill()
                continue
            part = self._buffer[self._position - self._buffer_start : wanted - self._buffer_start]
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)

    def read_rest(self) -> None:
        while self._buffer_start + len(self._buffer) < self._size:
            self._fill()

    def _fill(self) -> None:
        self._buffer_start += len(self._buffer)
        self._buffer = self._file.read(_PLAIN_BYTES)
        if not self._buffer:
            raise OSError(f"the file ended at byte {self._buffer_start} of {self._size}")
        self._take(self._buffer)
