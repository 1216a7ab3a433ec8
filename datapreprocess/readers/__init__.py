"""Readers of raw input files: decompression, formats, and splitting large files for parallel work.

`PieceReader` streams the documents of one `Piece` (a file or a part of one) with bounded memory. It reports unusable
documents as `BadDocument` and raises `BrokenFile` for a truncated or unreadable file. A huge compressed file is
decompressed by one `FileChunks` and parsed by any number of `ChunkReader`s.

To add an input format, add one module to this package that calls `register_format`; see `registry`.
"""

from open_lm.datapreprocess.readers.base import (
    TO_END,
    BadDocument,
    Block,
    BrokenFile,
    Document,
    Piece,
    ReadOptions,
    Record,
)
from open_lm.datapreprocess.readers.hub import HUB_PREFIX, expand_folder
from open_lm.datapreprocess.readers.parts import Chunk
from open_lm.datapreprocess.readers.pieces import (
    ChunkReader,
    FileChunks,
    PieceReader,
    can_stream,
    separator_of,
    split,
)
from open_lm.datapreprocess.readers.registry import (
    Format,
    describe_suffixes,
    formats,
    is_data_name,
    register_format,
    separator_suffixes,
    split_suffixes,
    uses_separator,
)

__all__ = [
    "HUB_PREFIX", "TO_END", "BadDocument", "Block", "BrokenFile", "Chunk", "ChunkReader", "Document", "FileChunks",
    "Format", "Piece", "PieceReader", "ReadOptions", "Record", "can_stream", "describe_suffixes", "expand_folder",
    "formats", "is_data_name", "register_format", "separator_of", "separator_suffixes", "split", "split_suffixes",
    "uses_separator",
]  # fmt: skip
