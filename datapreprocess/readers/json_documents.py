"""`.json` files that are one array, or one or more indented objects, rather than an object a line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from open_lm.datapreprocess.readers.base import BOM, TO_END, BadDocument, Block, BrokenFile, Document, Piece, ReadOptions
from open_lm.datapreprocess.readers.json_lines import byte_ranges, picker, read_lines, text_in
from open_lm.datapreprocess.readers.source import Source

_DOCUMENT = re.compile(rb"[ \t\r\n]*(\[|\{[ \t\r]*\n)")
_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = 16  # characters that a JSON value may lack at the end of a block without being wrong


def read_json(source: Source, options: ReadOptions) -> Iterator[Block]:
    """The elements of an array or the objects of a file, each a document; else the file's lines."""
    if source.piece.end != TO_END:
        yield from read_lines(source, options)
        return
    blocks = source.blocks()
    head = next(blocks, b"")
    if is_document(head):
        yield from source.in_blocks(_documents(source, chain([head], blocks), options.content_key))
    else:
        yield from read_lines(source, options, chain([head], blocks))


def is_document(head: bytes) -> bool:
    """Whether a file that begins so is an array or an indented object: `[`, or `{` alone on its line."""
    return _DOCUMENT.match(head.removeprefix(BOM)) is not None


def split_json(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    return byte_ranges(url, num_bytes, unit_bytes) if has_lines(url, "") else [Piece(url, 0, TO_END, num_bytes)]


def has_lines(url: str, compression: str) -> bool:
    """Whether the file is an object a line, by its first bytes; one that cannot be read is left to its reader."""
    try:
        return not is_document(next(Source(Piece(url, 0, TO_END, 0), compression).blocks(), b""))
    except BrokenFile:
        return True


def _documents(source: Source, blocks: Iterator[bytes], key: str) -> Iterator[Document | BadDocument]:
    key = key.removeprefix("json:")
    pick = picker(key)
    values = _values(_texts(blocks), source.path)
    for value in islice(values, *source.rows) if source.rows else values:
        source.lines += 1
        found = text_in(value, pick, key)
        if not isinstance(found, str):
            yield source.bad(found[0], source.lines, f"element {source.lines}: {found[1]}", repr(value)[:1000])
        elif fault := _unencodable(found):
            yield source.bad(fault[0], source.lines, f"element {source.lines}: {fault[1]}", found)
        else:
            yield found


def _texts(blocks: Iterator[bytes]) -> Iterator[str]:
    """The blocks as text; bytes that are no UTF-8 become lone surrogates, which spoil only the element they are in."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    first = next(blocks, b"").removeprefix(BOM)
    for block in chain([first], blocks):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _unencodable(text: str) -> tuple[str, str] | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return "invalid UTF-8", f"byte 0x{code - 0xDC00:02x} is no UTF-8"
        return "lone surrogate", f"half of a character that UTF-8 cannot hold (U+{code:04X})"
    return None


def _values(texts: Iterator[str], url: str) -> Iterator[Any]:
    """The elements of an array, or the values that follow each other, held in memory one at a time."""
    buffer = _Buffer(texts)
    try:
        is_array = buffer.peek() == "["
        if is_array:
            buffer.position += 1
            if buffer.peek() == "]":
                return
        while buffer.peek():
            yield buffer.value()
            follows = buffer.peek()
            if is_array and follows not in (",", "]"):
                raise ValueError("expected , or ] after an element, found " + (repr(follows) if follows else "the end"))
            buffer.position += is_array
            if is_array and follows == "]":
                break
        if buffer.peek():
            raise ValueError("something follows the array")
    except (ValueError, RecursionError) as error:
        message = f"{url}: invalid JSON ({error}); expected an array, objects, or an object a line; fetch it again"
        raise BrokenFile("invalid JSON", message) from error


class _Buffer:
    """Text of which values are taken from the front while more comes in at the end."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts, self._text, self.position = texts, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            match = _SPACE.match(self._text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self._text) or not self._fill(1):
                return self._text[self.position : self.position + 1]

    def value(self) -> Any:
        while True:
            left = len(self._text) - self.position
            try:
                value, end = self._decode(self._text, self.position)
                if end < len(self._text):
                    self.position = end
                    return value
                if not self._fill(left):  # a number could have gone on
                    self.position = len(self._text)
                    return value
            except json.JSONDecodeError as error:
                open_end = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_TOKEN
                if not open_end or not self._fill(left):
                    raise

    def _fill(self, wanted: int) -> bool:
        """Drop what was taken and add at least `wanted` characters; False at the end of the texts."""
        parts = [self._text[self.position :]]
        added = 0
        while added < wanted and (text := next(self._texts, None)) is not None:
            parts.append(text)
            added += len(text)
        self._text, self.position = "".join(parts), 0
        return added > 0
