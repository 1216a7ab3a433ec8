"""Tar files: one document per member. The content key selects the members: text or txt, json:KEY, npy (token ids)."""

from __future__ import annotations

import io
from collections.abc import Iterator

from open_lm.datapreprocess.readers.base import (
    BOM,
    BadDocument,
    Block,
    BrokenFile,
    Document,
    ReadOptions,
    describe_invalid_utf8,
)
from open_lm.datapreprocess.readers.input_stream import InputStream
from open_lm.datapreprocess.readers.json_lines import parse_json
from open_lm.datapreprocess.readers.registry import Format, register_format
from open_lm.errors import ConfigError, DataError

_MEMBER_SUFFIXES = {"text": (".txt", ".text"), "txt": (".txt", ".text"), "json": (".json",), "npy": (".npy",)}


def read_tar(stream: InputStream, options: ReadOptions) -> Iterator[Block]:
    """Read the members that the content key selects; BrokenFile if there are none."""
    if options.records:
        raise BrokenFile("no records", f"{stream.path}: tar files hold no conversations; use JSON lines or Parquet")
    kind, _, json_key = options.content_key.partition(":")
    if kind not in _MEMBER_SUFFIXES or (kind == "json") != bool(json_key):
        raise ConfigError(
            f"{stream.path}: --content_key {options.content_key!r} does not select the members of a tar file; "
            "expected text, txt, npy or json:KEY"
        )
    yield from stream.group_blocks(_documents(stream, kind, json_key))


def _documents(stream: InputStream, kind: str, json_key: str) -> Iterator[Document | BadDocument]:
    from open_lm.data.shard_format import iter_files

    suffixes = _MEMBER_SUFFIXES[kind]
    with stream.open_seekable() if stream.compression else stream.open_forward() as file:
        if not file.seek(0, io.SEEK_END):
            yield stream.empty_file()
            return
        try:
            for name, offset, size in iter_files(file, stream.path):
                if name.lower().endswith(suffixes):
                    stream.lines += 1
                    file.seek(offset)
                    yield _document(stream, name, file.read(size), kind, json_key)
        except BrokenFile:
            raise
        except DataError as error:
            raise BrokenFile("damaged", str(error)) from error
        if not stream.lines:
            message = f"{stream.path}: found no member that ends in {' or '.join(suffixes)}; check --content_key"
            raise BrokenFile("no documents", message)


def _document(stream: InputStream, name: str, data: bytes, kind: str, json_key: str) -> Document | BadDocument:
    """Decode one member."""
    import numpy as np

    def bad(problem: str, detail: str) -> BadDocument:
        return stream.bad_document(problem, 0, f"member {name}: {detail}", data)

    if kind == "json":
        text = parse_json(stream, data.removeprefix(BOM), json_key)
        return text if isinstance(text, str) else bad(*text)
    try:
        if kind != "npy":
            return data.removeprefix(BOM).decode("utf-8")
        ids: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except UnicodeDecodeError as error:
        return bad("invalid UTF-8", describe_invalid_utf8(error))
    except (ValueError, TypeError, OverflowError, EOFError, OSError, SyntaxError, MemoryError) as error:
        return bad("invalid npy", str(error))
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        return bad("invalid npy", "expected an array of integers")
    return ids.reshape(-1)


register_format(Format(read_tar), ".tar")
