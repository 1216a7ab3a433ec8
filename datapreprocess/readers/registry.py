"""Registry of input formats by file name suffix.

Every reader module of this package registers its format when it is imported:

    register_format(Format(read_lines, split=byte_ranges), ".jsonl", ".ndjson")

The first use of the registry imports all modules of the package. A new format therefore needs one new module here and
no other change: help texts, error messages and input discovery derive their suffix lists from the registry. Reader
modules import heavy libraries (numpy, pyarrow) inside their functions, to keep the start of the commands fast.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from open_lm.datapreprocess.readers.base import Block, Piece, ReadOptions
from open_lm.datapreprocess.readers.compression import COMPRESSIONS
from open_lm.datapreprocess.readers.input_stream import InputStream, split_rows
from open_lm.errors import DataError

# Names (in lower case) of files that accompany the data of a folder and hold none themselves.
_COMPANION_PREFIXES = (
    ".", "readme.", "license.", "changelog.", "dataset_info.", "dataset_infos.", "dataset_dict.", "state.json",
    "manifest.", "dataset.json", "rejects.",
)  # fmt: skip
_COMPANION_NAMES = ("tokenizer.json", "tokenizer_config.json")
_DEFAULT_SUFFIX = ".jsonl"  # of a compressed file without a format suffix, such as 00.zst


@dataclass(frozen=True)
class Format:
    """The reader functions and properties of one format. Only `read` is required.

    Attributes:
        read: yields the blocks of a stream.
        split: cuts an uncompressed file into pieces, given its url, its size and the requested piece size in bytes.
            Without it a file is one piece.
        separator: returns the bytes that separate the parts (lines or texts) of a file, or None if the options set
            none. Together with `parse` it allows several workers to parse one compressed file.
        parse: makes documents from the next parts of a stream.
        is_separated: returns whether a file, given its url and compression suffix, has separated parts; for formats
            whose suffix does not decide this.
        count: returns the number of rows of a file from its metadata.
        uses_separator: whether `ReadOptions.separator` applies.
        hub_builder: name of the Hugging Face `datasets` builder for plain files of this format.
    """

    read: Callable[[InputStream, ReadOptions], Iterator[Block]]
    split: Callable[[str, int, int], list[Piece]] | None = None
    separator: Callable[[ReadOptions], bytes | None] | None = None
    parse: Callable[[InputStream, list[bytes], ReadOptions], Block] | None = None
    is_separated: Callable[[str, str], bool] | None = None
    count: Callable[[str], int] | None = None
    uses_separator: bool = False
    hub_builder: str | None = None


_formats: dict[str, Format] = {}


def register_format(file_format: Format, *suffixes: str) -> None:
    """Register a format for files with these suffixes.

    Raises ValueError for a suffix that is malformed or already in use, and for a separator without a parser.
    """
    if (file_format.separator is None) != (file_format.parse is None):
        raise ValueError(f"format {', '.join(suffixes)}: `separator` and `parse` must be given together")
    for suffix in suffixes:
        if not suffix.startswith(".") or suffix.count(".") != 1 or suffix != suffix.lower():
            raise ValueError(f"format suffix {suffix!r}: expected a dot and lower-case text without dots, like '.csv'")
        if suffix in _formats or suffix in COMPRESSIONS:
            raise ValueError(f"format suffix {suffix!r} is already in use")
        _formats[suffix] = file_format


def formats() -> Mapping[str, Format]:
    """Return all formats by suffix; the first call imports the reader modules."""
    _import_readers()
    return MappingProxyType(_formats)


@functools.cache
def _import_readers() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def format_of(url: str) -> Format:
    """Return the format of a file; DataError for an unsupported suffix."""
    return formats()[split_suffixes(url)[1]]


def split_suffixes(url: str) -> tuple[str, str]:
    """Return the compression suffix ("" for none) and the format suffix of a file name.

    A compressed file without a format suffix (`00.zst`) is read as JSON lines. Raises DataError for an unsupported
    suffix.
    """
    stem, suffix = os.path.splitext(split_rows(url)[0].rpartition("/")[2].lower())
    compression = ""
    if suffix in COMPRESSIONS:
        compression = suffix
        suffix = os.path.splitext(stem)[1] or _DEFAULT_SUFFIX
    if suffix not in formats():
        found = f"{suffix} files" if suffix else "files without a suffix"
        raise DataError(f"{url}: no reader for {found}; supported suffixes are {describe_suffixes()}")
    return compression, suffix


def describe_suffixes() -> str:
    """Return the supported suffixes for help texts and error messages."""
    return f"{', '.join(sorted(formats()))}, also compressed ({', '.join(sorted(COMPRESSIONS))})"


def separator_suffixes() -> list[str]:
    """Return the suffixes of the formats to which `ReadOptions.separator` applies."""
    return sorted(suffix for suffix, file_format in formats().items() if file_format.uses_separator)


def is_supported(url: str) -> bool:
    """Return whether a reader exists for files of this name."""
    try:
        split_suffixes(url)
    except DataError:
        return False
    return True


def is_data_name(url: str) -> bool:
    """Return whether a file found in a folder is input data: supported, and no readme, licence or description."""
    name = url.rpartition("/")[2].lower()
    return is_supported(url) and not name.startswith(_COMPANION_PREFIXES) and name not in _COMPANION_NAMES


def uses_separator(url: str) -> bool:
    """Return whether `ReadOptions.separator` applies to the file."""
    return format_of(url).uses_separator
