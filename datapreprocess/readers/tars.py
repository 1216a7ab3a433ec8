"""Tar files: a document a member, chosen by the content key: text or txt, json:KEY, npy (ids)."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from open_lm.data.shard_format import iter_files
from open_lm.datapreprocess.readers.base import BadDocument, Block, BrokenFile, Document, ReadOptions
from open_lm.datapreprocess.readers.json_lines import parse_json
from open_lm.datapreprocess.readers.source import Source
from open_lm.errors import ConfigError, DataError

_SUFFIXES = {"text": (".txt", ".text"), "txt": (".txt", ".text"), "json": (".json",), "npy": (".npy",)}
_BLOCK_BYTES, _BLOCK_DOCUMENTS = 1 << 20, 1024


def read_tar(source: Source, options: ReadOptions) -> Iterator[Block]:
    """The documents of the members of one kind; a tar without such members is a BrokenFile."""
    url = source.piece.url
    kind, _, json_key = options.content_key.partition(":")
    if kind not in _SUFFIXES or (kind == "json") != bool(json_key):
        raise ConfigError(
            f"{url}: --content_key {options.content_key!r} does not say which members of a tar to read; "
            "it must be text, txt, npy or json:KEY"
        )
    batch: list[Document] = []
    bad: list[BadDocument] = []
    size = 0
    fault: BrokenFile | None = None
    try:
        for data, name in _members(source, _SUFFIXES[kind]):
            source.lines += 1
            found = _document(source, name, data, kind, json_key)
            if isinstance(found, BadDocument):
                bad.append(found)
            else:
                batch.append(found)
            size += len(data)
            if size >= _BLOCK_BYTES or len(batch) + len(bad) >= _BLOCK_DOCUMENTS:
                yield source.block(batch, bad)
                batch, bad, size = [], [], 0
    except BrokenFile as error:
        fault = error
    if batch or bad:
        yield source.block(batch, bad)
    if fault is not None:
        raise fault
    if not source.bytes_read:
        yield source.empty_file()
    elif not source.lines:
        message = f"{url}: no member ends in {' or '.join(_SUFFIXES[kind])}; is --content_key right?"
        raise BrokenFile("no documents", message)


def _members(source: Source, suffixes: tuple[str, ...]) -> Iterator[tuple[bytes, str]]:
    """Content and name of each member that ends in one of the suffixes."""
    with _tar_file(source) as file:
        if not file.seek(0, io.SEEK_END):
            return
        try:
            for name, offset, size in iter_files(file, source.piece.url):
                if name.lower().endswith(suffixes):
                    file.seek(offset)
                    yield file.read(size), name
        except BrokenFile:
            raise
        except DataError as error:
            raise BrokenFile("not a whole tar", str(error)) from error


@contextlib.contextmanager
def _tar_file(source: Source) -> Iterator[IO[bytes]]:
    """The tar as a seekable file; a compressed one is unpacked to disk first, because its members' ends must be seen.

    Of a compressed tar that breaks off, the members before the break are read before the error is raised.
    """
    if not source.compression:
        with source.open_forwards() as file:
            yield file
        return
    fault: BrokenFile | None = None
    with tempfile.TemporaryFile() as unpacked:
        try:
            unpacked.writelines(source.blocks())
        except BrokenFile as error:
            fault = error
        try:
            yield unpacked
        except BrokenFile as error:
            raise fault or error from None
    if fault is not None:
        raise fault


def _document(source: Source, name: str, data: bytes, kind: str, json_key: str) -> Document | BadDocument:
    def bad(what: str, detail: str) -> BadDocument:
        return source.bad(what, 0, f"member {name}: {detail}", data)

    if kind == "json":
        found = parse_json(data, json_key)
        return found if isinstance(found, str) else bad(*found)
    try:
        if kind != "npy":
            return data.decode("utf-8")
        ids: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except UnicodeDecodeError as error:
        return bad("invalid UTF-8", str(error))
    except (ValueError, TypeError, OverflowError, EOFError, OSError, SyntaxError, MemoryError) as error:
        return bad("invalid npy", str(error))
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        return bad("invalid npy", "expected an array of integers")
    return ids.reshape(-1)
