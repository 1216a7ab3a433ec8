"""Read the documents of files: in pieces, or in chunks that one process decompresses and others parse."""

from __future__ import annotations

from collections.abc import Iterator

from open_lm.datapreprocess.readers.base import Block, Piece, ReadOptions
from open_lm.datapreprocess.readers.input_stream import InputStream, split_rows
from open_lm.datapreprocess.readers.parts import Chunk, cut_chunks, split_parts
from open_lm.datapreprocess.readers.registry import format_of, split_suffixes

_DEFAULTS = ReadOptions()
_BLOCK_BYTES = 1 << 20


# --- pieces ------------------------------------------------------------------------------------------------------


def split(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Split a file into pieces of about `unit_bytes` if its format allows it; else return one piece."""
    compression, _ = split_suffixes(url)
    split_format = format_of(url).split
    if compression or split_format is None or split_rows(url)[1] or num_bytes <= 2 * unit_bytes:
        return [Piece(url, num_bytes=max(num_bytes, 0))]
    return split_format(url, num_bytes, unit_bytes)


def stores_row_count(url: str) -> bool:
    """Return whether the number of rows can be read from the file's metadata."""
    return not split_suffixes(url)[0] and format_of(url).count is not None


def count_rows(url: str) -> int:
    """Count the rows (elements, lines that are not blank) of a file, good and bad."""
    count = format_of(url).count
    if count is not None and stores_row_count(url):
        return count(url)
    reader = PieceReader(Piece(url))
    return sum(len(block.documents) + sum(bad.line > 0 for bad in block.bad) for block in reader)


class _StreamReader:
    """A reader of the input stream of a piece.

    Attributes:
        bytes_read: input bytes read so far.
        digest: see `InputStream.digest`.
    """

    def __init__(self, piece: Piece) -> None:
        self._stream = InputStream(piece, split_suffixes(piece.url)[0])

    @property
    def bytes_read(self) -> int:
        return self._stream.bytes_read

    @property
    def digest(self) -> str | None:
        return self._stream.digest


class PieceReader(_StreamReader):
    """An iterable of the documents of a piece, in blocks of about a MiB and with bounded memory.

    Raises BrokenFile for a truncated or unreadable file, after the documents before the break. `lines` is the number
    of lines or rows read so far.
    """

    def __init__(self, piece: Piece, options: ReadOptions = _DEFAULTS) -> None:
        super().__init__(piece)
        self.piece, self.options = piece, options

    def __iter__(self) -> Iterator[Block]:
        return format_of(self.piece.url).read(self._stream, self.options)

    @property
    def lines(self) -> int:
        return self._stream.lines


# --- chunks ------------------------------------------------------------------------------------------------------


def can_stream(url: str, options: ReadOptions = _DEFAULTS) -> bool:
    """Return whether one process can cut the file into chunks for other processes to parse.

    This is possible for compressed lines and for separated texts. Uncompressed lines are split into pieces instead.
    """
    compression, _ = split_suffixes(url)
    file_format = format_of(url)
    can_split = file_format.split is not None and not compression
    if split_rows(url)[1] or separator_of(url, options) is None or can_split:
        return False
    return file_format.is_separated is None or file_format.is_separated(url, compression)


def separator_of(url: str, options: ReadOptions) -> bytes | None:
    """Return the bytes between the parts (lines or texts) of a file, or None if it has no such parts."""
    separator = format_of(url).separator
    return separator(options) if separator else None


class FileChunks(_StreamReader):
    """An iterable of the `Chunk`s of a file: decompressed, cut between lines or texts, not parsed.

    Every chunk but the last has at least `chunk_bytes`. Raises ValueError for a file that `can_stream` rejects because
    it has no separators.
    """

    def __init__(self, piece: Piece, chunk_bytes: int, options: ReadOptions = _DEFAULTS) -> None:
        separator = separator_of(piece.url, options)
        if separator is None:
            raise ValueError(f"{piece.url} cannot be cut into chunks")
        super().__init__(piece)
        self._separator, self._chunk_bytes = separator, chunk_bytes

    def __iter__(self) -> Iterator[Chunk]:
        return cut_chunks(self._stream.blocks(), self._separator, self._chunk_bytes)


class ChunkReader:
    """An iterable of the documents of a chunk; bad documents are reported by their line in the file."""

    def __init__(self, chunk: Chunk, url: str, options: ReadOptions = _DEFAULTS) -> None:
        self.chunk, self.url, self.options = chunk, url, options
        self.lines = 0

    def __iter__(self) -> Iterator[Block]:
        stream = InputStream(Piece(self.url))
        stream.lines = self.chunk.first_line - 1
        parse = format_of(self.url).parse
        separator = separator_of(self.url, self.options)
        assert parse is not None and separator is not None, "chunks are cut only from files with separators"
        data = self.chunk.data
        if not data:
            yield stream.block([], [stream.empty_file()])
        blocks = (data[start : start + _BLOCK_BYTES] for start in range(0, len(data), _BLOCK_BYTES))
        for parts in split_parts(blocks, separator):
            self.lines += len(parts)
            yield parse(stream, parts, self.options)
