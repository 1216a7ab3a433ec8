"""Which suffix is read how, and how files are cut into pieces and stretches. A new format is a line in FORMATS."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from open_lm.datapreprocess.readers.base import WHOLE, Block, Piece, ReadOptions
from open_lm.datapreprocess.readers.compression import COMPRESSIONS
from open_lm.datapreprocess.readers.json_lines import LINE_END, parse_lines, read_lines
from open_lm.datapreprocess.readers.parts import Stretch, cut_stretches, split_parts
from open_lm.datapreprocess.readers.source import Source
from open_lm.datapreprocess.readers.tars import read_tar
from open_lm.errors import DataError

_DEFAULTS = ReadOptions()
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Format:
    """How the files of a suffix are read.

    `split` cuts an uncompressed file of so many bytes into pieces of about so many; without it a file is one piece.
    Where parts of a file stand between separators, `separator` gives those of a file (None where it has none) and
    `parse` makes documents of parts.
    """

    read: Callable[[Source, ReadOptions], Iterator[Block]]
    split: Callable[[str, int, int], list[Piece]] | None = None
    separator: Callable[[str, ReadOptions], bytes | None] | None = None
    parse: Callable[[Source, list[bytes], ReadOptions], Block] | None = None


def _byte_ranges(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    starts = list(range(0, num_bytes - unit_bytes // 2, unit_bytes))
    return [Piece(url, a, b, b - a) for a, b in zip(starts, [*starts[1:], num_bytes], strict=True)]


_LINES = Format(read_lines, _byte_ranges, lambda _url, _options: LINE_END, parse_lines)
FORMATS: dict[str, Format] = {
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".json": _LINES,
    ".tar": Format(read_tar),
}


# --- suffixes ----------------------------------------------------------------------------------------------------


def split_suffixes(url: str) -> tuple[str, str]:
    """Compression suffix ("" for none) and format suffix of a file name; DataError for what no reader knows.

    A compressed file without a further suffix (`00.zst`) is taken for JSON lines.
    """
    stem, suffix = os.path.splitext(url.rpartition("/")[2].lower())
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


# --- pieces ------------------------------------------------------------------------------------------------------


def split(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Pieces of about `unit_bytes` that together are the file, where its format allows; else the whole file."""
    compression, suffix = split_suffixes(url)
    cut = FORMATS[suffix].split
    if compression or cut is None or num_bytes <= 2 * unit_bytes:
        return [Piece(url, 0, WHOLE, max(num_bytes, 0))]
    return cut(url, num_bytes, unit_bytes)


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
    """Whether one reader can decompress the file while others parse it: compressed lines or separated texts."""
    return bool(split_suffixes(url)[0]) and _separator(url, options) is not None


def _separator(url: str, options: ReadOptions) -> bytes | None:
    separator = FORMATS[split_suffixes(url)[1]].separator
    return separator(url, options) if separator else None


class Stretches:
    """Iterate over a file as `Stretch`es: decompressed, cut between lines (texts), not parsed.

    `bytes_read` is the input consumed so far, `digest` the sha256 of the file, known at the end.
    """

    def __init__(self, piece: Piece, stretch_bytes: int, options: ReadOptions = _DEFAULTS) -> None:
        separator = _separator(piece.url, options)
        if separator is None:
            raise ValueError(f"{piece.url} cannot be cut into stretches")
        self._separator, self._stretch_bytes = separator, stretch_bytes
        self._source = Source(piece, split_suffixes(piece.url)[0])

    def __iter__(self) -> Iterator[Stretch]:
        return cut_stretches(self._source.blocks(), self._separator, self._stretch_bytes)

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def digest(self) -> str | None:
        return self._source.digest


def stretches(piece: Piece, stretch_bytes: int, options: ReadOptions = _DEFAULTS) -> Stretches:
    """The stretches of a whole file that `can_stream`, each of at least `stretch_bytes` but for the last."""
    return Stretches(piece, stretch_bytes, options)


class StretchReader:
    """Iterate over the documents of a stretch; what is bad is told by its line in the file."""

    def __init__(self, stretch: Stretch, url: str, options: ReadOptions = _DEFAULTS) -> None:
        self.stretch, self.url, self.options = stretch, url, options
        self.lines = 0

    def __iter__(self) -> Iterator[Block]:
        source = Source(Piece(self.url, 0, WHOLE, 0), "")
        source.lines = self.stretch.first_line - 1
        parse = FORMATS[split_suffixes(self.url)[1]].parse
        separator = _separator(self.url, self.options)
        assert parse is not None and separator is not None, "only what can be cut into stretches comes in them"
        if not self.stretch.data:
            yield source.empty_file()
        blocks = (self.stretch.data[a : a + _BLOCK_BYTES] for a in range(0, len(self.stretch.data), _BLOCK_BYTES))
        for parts in split_parts(blocks, separator):
            self.lines += len(parts)
            yield parse(source, parts, self.options)
