"""Raw files as documents: decompression and formats, each a registry by suffix.

`PieceReader` streams the documents of one `Piece` (a file, or a part of one) in bounded memory. What cannot be used as
a document comes out as a `BadDocument`, so that the caller decides; a file that is cut short or broken beyond its lines
is a `BrokenFile`. One huge compressed file is read by one `FileChunks` and any number of `ChunkReader`s.
"""

from open_lm.datapreprocess.readers.base import (
    TO_END,
    BadDocument,
    Block,
    BrokenFile,
    Document,
    Piece,
    ReadOptions,
)
from open_lm.datapreprocess.readers.formats import (
    FORMATS,
    PieceReader,
    FileChunks,
    ChunkReader,
    can_stream,
    is_data_name,
    is_known,
    is_text,
    split,
    split_suffixes,
    FileChunks,
)
from open_lm.datapreprocess.readers.hub import HUB_PREFIX, expand_folder
from open_lm.datapreprocess.readers.parts import Chunk

__all__ = [
    "FORMATS", "HUB_PREFIX", "WHOLE", "BadDocument", "Block", "BrokenFile", "Document", "Piece", "PieceReader",
    "ReadOptions", "Stretch", "StretchReader", "Stretches", "can_stream", "expand_folder", "is_data_name", "is_known",
    "is_text", "split", "split_suffixes", "stretches",
]  # fmt: skip
