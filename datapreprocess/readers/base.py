"""Data types shared by all readers: pieces of files, blocks of documents, bad documents and broken files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from open_lm.errors import DataError

if TYPE_CHECKING:
    import numpy as np

Document: TypeAlias = "str | np.ndarray"  # text (or a Record), or a 1-D array of token ids
TO_END = -1  # as the end of a Piece: read to the end of the file
BOM = b"\xef\xbb\xbf"
_EXCERPT_CHARACTERS = 500


@dataclass(frozen=True)
class Piece:
    """A part of one file, or the full file (`start` 0, `end` TO_END).

    Attributes:
        url: the file; may end in `?rows=FIRST:LAST`.
        start, end: range in units of the format: bytes, row groups or record batches.
        num_bytes: input bytes that the piece accounts for, used for load balancing and progress.
    """

    url: str
    start: int = 0
    end: int = TO_END
    num_bytes: int = 0


class Record(str):
    """The JSON of a complete record, read with `ReadOptions.records`; `line` is that of a `BadDocument`."""

    line: int

    def __new__(cls, text: str, line: int) -> Record:
        record = super().__new__(cls, text)
        record.line = line
        return record


@dataclass(frozen=True)
class BadDocument:
    """An unusable document: its kind, what is wrong, and an excerpt of up to 500 characters.

    `line` counts lines (or rows, texts, elements) from 1, beginning at `start`, where the piece starts; 0 means the
    full file.
    """

    kind: str
    url: str
    line: int
    detail: str
    start: int = 0
    content: str = ""


@dataclass
class Block:
    """Some documents of a piece, the bad documents among them, and the input bytes of the piece read so far.

    `lenient` of the documents come from JSON that only Python's parser accepts, such as `{"score": NaN}`. `counts` are
    further numbers to add up, by name.
    """

    documents: list[Document]
    bad: list[BadDocument]
    bytes_read: int
    lenient: int = 0
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadOptions:
    """Settings of all readers.

    Attributes:
        content_key: key or column of the text; dots reach nested fields.
        separator: text between the documents of a text file; None: one document per file.
        records: read complete records, as `Record`, instead of the text under `content_key`.
    """

    content_key: str = "text"
    separator: str | None = None
    records: bool = False


CUT_SHORT = "cut short"  # kind of a broken file whose end is missing
UNREADABLE = "unreadable"  # kind of a broken file that storage could not read


class BrokenFile(DataError):
    """A file that cannot be read any further; raised after the documents before the break were yielded."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BrokenFile], tuple[str, str]]:
        return BrokenFile, (self.kind, str(self))


def describe_invalid_utf8(error: UnicodeDecodeError, place: str = "text") -> str:
    """Return the detail of a BadDocument whose bytes cannot be decoded."""
    return f"byte 0x{error.object[error.start]:02x} at position {error.start} of the {place} is not valid UTF-8"


def excerpt(content: bytes | str) -> str:
    """Return at most 500 characters of the content, escaped so that they can be encoded as UTF-8."""
    if isinstance(content, str):
        content = content[:_EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace")
    return content[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")[:_EXCERPT_CHARACTERS]
