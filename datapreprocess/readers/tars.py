"""Tar files: a document a member, chosen by the content key: text or txt, json:KEY, npy (ids)."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np

from open_lm.data.shard_format import iter_files
from open_lm.datapreprocess.readers.base import BadDocument, Block, BrokenFile, Document, ReadOptions
from open_lm.datapreprocess.readers.json_lines import parse_json
from open_lm.datapreprocess.readers.source import Source
from open_lm.errors import ConfigError, DataError

_SUFFIXES = {"text": (".txt", ".text"), "txt": (".txt", ".text"), "json": (".json",), "npy": (".npy",)}


def read_tar(source: Source, options: ReadOptions) -> Iterator[Block]:
    """The documents of the members of one kind; a tar without such members is a BrokenFile."""
    kind, _, json_key = options.content_key.partition(":")
    if kind not in _SUFFIXES or (kind == "json") != bool(json_key):
        raise ConfigError(
            f"{source.path}: --content_key {options.content_key!r} does not say which members of a tar to read; "
            "it must be text, txt, npy or json:KEY"
        )
    yield from source.in_blocks(_documents(source, kind, json_key))


def _documents(source: Source, kind: str, json_key: str) -> Iterator[Document | BadDocument]:
    with source.open_seekable() if source.compression else source.open_forwards() as file:
        if not file.seek(0, io.SEEK_END):
            yield source.nothing()
            return
        try:
            for name, offset, size in iter_files(file, source.path):
                if name.lower().endswith(_SUFFIXES[kind]):
                    source.lines += 1
                    file.seek(offset)
                    yield _document(source, name, file.read(size), kind, json_key)
        except BrokenFile:
            raise
        except DataError as error:
            raise BrokenFile("damaged", str(error)) from error
        if not source.lines:
            message = f"{source.path}: no member ends in {' or '.join(_SUFFIXES[kind])}; is --content_key right?"
            raise BrokenFile("no documents", message)


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
