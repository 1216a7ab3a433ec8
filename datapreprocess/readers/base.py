"""What all readers share: pieces of files, blocks of documents, and what can be wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from open_lm.errors import DataError

Document = str | np.ndarray  # a text, or a 1-D array of ids
TO_END = -1
BOM = b"\xef\xbb\xbf"
_EXCERPT_CHARACTERS = 500


@dataclass(frozen=True)
class Piece:
    """A part of one file, or all of it (0, WHOLE).

    What `start` and `end` count is the format's affair: bytes, row groups or record batches. `num_bytes` is the input
    that the piece stands for, for balance and progress.
    """

    url: str
    start: int
    end: int
    num_bytes: int


@dataclass(frozen=True)
class BadDocument:
    """What is no document: its kind, what is wrong, and at most 500 characters of what was found.

    `line` counts lines (rows, texts, elements) from 1 at `start`, where the piece begins; 0 stands for the whole file.
    """

    kind: str
    url: str
    line: int
    detail: str
    start: int = 0
    content: str = ""


@dataclass
class Block:
    """Some documents of a piece, what is bad among them, and the input bytes of the piece read so far."""

    documents: list[Document]
    bad: list[BadDocument]
    bytes_read: int


@dataclass(frozen=True)
class ReadOptions:
    """`content_key` names the text (dots reach nested fields); `separator` cuts text files into documents."""

    content_key: str = "text"
    separator: str | None = None


class BrokenFile(DataError):
    """A file that is broken beyond its lines; raised after the documents before the break were given."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BrokenFile], tuple[str, str]]:
        return BrokenFile, (self.kind, str(self))


def excerpt(content: bytes | str) -> str:
    """At most 500 characters, as text that can be encoded."""
    if isinstance(content, str):
        content = content[:_EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace")
    return content[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")[:_EXCERPT_CHARACTERS]
