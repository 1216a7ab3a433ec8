"""The input bytes of a piece: open, decompress, count and hash them."""

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
from open_lm.datapreprocess.readers.base import (
    UNREADABLE,
    BadDocument,
    Block,
    BrokenFile,
    Document,
    Piece,
    excerpt,
)
from open_lm.datapreprocess.readers.compression import decompress

_COMPRESSED_BYTES, _PLAIN_BYTES = 256 << 10, 1 << 20
_BLOCK_CHARACTERS, _BLOCK_DOCUMENTS = 1 << 20, 1024
_ROWS = re.compile(r"(.*)\?rows=(\d+):(\d+)", re.DOTALL)


def split_rows(url: str) -> tuple[str, tuple[int, int] | None]:
    """Split `FILE?rows=FIRST:LAST` into the file and the row range [FIRST, LAST); None means all rows."""
    match = _ROWS.fullmatch(url)
    return (match[1], (int(match[2]), int(match[3]))) if match else (url, None)


class InputStream:
    """The input of one piece, which counts and hashes the bytes while they are read.

    Attributes:
        path: the file, without a row range.
        row_range: rows [first, last) to read; None for all.
        bytes_read: input bytes read so far.
        lines: lines or rows that the format has counted so far.
        lenient: documents since the last block whose JSON only Python's parser accepts.
        digest: sha256 of the bytes of the piece, set when all of them were read; None if it is not known. Of a file
            that is not read in order, the first piece has the sha256 of the full file, and the others have "".
    """

    def __init__(self, piece: Piece, compression: str = "") -> None:
        self.piece, self.compression = piece, compression
        self.path, self.row_range = split_rows(piece.url)
        self.bytes_read = self.lines = self.lenient = 0
        self.digest: str | None = None
        self._hash = hashlib.sha256()

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file, seekable and without decompression. Storage errors become BrokenFile."""
        try:
            with storage.open_file(self.path) as file:
                yield file
        except OSError as error:
            text = str(error)
            message = text if self.path in text else f"{self.path}: cannot be read ({text})"
            raise BrokenFile(UNREADABLE, message) from error

    def blocks(self) -> Iterator[bytes]:
        """Yield the decompressed content of the full file in blocks."""
        if self.compression:
            return decompress(self._raw_blocks(_COMPRESSED_BYTES), self.compression, self.path)
        return self._raw_blocks(_PLAIN_BYTES)

    def _raw_blocks(self, block_bytes: int) -> Iterator[bytes]:
        with self.open() as file:
            while block := file.read(self._read_size(block_bytes)):
                self._count(block)
                yield block
        self._finish()

    def _read_size(self, max_bytes: int) -> int:
        """Limit a read to the size of the piece: allocating a large buffer takes longer than reading a tiny file."""
        return min(max_bytes, self.piece.num_bytes + 1) if self.piece.num_bytes else max_bytes

    def line_blocks(self) -> Iterator[bytes]:
        """Yield the lines that begin in the bytes [start, end) of the piece; blocks may end inside a line."""
        start, end = self.piece.start, self.piece.end
        position = max(start - 1, 0)  # a line begins at `start` only if the byte before it ends another line
        inside = start == 0
        with self.open() as file:
            file.seek(position)
            while block := file.read(self._read_size(_PLAIN_BYTES)):
                self._count(block[max(start - position, 0) : max(end - position, 0)])
                first = 0 if inside else block.find(b"\n") + 1
                inside = inside or first > 0
                if first and position + first >= end:  # the first line that begins here belongs to another piece
                    break
                if inside:
                    last = block.find(b"\n", max(end - 1 - position, first))  # end of the last line of the piece
                    yield block[first : last + 1] if last >= 0 else block[first:]
                    if last >= 0:
                        break
                position += len(block)
        self._finish()

    @contextlib.contextmanager
    def open_seekable(self) -> Iterator[IO[bytes]]:
        """Open the decompressed content as a seekable file; decompress to a temporary file if necessary.

        If the compressed data is truncated, provide the content before the break, and raise the error afterwards.
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
    def open_forward(self) -> Iterator[IO[bytes]]:
        """Open the uncompressed file for a reader that only seeks forward; skipped bytes and the rest are hashed."""
        with self.open() as file:
            forward = _ForwardFile(file, self._count)
            yield cast(IO[bytes], forward)
            forward.read_rest()
        self._finish()

    def hash_file(self) -> None:
        """Set the digest of a format that does not read its file in order: read the file again, in order.

        That is cheap for a local file, but a remote one would be transferred twice, and has no digest.
        """
        if self.digest is not None or self.row_range or storage.is_remote(self.path):
            return
        if self.piece.start:
            self.digest = ""
            return
        with self.open() as file:
            while block := file.read(_PLAIN_BYTES):
                self._hash.update(block)
        self._finish()

    @property
    def at_start(self) -> bool:
        """Whether the next part is the beginning of the file."""
        return not self.lines and not self.piece.start

    def block(self, documents: Sequence[Document], bad: Sequence[BadDocument] = ()) -> Block:
        """Return a block with these documents and the current read position."""
        lenient, self.lenient = self.lenient, 0
        return Block(list(documents), list(bad), self.bytes_read, lenient)

    def group_blocks(self, items: Iterable[Document | BadDocument]) -> Iterator[Block]:
        """Group single documents into blocks. If the items raise BrokenFile, yield the documents before it first."""
        documents: list[Document] = []
        bad: list[BadDocument] = []
        size = 0
        fault: BrokenFile | None = None
        try:
            for item in items:
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

    def bad_document(self, kind: str, line: int, detail: str, content: bytes | str = b"") -> BadDocument:
        """Return a BadDocument for a line or row of this piece; line 0 means the full file."""
        detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
        return BadDocument(kind, self.piece.url, line, detail, self.piece.start, excerpt(content))

    def empty_file(self) -> BadDocument:
        """Return the BadDocument for an empty file."""
        return self.bad_document("empty file", 0, "the file is empty")

    def _count(self, data: bytes) -> None:
        self.bytes_read += len(data)
        self._hash.update(data)

    def _finish(self) -> None:
        self.digest = None if self.row_range else self._hash.hexdigest()


class _ForwardFile(io.RawIOBase):
    """A view of a seekable file that reads it in order, in blocks; seeking forward reads the skipped bytes."""

    def __init__(self, file: IO[bytes], count: Callable[[bytes], None]) -> None:
        self._file, self._count = file, count
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._buffer, self._position, self._buffer_start = b"", 0, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            return self._size
        self._position = offset
        return offset

    def read(self, count: int = -1) -> bytes:
        end = self._size if count < 0 else min(self._position + count, self._size)
        parts = []
        while self._position < end:
            if self._position >= self._buffer_start + len(self._buffer):
                self._fill()
                continue
            part = self._buffer[self._position - self._buffer_start : end - self._buffer_start]
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
            raise OSError(f"the file ended at byte {self._buffer_start}, expected {self._size} bytes")
        self._count(self._buffer)
