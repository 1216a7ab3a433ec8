"""The text in files of all formats that a bundle may hold, including archives in archives.

Of tensors only the headers are text. In other binary files, printable runs are text.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from open_lm.release.manifest import open_no_link

CHUNK_BYTES = 2**20
_MAX_DEPTH = 5  # of archives in archives, and of their compressions
_MAX_GROWTH, _MIN_UNPACKED_BYTES = 300, 2**30  # limits of what a file may unpack to: by its size, and in any case
_MAX_HEADER_BYTES = 100 * 2**20  # of safetensors, by their specification
_MAX_PDF_BYTES = 512 * 2**20
_SPOOL_BYTES = 64 * 2**20
_OVERLAP = 4096  # characters of a chunk that are repeated in the next one where a line is longer than a chunk
_PRINTABLE = re.compile(rb"[\t\x20-\x7e]{8,}")
_TORCH_STORAGE = re.compile(r".*/data/\d+$")  # tensor in a file of torch.save
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclass(frozen=True)
class Text:
    """A part of a file as text.

    Attributes:
        member: path inside the file, for archives; else "".
        content: lines.
        first_line: number of its first line, from 1; None for a binary file.
    """

    member: str
    content: str
    first_line: int | None


class Unreadable(Exception):
    """A file whose content cannot be read completely; the message says why."""


def file_texts(path: Path) -> Iterator[Text]:
    """Yield the text of a file in parts of about CHUNK_BYTES, cut at ends of lines.

    Raises:
        Unreadable: the file is damaged, is compressed in a way that is not supported, or unpacks to too much.
    """
    with open(path, "rb", opener=open_no_link) as file:
        limit = max(_MIN_UNPACKED_BYTES, _MAX_GROWTH * path.stat().st_size)
        yield from _Reader(limit).texts(file, path.name, "", 0)


class _Reader:
    """Reads a file and the files inside it, with one limit on the number of unpacked bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = self._remaining = limit

    def texts(self, file: IO[bytes], name: str, member: str, depth: int) -> Iterator[Text]:
        """Yield the texts of an open file. `name` is its name, and `member` its path inside the outer file."""
        if depth > _MAX_DEPTH:
            raise Unreadable(f"{member}: found more than {_MAX_DEPTH} nested archives")
        stream = io.BufferedReader(file, CHUNK_BYTES) if isinstance(file, io.RawIOBase) else _peekable(file)
        head = stream.peek(512)[:512]
        try:
            if compression := next((kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)), None):
                unpacked = _Limited(_decompressed(stream, compression), self)
                yield from self.texts(io.BufferedReader(unpacked, CHUNK_BYTES), _stem(name), member, depth + 1)
            elif head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                yield from self._zip(stream, member, depth)
            elif head[257:262] == b"ustar":
                yield from self._tar(stream, member, depth)
            elif head.startswith(b"%PDF-"):
                yield Text(member, pdf_text(stream.read(_MAX_PDF_BYTES)), None)
            elif name.endswith(".safetensors"):
                yield Text(member, _safetensors_header(stream), None)
            elif head.startswith(b"\x93NUMPY"):
                yield from _numpy(stream, head, member)
            else:
                yield from _plain(stream, head, member)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise Unreadable(f"{member or name}: {type(error).__name__}: {error}") from error
        except (NotImplementedError, RuntimeError, ValueError) as error:  # encrypted members, unknown compressions
            raise Unreadable(f"{member or name}: {error}") from error

    def _tar(self, stream: IO[bytes], member: str, depth: int) -> Iterator[Text]:
        owners = set()
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for info in archive:
                place = _inner(member, info.name)
                yield Text(place, f"{info.name}\n{info.linkname}", None)
                owners.add((info.uname, info.gname))
                content = archive.extractfile(info) if info.isreg() else None
                if content is not None:
                    unpacked = io.BufferedReader(_Limited(content, self), CHUNK_BYTES)
                    yield from self.texts(unpacked, info.name, place, depth + 1)
                archive.members = []  # type: ignore[attr-defined] # else the list grows with the archive
        yield Text(member, "".join(f"uname: {user}\ngname: {group}\n" for user, group in sorted(owners)), None)

    def _zip(self, stream: IO[bytes], member: str, depth: int) -> Iterator[Text]:
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
            seekable: IO[bytes] = stream
            if not stream.seekable():
                while chunk := stream.read(CHUNK_BYTES):
                    spool.write(chunk)
                seekable = spool
            with zipfile.ZipFile(seekable) as archive:
                names = archive.namelist()
                is_torch = any(name.endswith("/data.pkl") for name in names)
                yield Text(member, "\n".join([*names, archive.comment.decode("utf-8", "replace")]), None)
                for info in archive.infolist():
                    if info.is_dir() or (is_torch and _TORCH_STORAGE.match(info.filename)):
                        continue
                    with archive.open(info) as content:
                        unpacked = io.BufferedReader(_Limited(content, self), CHUNK_BYTES)
                        yield from self.texts(unpacked, info.filename, _inner(member, info.filename), depth + 1)

    def count(self, num_bytes: int) -> None:
        """Raise Unreadable if the file unpacks to more than its limit."""
        self._remaining -= num_bytes
        if self._remaining < 0:
            raise Unreadable(f"unpacks to more than {self._limit:,} bytes")


class _Limited(io.RawIOBase):
    """A stream of unpacked bytes that a reader counts."""

    def __init__(self, source: Any, reader: _Reader) -> None:
        self._source, self._reader = source, reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        self._reader.count(len(data))
        buffer[: len(data)] = data
        return len(data)


def _peekable(file: IO[bytes]) -> io.BufferedReader:
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, CHUNK_BYTES)  # type: ignore[arg-type]


def _decompressed(stream: IO[bytes], compression: str) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=stream)
    if compression == "bzip2":
        return bz2.BZ2File(stream)
    if compression == "xz":
        return lzma.LZMAFile(stream)
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise Unreadable('zstandard files need the package zstandard: pip install "open_lm[preprocess]"') from error
    return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)


def _stem(name: str) -> str:
    """Return the name of a compressed file's content."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.tar" if suffix == "tgz" else stem if dot else name


def _inner(member: str, name: str) -> str:
    return f"{member}!{name}" if member else name


# ------------------------------------------------------------------------------------------------ formats
def _plain(stream: IO[bytes], head: bytes, member: str) -> Iterator[Text]:
    """Yield a text file, or the printable runs of a binary file."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield from _lines(io.TextIOWrapper(stream, "utf-16", errors="replace"), member)
    elif b"\0" not in head:
        yield from _lines(io.TextIOWrapper(stream, "utf-8", errors="replace"), member)
    else:
        yield from _runs(stream, member)


def _lines(text: io.TextIOWrapper, member: str) -> Iterator[Text]:
    number, rest = 1, ""
    while chunk := text.read(CHUNK_BYTES):
        chunk = rest + chunk
        end = chunk.rfind("\n") + 1
        if not end:  # a line without end: cut it, and repeat its last characters
            yield Text(member, chunk, number)
            rest = chunk[-_OVERLAP:]
            continue
        yield Text(member, chunk[:end], number)
        number += chunk.count("\n", 0, end)
        rest = chunk[end:]
    text.detach()
    if rest:
        yield Text(member, rest, number)


def _runs(stream: IO[bytes], member: str) -> Iterator[Text]:
    tail = b""
    while chunk := stream.read(CHUNK_BYTES):
        data = tail + chunk
        yield Text(member, b"\n".join(_PRINTABLE.findall(data)).decode("ascii"), None)
        tail = data[-_OVERLAP:] if len(chunk) == CHUNK_BYTES else b""


def _safetensors_header(stream: IO[bytes]) -> str:
    size = int.from_bytes(stream.read(8), "little")
    if size > _MAX_HEADER_BYTES:
        raise ValueError(f"not a safetensors file: its header would have {size:,} bytes")
    header = stream.read(size)
    if len(header) < size:
        raise EOFError("the file ends in its header")
    return header.decode("utf-8")


def _numpy(stream: IO[bytes], head: bytes, member: str) -> Iterator[Text]:
    """Yield the header of an array of numbers; of other arrays, the printable runs as well."""
    start = 12 if head[6:7] > b"\x01" else 10
    header = head[start : start + int.from_bytes(head[8:start], "little")]
    if re.search(rb"'descr':\s*'[<>|=]?[biufc?]\d*'", header):
        yield Text(member, header.decode("latin-1"), None)
    else:
        yield from _runs(stream, member)


_PDF_STREAM = re.compile(rb"stream\r?\n(.*?)\r?\n?endstream", re.DOTALL)
_PDF_STRING = rb"\((?:[^()\\]|\\.)*\)|<[0-9A-Fa-f\s]*>"
_PDF_SHOWN = re.compile(rb"\[((?:%b|[-+\d.\s])*)\]\s*TJ|(%b)\s*(?:Tj|'|\")" % (_PDF_STRING, _PDF_STRING), re.DOTALL)
_PDF_STRINGS = re.compile(_PDF_STRING, re.DOTALL)


def pdf_text(raw: bytes) -> str:
    """Return the strings that the pages of a PDF show, and all printable runs of the file and of its unpacked streams.

    Strings in fonts that have codes of their own (subsets of Unicode fonts) are not decoded.
    """
    streams = _pdf_streams(raw)
    runs = (b"\n".join(_PRINTABLE.findall(content)) for content in (raw, *streams))
    return "\n".join([*map(_shown_text, streams), *(run.decode("ascii") for run in runs)])


def pdf_shown_text(raw: bytes) -> str:
    """Return the strings that the pages of a PDF show, one operator a line, as Latin-1."""
    return "\n".join(filter(None, map(_shown_text, _pdf_streams(raw))))


def _pdf_streams(raw: bytes) -> list[bytes]:
    streams = []
    for match in _PDF_STREAM.finditer(raw):
        try:
            streams.append(zlib.decompressobj().decompress(match[1], _MAX_PDF_BYTES))
        except zlib.error:  # an image, or no compression
            streams.append(match[1])
    return streams


def _shown_text(content: bytes) -> str:
    shown = []
    for match in _PDF_SHOWN.finditer(content):
        strings = _PDF_STRINGS.findall(match[1] if match[1] is not None else match[2])
        shown.append(b"".join(map(_pdf_string, strings)).decode("latin-1"))
    return "\n".join(shown)


def _pdf_string(text: bytes) -> bytes:
    if text.startswith(b"("):
        return re.sub(rb"\\(.)", rb"\1", text[1:-1], flags=re.DOTALL)
    digits = b"".join(text[1:-1].split())
    return bytes.fromhex(digits.decode("ascii") + "0" * (len(digits) % 2))
