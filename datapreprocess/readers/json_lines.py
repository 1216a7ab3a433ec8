"""JSON lines: one object per line, with its text under the content key.

All formats with JSON accept the same dialect: strict JSON, and what only Python's parser accepts (NaN, Infinity, and
invalid UTF-8 and lone surrogates in other values than the text). Documents of the second kind are counted.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from open_lm.datapreprocess.readers.base import (
    BOM,
    TO_END,
    BadDocument,
    Block,
    Document,
    Piece,
    ReadOptions,
    Record,
    describe_invalid_utf8,
)
from open_lm.datapreprocess.readers.input_stream import InputStream
from open_lm.datapreprocess.readers.parts import split_parts
from open_lm.datapreprocess.readers.registry import Format, register_format

LINE_END = b"\n"
Problem = tuple[str, str]  # kind and detail


@functools.cache
def _decode_errors() -> tuple[type[Exception], ...]:
    """Return the errors of decoding a line. The import is delayed so that a command can report a missing package."""
    import msgspec

    return (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError)


def byte_ranges(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Split an uncompressed file into byte ranges."""
    starts = list(range(0, num_bytes - unit_bytes // 2, unit_bytes))
    return [Piece(url, a, b, b - a) for a, b in zip(starts, [*starts[1:], num_bytes], strict=True)]


def line_separator(_options: ReadOptions) -> bytes:
    return LINE_END


def read_lines(stream: InputStream, options: ReadOptions, blocks: Iterator[bytes] | None = None) -> Iterator[Block]:
    """Read the documents of a file (or of its given `blocks`), or of the lines that begin in a byte range."""
    if blocks is None:
        blocks = stream.blocks() if stream.piece.end == TO_END else stream.line_blocks()
    parts = split_parts(blocks, LINE_END)
    for lines in _select_lines(parts, *stream.row_range) if stream.row_range else parts:
        yield parse_lines(stream, lines, options)
    if not stream.lines and stream.piece.end == TO_END and not stream.row_range:
        yield stream.block([], [stream.empty_file()])


def _select_lines(parts: Iterator[list[bytes]], first: int, last: int) -> Iterator[list[bytes]]:
    """Yield the lines [first, last), not counting blank lines."""
    num_seen = 0
    for part in parts:
        lines = [line for line in part if line and not line.isspace()]
        yield lines[max(first - num_seen, 0) : max(last - num_seen, 0)]
        num_seen += len(lines)
        if num_seen >= last:
            return


def parse_lines(stream: InputStream, lines: list[bytes], options: ReadOptions) -> Block:
    """Parse the next lines of a stream."""
    key = options.content_key.removeprefix("json:")
    if stream.at_start and lines:
        lines[0] = lines[0].removeprefix(BOM)
    first = stream.lines + 1
    stream.lines += len(lines)
    if options.records:
        return _record_block(stream, lines, first)
    decode = text_decoder(key)
    try:
        return stream.block(decode(lines))
    except _decode_errors():
        pass  # some line is bad or blank: parse them one by one
    documents: list[Document] = []
    bad: list[BadDocument] = []
    for number, line in enumerate(lines, first):
        if not line or line.isspace():
            continue
        text = parse_json(stream, line, key)
        if isinstance(text, str):
            documents.append(text)
        else:
            kind, detail = text
            bad.append(stream.bad_document(kind, number, detail, line))
    return stream.block(documents, bad)


def _record_block(stream: InputStream, lines: list[bytes], first: int) -> Block:
    """Return the lines from number `first` on as records, without parsing them."""
    records: list[Document] = []
    bad: list[BadDocument] = []
    for number, line in enumerate(lines, first):
        if not line or line.isspace():
            continue
        try:
            records.append(Record(line.decode("utf-8"), number))
        except UnicodeDecodeError as error:
            bad.append(stream.bad_document("invalid UTF-8", number, describe_invalid_utf8(error, "line"), line))
    return stream.block(records, bad)


@functools.lru_cache
def text_decoder(key: str) -> Callable[[list[bytes]], list[str]]:
    """Return a function that decodes the texts of valid lines, and raises one of `_decode_errors()` for other lines.

    For a key without dots it decodes only that key. The rest of the line must be well-formed JSON; its values are not
    checked.
    """
    if "." in key:
        pick = value_getter(key)

        def decode_nested(lines: list[bytes]) -> list[str]:
            texts = list(map(pick, map(orjson.loads, lines)))
            if not set(map(type, texts)) <= {str}:
                raise TypeError("expected strings only")
            return texts

        return decode_nested
    import msgspec

    record_type = msgspec.defstruct("Record", [("text", str)], rename={"text": key}, gc=False)
    decode: Callable[[bytes], Any] = msgspec.json.Decoder(record_type).decode
    return lambda lines: [record.text for record in map(decode, lines)]


def value_getter(key: str) -> Callable[[Any], Any]:
    """Return a function that gets the value of `key` from a record.

    Dots reach nested objects, unless the record has the dotted key itself. The function raises KeyError or TypeError if
    there is no such value.
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


def parse_json(stream: InputStream, data: bytes, key: str) -> str | Problem:
    """Return the text of one JSON object, or the problem with it."""
    try:
        return text_decoder(key)([data])[0]
    except _decode_errors():
        pass
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return _parse_lenient(stream, data, key, error)
    return get_text(record, value_getter(key), key)


def is_strict(data: bytes, key: str) -> bool:
    """Return whether a strict parser accepts a JSON object."""
    try:
        text_decoder(key)([data])
    except _decode_errors():
        try:
            orjson.loads(data)
        except orjson.JSONDecodeError:
            return False
    return True


def _parse_lenient(stream: InputStream, data: bytes, key: str, strict_error: orjson.JSONDecodeError) -> str | Problem:
    """Return what `parse_json` does, for an object that the strict parser refuses; count a text that is found."""
    try:
        record = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return _decode_problem(data, strict_error)
    text = get_text(record, value_getter(key), key)
    if not isinstance(text, str):
        return text
    problem = text_problem(text)
    if problem is None:
        stream.lenient += 1
        return text
    return _decode_problem(data, strict_error) if problem[0] == "invalid UTF-8" else problem


def text_problem(text: str) -> Problem | None:
    """Return why a text cannot be encoded as UTF-8, or None. Invalid bytes were decoded with surrogateescape."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return "invalid UTF-8", f"byte 0x{code - 0xDC00:02x} is not valid UTF-8"
        return "lone surrogate", f"half of a surrogate pair, which UTF-8 cannot encode (U+{code:04X})"
    return None


def get_text(record: Any, pick: Callable[[Any], Any], key: str) -> str | Problem:
    """Return the text under `key` of a decoded JSON value, or the problem with it."""
    if not isinstance(record, dict):
        return "not an object", f"expected a JSON object, found {type(record).__name__}"
    try:
        value = pick(record)
    except (KeyError, TypeError):
        return "missing key", f'found no key "{key}"; the object has {", ".join(list(record)[:8]) or "no keys"}'
    if value is None:
        return "null", f'"{key}" is null'
    if not isinstance(value, str):
        return "wrong type", f'"{key}" must be a string, found {type(value).__name__}'
    return value


def _decode_problem(data: bytes, error: orjson.JSONDecodeError) -> Problem:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as fault:
        return "invalid UTF-8", describe_invalid_utf8(fault, "line")
    return "invalid JSON", str(error)


register_format(Format(read_lines, split=byte_ranges, separator=line_separator, parse=parse_lines), ".jsonl", ".ndjson")
