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
_MAX_GROWTH, _MIN_UNPACKED_BYTES = 30, 2 * 2**30  # limits of what files may unpack to: by their size, and in any case
_MEMBER_BYTES = 4096  # what a member of an archive counts in addition to its content, because it takes time too
_MAX_HEADER_BYTES = 100 * 2**20  # of safetensors, by their specification
_MAX_PDF_BYTES, _MAX_STREAM_BYTES = 512 * 2**20, 256 * 2**20  # of a PDF, and of each of its unpacked streams
_MAX_PENDING = 10_000  # strings of a PDF that one operator shows
_SPOOL_BYTES = 64 * 2**20
_OVERLAP = 4096  # characters of a chunk that are repeated in the next one where a line is longer than a chunk
_PRINTABLE = re.compile(rb"[\t\x20-\x7e]{8,}")
_TORCH_STORAGE = re.compile(r".*/data/\d+$")  # tensor in a file of torch.save
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}

_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)
_UNSUPPORTED = (NotImplementedError, RuntimeError, ValueError)  # encrypted members, unknown compressions


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


class Budget:
    """The number of bytes that some files, of `num_bytes` together, may unpack to."""

    def __init__(self, num_bytes: int) -> None:
        self._limit = self._remaining = max(_MIN_UNPACKED_BYTES, _MAX_GROWTH * num_bytes)

    def count(self, num_bytes: int) -> None:
        """Raise Unreadable if the files unpack to more than the limit."""
        self._remaining -= num_bytes
        if self._remaining < 0:
            raise Unreadable(f"the files unpack to more than {self._limit:,} bytes")


def file_texts(path: Path, budget: Budget | None = None) -> Iterator[Text]:
    """Yield the text of a file in parts of about CHUNK_BYTES, cut at ends of lines.

    Args:
        budget: what several files may unpack to (default: one for this file).

    Raises:
        Unreadable: the file is damaged, is compressed in a way that is not supported, or unpacks to too much.
    """
    with open(path, "rb", opener=open_no_link) as file:
        yield from _Reader(budget or Budget(path.stat().st_size)).texts(file, path.name, "", 0)


def tar_members(path: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Return the sizes of the files in a .tar, which may be compressed, by name, and the targets of its links.

    Raises:
        Unreadable: it is no archive, is damaged, or unpacks to too much.
    """
    budget = Budget(path.stat().st_size)
    sizes, links = {}, {}
    try:
        with open(path, "rb", opener=open_no_link) as file:
            compression = _compression(file.read(8))
            file.seek(0)
            content = _Limited(_decompressed(file, compression), budget) if compression else file
            with tarfile.open(fileobj=io.BufferedReader(content), mode="r|") as archive:
                for info in archive:
                    budget.count(_MEMBER_BYTES)
                    if info.isreg():
                        sizes[info.name] = info.size
                    elif info.issym():
                        links[info.name] = info.linkname
                    archive.members = []  # type: ignore[attr-defined]
    except (*_DAMAGED, *_UNSUPPORTED) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error
    return sizes, links


class _Reader:
    """Reads a file and the files inside it."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def texts(self, file: IO[bytes], name: str, member: str, depth: int) -> Iterator[Text]:
        """Yield the texts of an open file. `name` is its name, and `member` its path inside the outer file."""
        if depth > _MAX_DEPTH:
            raise Unreadable(f"{member}: found more than {_MAX_DEPTH} nested archives")
        stream = io.BufferedReader(file, CHUNK_BYTES) if isinstance(file, io.RawIOBase) else _peekable(file)
        head = stream.peek(512)[:512]
        try:
            if compression := _compression(head):
                unpacked = _Limited(_decompressed(stream, compression), self._budget)
                yield from self.texts(io.BufferedReader(unpacked, CHUNK_BYTES), _stem(name), member, depth + 1)
            elif head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                yield from self._zip(stream, member, depth)
            elif head[257:262] == b"ustar":
                yield from self._tar(stream, member, depth)
            elif head.startswith(b"%PDF-"):
                for text in pdf_texts(stream.read(_MAX_PDF_BYTES + 1), self._budget):
                    yield Text(member, text, None)
            elif name.endswith(".safetensors"):
                yield Text(member, _safetensors_header(stream), None)
            elif head.startswith(b"\x93NUMPY"):
                yield from _numpy(stream, head, member)
            else:
                yield from _plain(stream, head, member)
        except _DAMAGED as error:
            raise Unreadable(f"{member or name}: {type(error).__name__}: {error}") from error
        except _UNSUPPORTED as error:
            raise Unreadable(f"{member or name}: {error}") from error

    def _tar(self, stream: IO[bytes], member: str, depth: int) -> Iterator[Text]:
        owners = set()
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for info in archive:
                self._budget.count(_MEMBER_BYTES)
                place = _inner(member, info.name)
                yield Text(place, f"{info.name}\n{info.linkname}", None)
                owners.add((info.uname, info.gname))
                content = archive.extractfile(info) if info.isreg() else None
                if content is not None:
                    unpacked = io.BufferedReader(_Limited(content, self._budget), CHUNK_BYTES)
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
                    self._budget.count(_MEMBER_BYTES)
                    with archive.open(info) as content:
                        unpacked = io.BufferedReader(_Limited(content, self._budget), CHUNK_BYTES)
                        yield from self.texts(unpacked, info.filename, _inner(member, info.filename), depth + 1)


class _Limited(io.RawIOBase):
    """A stream of unpacked bytes that a budget counts."""

    def __init__(self, source: Any, budget: Budget) -> None:
        self._source, self._budget = source, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        self._budget.count(len(data))
        buffer[: len(data)] = data
        return len(data)


def _peekable(file: IO[bytes]) -> io.BufferedReader:
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, CHUNK_BYTES)  # type: ignore[arg-type]


def _compression(head: bytes) -> str | None:
    """Return how a file that begins with these bytes is compressed."""
    return next((kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)), None)


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


_PDF_TOKEN = re.compile(  # a string, an operator that shows strings, or the start of a list of strings
    rb"(?P<string>\([^()\\]*(?:\\.[^()\\]*)*\)|<[0-9A-Fa-f\s]*>)|(?P<operator>TJ|Tj|(?<=[)>\s])['\"])|\[", re.DOTALL
)


def pdf_texts(raw: bytes, budget: Budget) -> Iterator[str]:
    """Yield the strings that the pages of a PDF show, and all printable runs of the file and of its unpacked streams.

    Strings in fonts that have codes of their own (subsets of Unicode fonts) are not decoded.
    """
    yield _printable_runs(raw)
    for stream in _pdf_streams(raw, budget):
        yield _shown_text(stream)
        yield _printable_runs(stream)


def pdf_shown_text(raw: bytes) -> str:
    """Return the strings that the pages of a PDF show, one operator a line, as Latin-1.

    Raises:
        Unreadable: it is too large, or unpacks to too much.
    """
    return "\n".join(filter(None, map(_shown_text, _pdf_streams(raw, Budget(len(raw))))))


def _printable_runs(content: bytes) -> str:
    return b"\n".join(_PRINTABLE.findall(content)).decode("ascii")


def _pdf_streams(raw: bytes, budget: Budget) -> Iterator[bytes]:
    """Yield the unpacked streams of a PDF; streams without compression, and images, are yielded unchanged."""
    if len(raw) > _MAX_PDF_BYTES:
        raise Unreadable(f"a PDF of more than {_MAX_PDF_BYTES:,} bytes")
    end = 0
    while (start := raw.find(b"stream", end)) >= 0:
        end = start + len(b"stream")
        line_end = next((mark for mark in (b"\r\n", b"\n") if raw.startswith(mark, end)), None)
        if line_end is None:  # the word is no keyword, or the end of a stream
            continue
        start = end + len(line_end)
        end = raw.find(b"endstream", start)
        if end < 0:
            return
        unpacked = _inflated(raw[start:end])
        end += len(b"endstream")
        budget.count(len(unpacked))
        yield unpacked


def _inflated(content: bytes) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        data = decompressor.decompress(content, _MAX_STREAM_BYTES)
    except zlib.error:  # an image, or no compression
        return content
    if decompressor.unconsumed_tail:
        raise Unreadable(f"a stream of a PDF unpacks to more than {_MAX_STREAM_BYTES:,} bytes")
    return data


def _shown_text(content: bytes) -> str:
    shown: list[str] = []
    pending: list[bytes] = []
    for token in _PDF_TOKEN.finditer(content):
        if token["string"] is not None:
            pending.append(token["string"])
            if len(pending) <= _MAX_PENDING:
                continue
        if pending and (token["operator"] or token["string"]):
            strings = pending[-1:] if token["operator"] not in (None, b"TJ") else pending
            shown.append(b"".join(map(_pdf_string, strings)).decode("latin-1"))
        pending = []
    return "\n".join(shown)


def _pdf_string(text: bytes) -> bytes:
    if text.startswith(b"("):
        return re.sub(rb"\\(.)", rb"\1", text[1:-1], flags=re.DOTALL)
    digits = b"".join(text[1:-1].split())
    return bytes.fromhex(digits.decode("ascii") + "0" * (len(digits) % 2))
