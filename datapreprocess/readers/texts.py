"""Plain text: a document a file, or several between separators."""

from __future__ import annotations

from collections.abc import Iterator

from open_lm.datapreprocess.readers.base import BOM, BadDocument, Block, Document, ReadOptions
from open_lm.datapreprocess.readers.parts import split_parts
from open_lm.datapreprocess.readers.source import Source


def read_texts(source: Source, options: ReadOptions) -> Iterator[Block]:
    """The file as one document (held in memory whole), or what stands between separators, as it stands there.

    What holds nothing but space is no document.
    """
    separator = text_separator(options)
    blocks = source.blocks()
    for parts in split_parts(blocks, separator) if separator else iter([[b"".join(blocks)]]):
        if any(parts) or separator:
            yield parse_texts(source, parts, options)
    if not source.lines:
        yield source.block([], [source.nothing()])


def text_separator(options: ReadOptions) -> bytes | None:
    return options.separator.encode() if options.separator else None


def parse_texts(source: Source, parts: list[bytes], _options: ReadOptions) -> Block:
    """The documents of the next parts of a source."""
    if source.at_start and parts:
        parts[0] = parts[0].removeprefix(BOM)
    first = source.lines + 1
    source.lines += len(parts)
    documents: list[Document] = []
    bad: list[BadDocument] = []
    for number, part in enumerate(parts, first):
        if not part or part.isspace():
            continue
        try:
            documents.append(part.decode("utf-8"))
        except UnicodeDecodeError as error:
            detail = f"byte 0x{part[error.start]:02x} at {error.start} of the text is no UTF-8"
            bad.append(source.bad("invalid UTF-8", number, detail, part))
    return source.block(documents, bad)
