"""`.json` files: one array, one or more indented objects, or one object per line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from open_lm.datapreprocess.readers.base import (
    BOM,
    TO_END,
    BadDocument,
    Block,
    BrokenFile,
    Document,
    Piece,
    ReadOptions,
    Record,
)
from open_lm.datapreprocess.readers.input_stream import InputStream
from open_lm.datapreprocess.readers.json_lines import (
    byte_ranges,
    get_text,
    is_strict,
    line_separator,
    parse_lines,
    read_lines,
    text_problem,
    value_getter,
)
from open_lm.datapreprocess.readers.registry import Format, register_format

_ARRAY_OR_INDENTED = re.compile(rb"[ \t\r\n]*(\[|\{[ \t\r]*\n)")
_SPACE = re.compile(r"[ \t\r\n]*")
_MAX_TOKEN_CHARACTERS = 16  # a JSON token may be incomplete this close to the end of a block without being invalid


def read_json(stream: InputStream, options: ReadOptions) -> Iterator[Block]:
    """Read the elements of an array, the indented objects of a file, or its lines, as documents."""
    if stream.piece.end != TO_END:
        yield from read_lines(stream, options)
        return
    blocks = stream.blocks()
    head = next(blocks, b"")
    if is_document(head):
        content = chain([head], blocks)
        documents = _records(stream, content) if options.records else _documents(stream, content, options.content_key)
        yield from stream.group_blocks(documents)
    else:
        yield from read_lines(stream, options, chain([head], blocks))


def is_document(head: bytes) -> bool:
    """Return whether a file with this beginning is an array or an indented object: `[`, or `{` and a line end."""
    return _ARRAY_OR_INDENTED.match(head.removeprefix(BOM)) is not None


def split_json(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Split a file of lines into byte ranges; keep other files in one piece."""
    return byte_ranges(url, num_bytes, unit_bytes) if has_lines(url, "") else [Piece(url, num_bytes=num_bytes)]


def has_lines(url: str, compression: str) -> bool:
    """Return whether the file has one object per line, judged by its first bytes.

    Also True for an unreadable file: its reader reports the error.
    """
    try:
        return not is_document(next(InputStream(Piece(url), compression).blocks(), b""))
    except BrokenFile:
        return True


def _documents(stream: InputStream, blocks: Iterator[bytes], key: str) -> Iterator[Document | BadDocument]:
    key = key.removeprefix("json:")
    pick = value_getter(key)
    values = _values(_decode_blocks(blocks), stream.path)
    for value, data in islice(values, *stream.row_range) if stream.row_range else values:
        stream.lines += 1
        number = stream.lines
        text = get_text(value, pick, key)
        if not isinstance(text, str):
            kind, detail = text
            yield stream.bad_document(kind, number, f"element {number}: {detail}", repr(value)[:1000])
        elif problem := text_problem(text):
            kind, detail = problem
            yield stream.bad_document(kind, number, f"element {number}: {detail}", text)
        else:
            stream.lenient += not is_strict(data.encode("utf-8", "surrogateescape"), key)
            yield text


def _records(stream: InputStream, blocks: Iterator[bytes]) -> Iterator[Document | BadDocument]:
    values = _values(_decode_blocks(blocks), stream.path)
    for _, data in islice(values, *stream.row_range) if stream.row_range else values:
        stream.lines += 1
        if problem := text_problem(data):
            kind, detail = problem
            yield stream.bad_document(kind, stream.lines, f"element {stream.lines}: {detail}", data)
        else:
            yield Record(data, stream.lines)


def _decode_blocks(blocks: Iterator[bytes]) -> Iterator[str]:
    """Decode blocks as UTF-8. Invalid bytes become lone surrogates, so that only their own element is bad."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    first = next(blocks, b"").removeprefix(BOM)
    for block in chain([first], blocks):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _values(texts: Iterator[str], url: str) -> Iterator[tuple[Any, str]]:
    """Yield the elements of an array, or consecutive values, each with its JSON; only one is held in memory."""
    buffer = _Buffer(texts)
    try:
        is_array = buffer.peek() == "["
        if is_array:
            buffer.position += 1
            if buffer.peek() == "]":
                return
        while buffer.peek():
            yield buffer.value()
            delimiter = buffer.peek()
            if is_array and delimiter not in (",", "]"):
                found = repr(delimiter) if delimiter else "the end of the file"
                raise ValueError(f"expected , or ] after an element, found {found}")
            buffer.position += is_array
            if is_array and delimiter == "]":
                break
        if buffer.peek():
            raise ValueError("unexpected data after the array")
    except (ValueError, RecursionError) as error:
        message = (
            f"{url}: invalid JSON ({error}); expected an array, objects, or one object per line; download it again"
        )
        raise BrokenFile("invalid JSON", message) from error


class _Buffer:
    """A text buffer that is consumed from the front and refilled at the end."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts, self._text, self.position = texts, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end."""
        while True:
            match = _SPACE.match(self._text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self._text) or not self._fill(1):
                return self._text[self.position : self.position + 1]

    def value(self) -> tuple[Any, str]:
        """Decode and consume the next JSON value, and return it with its JSON."""
        while True:
            remaining = len(self._text) - self.position
            try:
                value, end = self._decode(self._text, self.position)
                text = self._text[self.position : end]
                if end < len(self._text):
                    self.position = end
                    return value, text
                if not self._fill(remaining):  # otherwise a number could continue
                    self.position = len(self._text)
                    return value, text
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self._text) - _MAX_TOKEN_CHARACTERS
                is_incomplete = error.msg.startswith("Unterminated") or near_end
                if not is_incomplete or not self._fill(remaining):
                    raise

    def _fill(self, num_characters: int) -> bool:
        """Drop the consumed text and append at least `num_characters`; return False at the end of the texts."""
        parts = [self._text[self.position :]]
        added = 0
        while added < num_characters and (text := next(self._texts, None)) is not None:
            parts.append(text)
            added += len(text)
        self._text, self.position = "".join(parts), 0
        return added > 0


register_format(
    Format(
        read_json,
        split=split_json,
        separator=line_separator,
        parse=parse_lines,
        is_separated=has_lines,
        hub_builder="json",
    ),
    ".json",
)
