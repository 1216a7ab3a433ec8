"""Parquet and Arrow files: the texts of one column, of which alone is read.

The files of Hugging Face `datasets` are Arrow streams. Texts are columns of strings (or of bytes that are UTF-8);
dots in the content key reach into columns of structs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

from open_lm import storage
from open_lm.datapreprocess.readers.base import TO_END, BadDocument, Block, BrokenFile, Document, Piece, ReadOptions
from open_lm.datapreprocess.readers.source import Source
from open_lm.errors import StorageError

_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 1024
_BATCH_BYTES = 8 << 20  # of all columns of the rows that are read from Parquet at once
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(source: Source, options: ReadOptions) -> Iterator[Block]:
    """The texts of the row groups [start, end), a batch of rows at a time."""
    import pyarrow.parquet

    with source.open_seekable() as file, _explained(source):
        if not file.seek(0, os.SEEK_END):
            yield source.block([], [source.nothing()])
            return
        table = pyarrow.parquet.ParquetFile(file)
        path = _column_path(source, table.schema_arrow, options.content_key)
        end = table.num_row_groups if source.piece.end == TO_END else source.piece.end
        numbers = list(range(source.piece.start, end))
        groups = [table.metadata.row_group(number) for number in numbers]
        num_rows = sum(group.num_rows for group in groups)
        row_bytes = sum(group.total_byte_size for group in groups) // max(num_rows, 1) + 1
        batch_rows = min(max(_BATCH_BYTES // row_bytes, 1), _BLOCK_ROWS)
        batches = table.iter_batches(batch_rows, numbers, columns=[".".join(path)])
        sized = ((batch, source.piece.num_bytes * len(batch) // num_rows) for batch in batches)
        yield from _blocks(source, sized, path)


def count_parquet(url: str) -> int:
    """The rows of a file, from its footer."""
    import pyarrow.parquet

    source = Source(Piece(url, 0, TO_END, 0), "")
    with source.open() as file, _explained(source):
        return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)


def count_arrow(url: str) -> int:
    """The rows of a file, from the heads of its record batches."""
    source = Source(Piece(url, 0, TO_END, 0), "")
    with _open_arrow(source) as file, _explained(source):
        return sum(map(len, _arrow_batches(file)[1]))


def split_parquet(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Row groups, as many as make about `unit_bytes` of the file each."""
    import pyarrow.parquet

    whole = Source(Piece(url, 0, TO_END, num_bytes), "")
    try:
        with whole.open() as file, _explained(whole):
            metadata = pyarrow.parquet.ParquetFile(file).metadata
            sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    except BrokenFile:
        return [whole.piece]  # its reader will say what is wrong
    return _group(url, sizes, num_bytes, unit_bytes)


def read_arrow(source: Source, options: ReadOptions) -> Iterator[Block]:
    """The texts of the record batches [start, end) of an Arrow stream or file."""
    with _open_arrow(source) as file, _explained(source):
        if not file.size():
            yield source.block([], [source.nothing()])
            return
        schema, batches, cut_short = _arrow_batches(file)
        path = _column_path(source, schema, options.content_key)
        chosen = islice(batches, source.piece.start, None if source.piece.end == TO_END else source.piece.end)
        yield from _blocks(source, ((batch, batch.nbytes) for batch in chosen), path)
        if cut_short and source.piece.end == TO_END:
            message = f"{source.path}: cut short: an Arrow stream without its end mark; save or fetch the file again"
            raise BrokenFile("cut short", message)


def split_arrow(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Record batches, as many as make about `unit_bytes`; a remote file is one piece, for its batches have no index."""
    whole = Source(Piece(url, 0, TO_END, num_bytes), "")
    if storage.is_remote(url):
        return [whole.piece]
    try:
        with _open_arrow(whole) as file, _explained(whole):
            sizes = [batch.nbytes for batch in _arrow_batches(file)[1]]
    except BrokenFile:
        return [whole.piece]  # its reader will say what is wrong
    return _group(url, sizes, num_bytes, unit_bytes)


@contextlib.contextmanager
def _open_arrow(source: Source) -> Iterator[Any]:
    """The file as pyarrow's: memory-mapped where it lies here as it is, so that skipped batches cost nothing."""
    import pyarrow

    if source.compression or storage.is_remote(source.path):
        with source.open_seekable() as file:
            yield pyarrow.PythonFile(file, mode="r")
        return
    with source.open() as file:
        empty = not file.seek(0, os.SEEK_END)
    with pyarrow.BufferReader(b"") if empty else pyarrow.memory_map(storage.local_path(source.path)) as mapped:
        yield mapped


def _arrow_batches(file: Any) -> tuple[Any, Iterator[Any], bool]:
    """Schema, record batches, and whether the end mark of a stream is missing."""
    import pyarrow

    file.seek(0)
    if file.read(6) == b"ARROW1":
        table = pyarrow.ipc.open_file(file)
        return table.schema, (table.get_batch(number) for number in range(table.num_record_batches)), False
    file.seek(max(file.size() - len(_STREAM_END), 0))
    cut_short = file.read() != _STREAM_END
    file.seek(0)
    stream = pyarrow.ipc.open_stream(file)
    return stream.schema, iter(stream), cut_short


def _group(url: str, sizes: list[int], num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Pieces of neighbouring groups (batches) of the given sizes in memory; at least one group each."""
    total = max(sum(sizes), 1)
    ends = [0]
    filled = 0
    for number, size in enumerate(sizes, 1):
        filled += size * num_bytes // total
        if filled >= unit_bytes or number == len(sizes):
            ends.append(number)
            filled = 0
    shares = [sum(sizes[a:b]) * num_bytes // total for a, b in pairwise(ends)]
    return [Piece(url, a, b, share) for (a, b), share in zip(pairwise(ends), shares, strict=True)]


def _column_path(source: Source, schema: Any, key: str) -> list[str]:
    """Where the texts are: in the column named `key`, or the field that its dots lead to; neither is a BrokenFile."""
    from pyarrow import types

    key = key.removeprefix("json:")
    path = [key] if key in schema.names else key.split(".")
    kind = schema
    for part in path:
        is_container = kind is schema or types.is_struct(kind)
        index = kind.get_field_index(part) if is_container else -1
        if index < 0:
            names = ", ".join(schema.names[:20])
            message = f'{source.path}: no column "{key}"; it has {names}; is --content_key right?'
            raise BrokenFile("missing key", message)
        kind = kind.field(index).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(test(value) for test in tests):
        message = f'{source.path}: the column "{key}" holds {kind}, not text; is --content_key right?'
        raise BrokenFile("wrong type", message)
    return path


def _blocks(source: Source, batches: Iterator[tuple[Any, int]], path: list[str]) -> Iterator[Block]:
    """The texts of record batches, each of which stands for so many bytes of input."""
    seen = 0
    for batch, num_bytes in batches:
        rows = batch
        if source.rows:
            rows = batch.slice(max(source.rows[0] - seen, 0), max(source.rows[1] - max(seen, source.rows[0]), 0))
        seen += len(batch)
        column = _column(rows, path)
        step = min(max(_BLOCK_BYTES * len(column) // (column.nbytes + 1), 1), _BLOCK_ROWS)
        for first in range(0, len(column), step):
            yield _texts(source, column.slice(first, step))
        source.bytes_read += num_bytes
        if source.rows and seen >= source.rows[1]:
            return


def _column(batch: Any, path: list[str]) -> Any:
    import pyarrow.compute

    column = batch.column(batch.schema.get_field_index(path[0]))
    for part in path[1:]:
        column = pyarrow.compute.struct_field(column, part)
    return column


def _texts(source: Source, column: Any) -> Block:
    import pyarrow

    first = source.lines + 1
    source.lines += len(column)
    try:
        values = column.to_pylist()
        if set(map(type, values)) <= {str}:
            return source.block(values)
    except UnicodeDecodeError:
        values = column.cast(pyarrow.large_binary()).to_pylist()
    documents: list[Document] = []
    bad: list[BadDocument] = []
    for row, value in enumerate(values, first):
        try:
            if value is None:
                bad.append(source.bad("null", row, "the row holds no text"))
            else:
                documents.append(value if isinstance(value, str) else value.decode("utf-8"))
        except UnicodeDecodeError as error:
            detail = f"byte 0x{value[error.start]:02x} at {error.start} of the text is no UTF-8"
            bad.append(source.bad("invalid UTF-8", row, detail, value))
    return source.block(documents, bad)


@contextlib.contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turn what pyarrow cannot read into a BrokenFile."""
    from pyarrow import ArrowException

    try:
        yield
    except (StorageError, BrokenFile):
        raise
    except (ArrowException, OSError) as error:
        raise BrokenFile("damaged", f"{source.path}: cannot be read as Parquet or Arrow ({error})") from error
