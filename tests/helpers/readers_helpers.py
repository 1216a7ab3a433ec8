"""Helpers of the reader tests: compressors, sample files, and functions that collect what a reader yields."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from open_lm.datapreprocess.readers import BadDocument, Block, BrokenFile, Piece, PieceReader, ReadOptions

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": lambda data: bz2.compress(data, 1),
}


def full_piece(path: Path | str) -> Piece:
    return Piece(str(path))


def collect(blocks: Iterable[Block]) -> tuple[list[Any], list[BadDocument]]:
    """Return all documents and all bad documents."""
    documents, bad = [], []
    for block in blocks:
        documents += block.documents
        bad += block.bad
    return documents, bad


def read(path: Path, **options: Any) -> tuple[list[Any], list[BadDocument]]:
    return collect(PieceReader(full_piece(path), ReadOptions(**options)))


def read_good(path: Path, **options: Any) -> list[Any]:
    """Return the documents of a file without bad documents."""
    found, bad = read(path, **options)
    assert bad == []
    return found


def read_until_break(path: Path, **options: Any) -> tuple[list[Any], BrokenFile]:
    """Return the documents of a broken file before the break, and the error."""
    found: list[Any] = []
    with pytest.raises(BrokenFile) as caught:
        for block in PieceReader(full_piece(path), ReadOptions(**options)):
            found += block.documents
    assert path.name in str(caught.value)
    return found, caught.value


def json_lines(texts: Iterable[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
