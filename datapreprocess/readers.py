"""Raw files as documents: decompression and formats, each a registry by suffix.

`PieceReader` streams the documents of one `Piece` (a file, or a byte range of a plain JSON-lines file) in bounded
memory. What cannot be used as a document comes out as a `BadDocument`, so that the caller decides; a file that is cut
short or broken beyond its lines is a DataError.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.shard_format import iter_files
from open_lm.errors import DataError

_BLOCK_BYTES = 256 << 10


@dataclass(frozen=True)
class Piece:
    """The documents of one input file that begin in the bytes [start, end) of it."""

    url: str
    start: int
    end: int


@dataclass(frozen=True)
class BadDocument:
    """A line or tar member that is not a document.

    `line` counts from 1 at the byte `start`, where its piece begins; 0 for a tar member.
    """

    kind: str
    url: str
    line: int
    detail: str
    start: int = 0


Document = str | np.ndarray
Item = Document | BadDocument


class PieceReader:
    """Iterate over the documents of a piece: texts, 1-D arrays of ids (content key `npy`), or BadDocuments.

    `bytes_read` is the input consumed so far, `lines` the lines seen so far (0 for tar files).
    """

    def __init__(self, piece: Piece, content_key: str = "text") -> None:
        self.piece, self.content_key = piece, content_key
        self.bytes_read = self.lines = 0
        self._compression, self._format = split_suffixes(piece.url)

    def __iter__(self) -> Iterator[Item]:
        with storage.open_file(self.piece.url) as file:
            yield from FORMATS[self._format](self, file)

    def blocks(self, file: IO[bytes]) -> Iterator[bytes]:
        """The decompressed content, a block at a time."""
        if self._compression:
            yield from _decompressed(self._raw_blocks(file), COMPRESSIONS[self._compression], self.piece.url)
        else:
            yield from self._raw_blocks(file)

    @property
    def compressed(self) -> bool:
        return bool(self._compression)

    def _raw_blocks(self, file: IO[bytes]) -> Iterator[bytes]:
        while block := file.read(_BLOCK_BYTES):
            self.bytes_read += len(block)
            yield block


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


def is_splittable(url: str) -> bool:
    """Whether byte ranges of the file can be read apart from each other."""
    compression, suffix = split_suffixes(url)
    return not compression and FORMATS[suffix] is _json_lines


# --- compression -------------------------------------------------------------------------------------------------


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _decompressed(blocks: Iterator[bytes], make: Callable[[], Any], url: str) -> Iterator[bytes]:
    """Any number of compressed frames, one after the other; an unfinished last one is an error."""
    engine = None
    try:
        for block in blocks:
            data = block
            while data:
                if engine is None:
                    data = data.lstrip(b"\0")  # padding that some writers leave after the last frame
                    if not data:
                        break
                    engine = make()
                yield engine.decompress(data)
                data = b""
                if engine.eof:
                    data, engine = engine.unused_data, None
    except (zlib.error, lzma.LZMAError, EOFError, ValueError, OSError) as error:
        raise DataError(f"{url}: cannot be decompressed ({error}); fetch the file again") from error
    except Exception as error:
        if type(error).__module__.startswith("zstandard"):
            raise DataError(f"{url}: cannot be decompressed ({error}); fetch the file again") from error
        raise
    if engine is not None:
        raise DataError(f"{url}: cut short: its compressed data ends in the middle; fetch the file again")


COMPRESSIONS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": _zstandard,
    ".zstd": _zstandard,
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
}


# --- JSON lines --------------------------------------------------------------------------------------------------


def _json_lines(reader: PieceReader, file: IO[bytes]) -> Iterator[Item]:
    piece, key = reader.piece, reader.content_key.removeprefix("json:")
    for line in _lines_of(reader, file):
        reader.lines += 1
        if line.isspace() or not line:
            continue
        found = _text_of(line, key)
        yield found if isinstance(found, str) else BadDocument(found[0], piece.url, reader.lines, found[1], piece.start)


def _lines_of(reader: PieceReader, file: IO[bytes]) -> Iterator[bytes]:
    """The lines that begin inside the piece, without their ends."""
    piece = reader.piece
    if reader.compressed:
        yield from (line for line, _ in _split_lines(reader.blocks(file)))
        return
    position = piece.start
    blocks = reader.blocks(file)
    if piece.start:
        file.seek(piece.start - 1)  # a line begins at `start` only where the byte before ends another
        position -= 1
    for number, (line, length) in enumerate(_split_lines(blocks)):
        if position >= piece.end:
            return
        if number or not piece.start:
            yield line
        position += length


def _split_lines(blocks: Iterator[bytes]) -> Iterator[tuple[bytes, int]]:
    """Each line without its end, and its length with it."""
    parts: list[bytes] = []
    for block in blocks:
        lines = block.split(b"\n")
        if len(lines) > 1:
            first = b"".join([*parts, lines[0]])
            yield first, len(first) + 1
            for line in lines[1:-1]:
                yield line, len(line) + 1
            parts = []
        if lines[-1]:
            parts.append(lines[-1])
    if parts:
        last = b"".join(parts)
        yield last, len(last)


def _text_of(data: bytes, key: str) -> str | tuple[str, str]:
    """The text under `key` (dots reach into nested objects), or kind and detail of what is wrong."""
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return "invalid JSON", str(error)
    if not isinstance(record, dict):
        return "not an object", f"expected a JSON object, found {type(record).__name__}"
    value: Any = record
    for part in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or part not in value:
            return "missing key", f'no key "{key}"; it has {", ".join(list(record)[:8]) or "none"}'
        value = value[part]
    if not isinstance(value, str):
        return "wrong type", f'"{key}" is not a text but {type(value).__name__}'
    return value


# --- tar files ---------------------------------------------------------------------------------------------------


def _tar(reader: PieceReader, file: IO[bytes]) -> Iterator[Item]:
    """Documents in the members of a tar, chosen by the content key: text or txt, json:KEY, npy (ids)."""
    kind, _, json_key = reader.content_key.partition(":")
    suffixes = {"text": (".txt", ".text"), "txt": (".txt", ".text"), "json": (".json",), "npy": (".npy",)}.get(kind)
    if suffixes is None or (kind == "json") != bool(json_key):
        raise DataError(
            f"{reader.piece.url}: --content_key {reader.content_key!r} does not say which members of a tar to read; "
            "it must be text, txt, npy or json:KEY"
        )
    with tempfile.TemporaryFile() as unpacked:
        source = file
        if reader.compressed:
            unpacked.writelines(reader.blocks(file))
            source = unpacked
        taken = 0
        for name, offset, size in iter_files(source, reader.piece.url):
            if name.lower().endswith(suffixes):
                taken += 1
                source.seek(offset)
                yield _member_document(reader.piece.url, name, source.read(size), kind, json_key)
            if not reader.compressed:
                reader.bytes_read = offset + size
        if not taken:
            raise DataError(f"{reader.piece.url}: no member ends in {' or '.join(suffixes)}; is --content_key right?")


def _member_document(url: str, name: str, data: bytes, kind: str, json_key: str) -> Item:
    if kind == "json":
        found = _text_of(data, json_key)
        return found if isinstance(found, str) else BadDocument(found[0], url, 0, f"member {name}: {found[1]}")
    try:
        if kind != "npy":
            return data.decode("utf-8")
        ids: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except UnicodeDecodeError as error:
        return BadDocument("invalid UTF-8", url, 0, f"member {name}: {error}")
    except (ValueError, EOFError, OSError) as error:
        return BadDocument("invalid npy", url, 0, f"member {name}: {error}")
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        return BadDocument("invalid npy", url, 0, f"member {name}: expected an array of integers")
    return ids.reshape(-1)


FORMATS: dict[str, Callable[[PieceReader, IO[bytes]], Iterator[Item]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".ndjson": _json_lines,
    ".tar": _tar,
}
