"""Plain text files: one document per file, or several documents between separators."""

from __future__ import annotations

import re
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
from open_lm.datapreprocess.readers.parts import split_parts
from open_lm.datapreprocess.readers.registry import Format, register_format
from open_lm.errors import ConfigError

_ESCAPE = re.compile(r"\\(?:[\\nrtfv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")


def read_texts(stream: InputStream, options: ReadOptions) -> Iterator[Block]:
    """Read the file as one document (held in memory), or the unchanged texts between separators.

    Texts of only white space are skipped.
    """
    if options.records:
        raise BrokenFile("no records", f"{stream.path}: text files hold no conversations; use JSON lines or Parquet")
    separator = text_separator(options)
    blocks = stream.blocks()
    for parts in split_parts(blocks, separator) if separator else iter([[b"".join(blocks)]]):
        if any(parts) or separator:
            yield parse_texts(stream, parts, options)
    if not stream.lines:
        yield stream.block([], [stream.empty_file()])


def decode_separator(text: str, flag: str) -> str:
    r"""Return the value of a flag with its escapes, such as \n and \u2028, replaced; ConfigError if it is no text."""
    separator = _ESCAPE.sub(lambda match: match[0].encode().decode("unicode_escape"), text)
    try:
        separator.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{flag} {text!r} cannot be encoded as UTF-8 ({error.reason})") from error
    return separator


def text_separator(options: ReadOptions) -> bytes | None:
    return options.separator.encode() if options.separator else None


def parse_texts(stream: InputStream, parts: list[bytes], _options: ReadOptions) -> Block:
    """Decode the next parts of a stream as documents."""
    if stream.at_start and parts:
        parts[0] = parts[0].removeprefix(BOM)
    first = stream.lines + 1
    stream.lines += len(parts)
    documents: list[Document] = []
    bad: list[BadDocument] = []
    for number, part in enumerate(parts, first):
        if not part or part.isspace():
            continue
        try:
            documents.append(part.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad.append(stream.bad_document("invalid UTF-8", number, describe_invalid_utf8(error), part))
    return stream.block(documents, bad)


register_format(
    Format(read_texts, separator=text_separator, parse=parse_texts, uses_separator=True), ".txt", ".text", ".md"
)
