"""Which suffix is read how, and how files are cut into pieces and stretches. A new format is a line in FORMATS."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from open_lm.datapreprocess.readers.base import TO_END, Block, Piece, ReadOptions
from open_lm.datapreprocess.readers.columns import (
    count_arrow,
    count_parquet,
    read_arrow,
    read_parquet,
    split_arrow,
    split_parquet,
)
from open_lm.datapreprocess.readers.compression import COMPRESSIONS
from open_lm.datapreprocess.readers.json_documents import has_lines, read_json, split_json
from open_lm.datapreprocess.readers.json_lines import LINE_END, byte_ranges, parse_lines, read_lines
from open_lm.datapreprocess.readers.parts import Chunk, cut_stretches, split_parts
from open_lm.datapreprocess.readers.source import Source, split_rows
from open_lm.datapreprocess.readers.tars import read_tar
from open_lm.datapreprocess.readers.texts import parse_texts, read_texts, text_separator
from open_lm.errors import DataError

_DEFAULTS = ReadOptions()
_BLOCK_BYTES = 1 << 20
_COMPANIONS = (
    ".", "readme.", "license.", "changelog.", "dataset_info.", "dataset_infos.", "dataset_dict.", "state.json",
    "manifest.", "dataset.json", "rejects.",
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """How the files of a suffix are read.

    `split` cuts an uncompressed file of so many bytes into pieces of about so many; without it a file is one piece.
    Where parts of a file stand between separators, `separator` gives that (None where options name none), `parse`
    makes documents of parts, and `is_separated` looks at a file (address, compression) whose name does not tell.
    `count` tells the rows of a file without reading them.
    """

    read: Callable[[Source, ReadOptions], Iterator[Block]]
    split: Callable[[str, int, int], list[Piece]] | None = None
    separator: Callable[[ReadOptions], bytes | None] | None = None
    is_separated: Callable[[str, str], bool] | None = None
    parse: Callable[[Source, list[bytes], ReadOptions], Block] | None = None
    count: Callable[[str], int] | None = None


_JSON_LINES = Format(read_lines, byte_ranges, lambda _: LINE_END, parse=parse_lines)
_TEXT = Format(read_texts, separator=text_separator, parse=parse_texts)
FORMATS: dict[str, Format] = {
    ".jsonl": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".json": Format(read_json, split_json, lambda _: LINE_END, has_lines, parse_lines),
    ".txt": _TEXT,
    ".text": _TEXT,
    ".md": _TEXT,
    ".parquet": Format(read_parquet, split_parquet, count=count_parquet),
    ".arrow": Format(read_arrow, split_arrow, count=count_arrow),
    ".tar": Format(read_tar),
}


# --- suffixes ----------------------------------------------------------------------------------------------------


def split_suffixes(url: str) -> tuple[str, str]:
    """Compression suffix ("" for none) and format suffix of a file name; DataError for what no reader knows.

    A compressed file without a further suffix (`00.zst`) is taken for JSON lines.
    """
    stem, suffix = os.path.splitext(split_rows(url)[0].rpartition("/")[2].lower())
    compression = ""
    if suffix in COMPRESSIONS:
        compression = suffix
        suffix = os.path.splitext(stem)[1] or ".jsonl"
    if suffix not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise DataError(
            f"{url}: no reader for {suffix or 'a file without suffix'}; known are {known}, "
            f"alone or followed by {', '.join(sorted(COMPRESSIONS))}"
        )
    return compression, suffix


def is_known(url: str) -> bool:
    """Whether some reader takes files of this name."""
    try:
        split_suffixes(url)
    except DataError:
        return False
    return True


def is_data_name(url: str) -> bool:
    """Whether a file found in a folder is meant as data: known, and no readme or description that lies beside data."""
    return is_known(url) and not url.rpartition("/")[2].lower().startswith(_COMPANIONS)


def is_text(url: str) -> bool:
    """Whether the file is plain text, of which `ReadOptions.separator` makes documents."""
    return FORMATS[split_suffixes(url)[1]] is _TEXT


# --- pieces ------------------------------------------------------------------------------------------------------


def split(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Pieces of about `unit_bytes` that together are the file, where its format allows; else the whole file."""
    compression, suffix = split_suffixes(url)
    cut = FORMATS[suffix].split
    if compression or cut is None or split_rows(url)[1] or num_bytes <= 2 * unit_bytes:
        return [Piece(url, 0, TO_END, max(num_bytes, 0))]
    return cut(url, num_bytes, unit_bytes)


def is_counted(url: str) -> bool:
    """Whether the file itself tells how many rows it has."""
    compression, suffix = split_suffixes(url)
    return not compression and FORMATS[suffix].count is not None


def count_rows(url: str) -> int:
    """The rows (lines that are not blank, elements) of a file, good and bad."""
    count = FORMATS[split_suffixes(url)[1]].count
    if count is not None and is_counted(url):
        return count(url)
    reader = PieceReader(Piece(url, 0, TO_END, 0))
    return sum(len(block.documents) + sum(bad.line > 0 for bad in block.bad) for block in reader)


class PieceReader:
    """Iterate over the documents of a piece, in blocks of about a MiB and in bounded memory.

    `lines` counts lines or rows, `bytes_read` the input consumed so far; `digest` is the sha256 of the bytes that the
    piece covers, known at the end, None where the format cannot tell. A file that breaks off is a BrokenFile, after
    the documents before the break.
    """

    def __init__(self, piece: Piece, options: ReadOptions = _DEFAULTS) -> None:
        compression, suffix = split_suffixes(piece.url)
        self.piece, self.options = piece, options
        self._format = FORMATS[suffix]
        self._source = Source(piece, compression)

    def __iter__(self) -> Iterator[Block]:
        return self._format.read(self._source, self.options)

    @property
    def lines(self) -> int:
        return self._source.lines

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def digest(self) -> str | None:
        return self._source.digest


# --- stretches ---------------------------------------------------------------------------------------------------


def can_stream(url: str, options: ReadOptions = _DEFAULTS) -> bool:
    """Whether one reader can cut the file into stretches while others parse them.

    So it is with lines that are compressed and with texts between separators; plain lines are better cut into pieces.
    """
    compression, suffix = split_suffixes(url)
    form = FORMATS[suffix]
    if split_rows(url)[1] or _separator(url, options) is None or (form.split and not compression):
        return False
    return form.is_separated is None or form.is_separated(url, compression)


def _separator(url: str, options: ReadOptions) -> bytes | None:
    separator = FORMATS[split_suffixes(url)[1]].separator
    return separator(options) if separator else None


class FileChunks:
    """Iterate over a file as `Chunk`es: decompressed, cut between lines (texts), not parsed.

    `bytes_read` is the input consumed so far, `digest` the sha256 of the file, known at the end.
    """

    def __init__(self, piece: Piece, chunk_bytes: int, options: ReadOptions = _DEFAULTS) -> None:
        separator = _separator(piece.url, options)
        if separator is None:
            raise ValueError(f"{piece.url} cannot be cut into stretches")
        self._separator, self._stretch_bytes = separator, chunk_bytes
        self._source = Source(piece, split_suffixes(piece.url)[0])

    def __iter__(self) -> Iterator[Chunk]:
        return cut_stretches(self._source.blocks(), self._separator, self._stretch_bytes)

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def digest(self) -> str | None:
        return self._source.digest


def FileChunks(piece: Piece, chunk_bytes: int, options: ReadOptions = _DEFAULTS) -> FileChunks:
    """The stretches of a whole file that `can_stream`, each of at least `chunk_bytes` but for the last."""
    return FileChunks(piece, chunk_bytes, options)


class ChunkReader:
    """Iterate over the documents of a stretch; what is bad is told by its line in the file."""

    def __init__(self, chunk: Chunk, url: str, options: ReadOptions = _DEFAULTS) -> None:
        self.chunk, self.url, self.options = chunk, url, options
        self.lines = 0

    def __iter__(self) -> Iterator[Block]:
        source = Source(Piece(self.url, 0, TO_END, 0), "")
        source.lines = self.chunk.first_line - 1
        parse = FORMATS[split_suffixes(self.url)[1]].parse
        separator = _separator(self.url, self.options)
        assert parse is not None and separator is not None, "only what can be cut into stretches comes in them"
        if not self.chunk.data:
            yield source.block([], [source.nothing()])
        blocks = (self.chunk.data[a : a + _BLOCK_BYTES] for a in range(0, len(self.chunk.data), _BLOCK_BYTES))
        for parts in split_parts(blocks, separator):
            self.lines += len(parts)
            yield parse(source, parts, self.options)
