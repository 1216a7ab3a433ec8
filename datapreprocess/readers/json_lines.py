"""JSON lines: an object a line, its text under the content key."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import orjson

from open_lm.datapreprocess.readers.base import BOM, TO_END, BadDocument, Block, Document, Piece, ReadOptions
from open_lm.datapreprocess.readers.parts import split_parts
from open_lm.datapreprocess.readers.source import Source

LINE_END = b"\n"
_FAULTS = (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError)
Finding = tuple[str, str]  # kind and detail of what is wrong


def byte_ranges(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Pieces of a file that is not compressed."""
    starts = list(range(0, num_bytes - unit_bytes // 2, unit_bytes))
    return [Piece(url, a, b, b - a) for a, b in zip(starts, [*starts[1:], num_bytes], strict=True)]


def read_lines(source: Source, options: ReadOptions, blocks: Iterator[bytes] | None = None) -> Iterator[Block]:
    """The documents of a file of JSON lines (its `blocks`), or of those lines that begin in a byte range of it."""
    if blocks is None:
        blocks = source.blocks() if source.piece.end == TO_END else source.line_blocks()
    parts = split_parts(blocks, LINE_END)
    for lines in _only(parts, *source.rows) if source.rows else parts:
        yield parse_lines(source, lines, options)
    if not source.lines and source.piece.end == TO_END and not source.rows:
        yield source.block([], [source.nothing()])


def _only(parts: Iterator[list[bytes]], first: int, last: int) -> Iterator[list[bytes]]:
    """Lines number `first` … `last` - 1 of those that are not blank."""
    seen = 0
    for found in parts:
        lines = [line for line in found if line and not line.isspace()]
        yield lines[max(first - seen, 0) : max(last - seen, 0)]
        seen += len(lines)
        if seen >= last:
            return


def parse_lines(source: Source, lines: list[bytes], options: ReadOptions) -> Block:
    """The documents of the next lines of a source."""
    key = options.content_key.removeprefix("json:")
    if source.at_start and lines:
        lines[0] = lines[0].removeprefix(BOM)
    first = source.lines + 1
    source.lines += len(lines)
    decode = text_decoder(key)
    try:
        return source.block(decode(lines))
    except _FAULTS:
        pass  # something is wrong or blank: see line by line
    documents: list[Document] = []
    bad: list[BadDocument] = []
    for number, line in enumerate(lines, first):
        if not line or line.isspace():
            continue
        found = parse_json(line, key)
        if isinstance(found, str):
            documents.append(found)
        else:
            bad.append(source.bad(found[0], number, found[1], line))
    return source.block(documents, bad)


@functools.lru_cache
def text_decoder(key: str) -> Callable[[list[bytes]], list[str]]:
    """A function that gives the texts of lines that all are as they should be, and raises one of `_FAULTS` otherwise.

    A plain key alone is decoded; what stands beside it must be JSON in form, and is not looked at more closely.
    """
    if "." in key:
        pick = picker(key)

        def decode_nested(lines: list[bytes]) -> list[str]:
            texts = list(map(pick, map(orjson.loads, lines)))
            if not set(map(type, texts)) <= {str}:
                raise TypeError("not only texts")
            return texts

        return decode_nested
    record = msgspec.defstruct("Record", [("text", str)], rename={"text": key}, gc=False)
    decode: Callable[[bytes], Any] = msgspec.json.Decoder(record).decode
    return lambda lines: [found.text for found in map(decode, lines)]


def picker(key: str) -> Callable[[Any], Any]:
    """A function that gives what a record holds under `key`; dots reach nested objects unless the key itself is there.

    It raises KeyError or TypeError where there is no such thing.
    """
    if "." not in key:
        return operator.itemgetter(key)
    path = key.split(".")

    def pick(record: Any) -> Any:
        if key in record:
            return record[key]
        for part in path:
            record = record[part]
        return record

    return pick


def parse_json(data: bytes, key: str) -> str | Finding:
    """The text of one JSON object, or what is wrong with it."""
    try:
        return text_decoder(key)([data])[0]
    except _FAULTS:
        pass
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return _undecodable(data, error)
    return text_in(record, picker(key), key)


def text_in(record: Any, pick: Callable[[Any], Any], key: str) -> str | Finding:
    """The text that a decoded JSON value holds under `key`, or what is wrong with it."""
    if not isinstance(record, dict):
        return "not an object", f"expected a JSON object, found {type(record).__name__}"
    try:
        value = pick(record)
    except (KeyError, TypeError):
        return "missing key", f'no key "{key}"; it has {", ".join(list(record)[:8]) or "none"}'
    if value is None:
        return "null", f'"{key}" is null'
    if not isinstance(value, str):
        return "wrong type", f'"{key}" is not a text but {type(value).__name__}'
    return value


def _undecodable(data: bytes, error: orjson.JSONDecodeError) -> Finding:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as fault:
        return "invalid UTF-8", f"byte 0x{data[fault.start]:02x} at {fault.start} of the line is no UTF-8"
    if "surrogate" in str(error):
        return "lone surrogate", f"half of a character that UTF-8 cannot hold ({error})"
    return "invalid JSON", str(error)
