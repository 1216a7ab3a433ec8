"""Plain text files: one document per file, or several documents between separators."""

from __future__ import annotations

from collections.abc import Iterator

from open_lm.datapreprocess.readers.base import BOM, BadDocument, Block, Document, ReadOptions
from open_lm.datapreprocess.readers.parts import split_parts
from open_lm.datapreprocess.readers.registry import Format, register_format
from open_lm.datapreprocess.readers.source import Source


def read_texts(source: Source, options: ReadOptions) -> Iterator[Block]:
    """Read the file as one document (held in memory), or the unchanged texts between separators.

    Texts of only white space are skipped.
    """
    separator = text_separator(options)
    blocks = source.blocks()
    for parts in split_parts(blocks, separator) if separator else iter([[b"".join(blocks)]]):
        if any(parts) or separator:
            yield parse_texts(source, parts, options)
    if not source.lines:
        yield source.block([], [source.empty_file()])


def text_separator(options: ReadOptions) -> bytes | None:
    return options.separator.encode() if options.separator else None


def parse_texts(source: Source, parts: list[bytes], _options: ReadOptions) -> Block:
    """Decode the next parts of a source as documents."""
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
            detail = f"byte 0x{part[error.start]:02x} at position {error.start} of the text is not valid UTF-8"
            bad.append(source.bad_document("invalid UTF-8", number, detail, part))
    return source.block(documents, bad)


register_format(
    Format(read_texts, separator=text_separator, parse=parse_texts, uses_separator=True), ".txt", ".text", ".md"
)
