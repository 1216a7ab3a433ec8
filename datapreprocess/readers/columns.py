"""Parquet and Arrow files: the texts of one column; the other columns are not read.

Hugging Face `datasets` stores Arrow streams. The text column may hold strings or UTF-8 bytes; dots in the content key
reach fields of struct columns.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import orjson

from open_lm import storage
from open_lm.datapreprocess.readers.base import (
    CUT_SHORT,
    TO_END,
    BadDocument,
    Block,
    BrokenFile,
    Document,
    Piece,
    ReadOptions,
    Record,
    describe_invalid_utf8,
)
from open_lm.datapreprocess.readers.input_stream import InputStream
from open_lm.datapreprocess.readers.registry import Format, register_format
from open_lm.errors import StorageError

_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 1024
_BATCH_BYTES = 8 << 20  # size of the rows (all columns) that are read from Parquet at once
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(stream: InputStream, options: ReadOptions) -> Iterator[Block]:
    """Read the texts of the row groups [start, end), one batch of rows at a time."""
    import pyarrow.parquet

    with stream.open_seekable() as file, _pyarrow_errors(stream):
        if not file.seek(0, os.SEEK_END):
            yield stream.block([], [stream.empty_file()])
            return
        table = pyarrow.parquet.ParquetFile(file)
        path = [] if options.records else _column_path(stream, table.schema_arrow, options.content_key)
        end = table.num_row_groups if stream.piece.end == TO_END else stream.piece.end
        numbers = list(range(stream.piece.start, end))
        groups = [table.metadata.row_group(number) for number in numbers]
        num_rows = sum(group.num_rows for group in groups)
        row_bytes = sum(group.total_byte_size for group in groups) // max(num_rows, 1) + 1
        batch_rows = min(max(_BATCH_BYTES // row_bytes, 1), _BLOCK_ROWS)
        batches = table.iter_batches(batch_rows, numbers, columns=[".".join(path)] if path else None)
        sized = ((batch, stream.piece.num_bytes * len(batch) // num_rows) for batch in batches)
        yield from _blocks(stream, sized, path)
    stream.hash_file()


def count_parquet(url: str) -> int:
    """Read the number of rows from the footer."""
    import pyarrow.parquet

    stream = InputStream(Piece(url))
    with stream.open() as file, _pyarrow_errors(stream):
        return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)


def count_arrow(url: str) -> int:
    """Sum the row numbers of the record batch headers."""
    stream = InputStream(Piece(url))
    with _open_arrow(stream) as file, _pyarrow_errors(stream):
        return sum(map(len, _arrow_batches(file)[1]))


def split_parquet(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Split a file into groups of row groups of about `unit_bytes` each."""
    import pyarrow.parquet

    stream = InputStream(Piece(url, num_bytes=num_bytes))
    try:
        with stream.open() as file, _pyarrow_errors(stream):
            metadata = pyarrow.parquet.ParquetFile(file).metadata
            sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    except BrokenFile:
        return [stream.piece]  # its reader reports the error
    return _group(url, sizes, num_bytes, unit_bytes)


def read_arrow(stream: InputStream, options: ReadOptions) -> Iterator[Block]:
    """Read the texts of the record batches [start, end) of an Arrow stream or file."""
    with _open_arrow(stream) as file, _pyarrow_errors(stream):
        if not file.size():
            yield stream.block([], [stream.empty_file()])
            return
        schema, batches, is_truncated = _arrow_batches(file)
        path = [] if options.records else _column_path(stream, schema, options.content_key)
        selected = islice(batches, stream.piece.start, None if stream.piece.end == TO_END else stream.piece.end)
        yield from _blocks(stream, ((batch, batch.nbytes) for batch in selected), path)
        if is_truncated and stream.piece.end == TO_END:
            message = f"{stream.path}: truncated: the Arrow stream has no end marker; save or download the file again"
            raise BrokenFile(CUT_SHORT, message)
    stream.hash_file()


def split_arrow(url: str, num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Split a file into groups of record batches of about `unit_bytes` each.

    A remote file is one piece: its record batches have no index, so finding them would mean reading the file.
    """
    stream = InputStream(Piece(url, num_bytes=num_bytes))
    if storage.is_remote(url):
        return [stream.piece]
    try:
        with _open_arrow(stream) as file, _pyarrow_errors(stream):
            sizes = [batch.nbytes for batch in _arrow_batches(file)[1]]
    except BrokenFile:
        return [stream.piece]  # its reader reports the error
    return _group(url, sizes, num_bytes, unit_bytes)


@contextlib.contextmanager
def _open_arrow(stream: InputStream) -> Iterator[Any]:
    """Open the file with pyarrow; memory-map a local uncompressed one, so that skipping batches costs nothing."""
    import pyarrow

    if stream.compression or storage.is_remote(stream.path):
        with stream.open_seekable() as file:
            yield pyarrow.PythonFile(file, mode="r")
        return
    with stream.open() as file:
        is_empty = not file.seek(0, os.SEEK_END)
    with pyarrow.BufferReader(b"") if is_empty else pyarrow.memory_map(storage.local_path(stream.path)) as mapped:
        yield mapped


def _arrow_batches(file: Any) -> tuple[Any, Iterator[Any], bool]:
    """Return the schema, the record batches, and whether the end marker of a stream is missing."""
    import pyarrow

    file.seek(0)
    if file.read(6) == b"ARROW1":
        table = pyarrow.ipc.open_file(file)
        return table.schema, (table.get_batch(number) for number in range(table.num_record_batches)), False
    file.seek(max(file.size() - len(_STREAM_END), 0))
    is_truncated = file.read() != _STREAM_END
    file.seek(0)
    reader = pyarrow.ipc.open_stream(file)
    return reader.schema, iter(reader), is_truncated


def _group(url: str, sizes: list[int], num_bytes: int, unit_bytes: int) -> list[Piece]:
    """Group consecutive row groups or batches, given their sizes in memory, into pieces of at least one each."""
    total = max(sum(sizes), 1)
    ends = [0]
    filled = 0
    for number, size in enumerate(sizes, 1):
        filled += size * num_bytes // total
        if filled >= unit_bytes or number == len(sizes):
            ends.append(number)
            filled = 0
    piece_bytes = [sum(sizes[a:b]) * num_bytes // total for a, b in pairwise(ends)]
    return [Piece(url, a, b, size) for (a, b), size in zip(pairwise(ends), piece_bytes, strict=True)]


def _column_path(stream: InputStream, schema: Any, key: str) -> list[str]:
    """Return the path of the text: the column named `key`, or the field that its dots lead to.

    Raises BrokenFile if there is no such column or if it does not hold text.
    """
    from pyarrow import types

    key = key.removeprefix("json:")
    path = [key] if key in schema.names else key.split(".")
    kind = schema
    for part in path:
        is_container = kind is schema or types.is_struct(kind)
        index = kind.get_field_index(part) if is_container else -1
        if index < 0:
            names = ", ".join(schema.names[:20])
            message = f'{stream.path}: found no column "{key}"; the columns are {names}; check --content_key'
            raise BrokenFile("missing key", message)
        kind = kind.field(index).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(test(value) for test in tests):
        message = f'{stream.path}: column "{key}" has type {kind}, expected text; check --content_key'
        raise BrokenFile("wrong type", message)
    return path


def _blocks(stream: InputStream, batches: Iterator[tuple[Any, int]], path: list[str]) -> Iterator[Block]:
    """Yield the texts of (record batch, input bytes that it accounts for) pairs; without a path, complete records."""
    num_seen = 0
    for batch, num_bytes in batches:
        rows = batch
        if stream.row_range:
            first, last = stream.row_range
            rows = batch.slice(max(first - num_seen, 0), max(last - max(num_seen, first), 0))
        num_seen += len(batch)
        column = _column(rows, path) if path else rows
        step = min(max(_BLOCK_BYTES * len(column) // (column.nbytes + 1), 1), _BLOCK_ROWS)
        for first_row in range(0, len(column), step):
            part = column.slice(first_row, step)
            yield _text_block(stream, part) if path else _record_block(stream, part)
        stream.bytes_read += num_bytes
        if stream.row_range and num_seen >= stream.row_range[1]:
            return


def _column(batch: Any, path: list[str]) -> Any:
    import pyarrow.compute

    column = batch.column(batch.schema.get_field_index(path[0]))
    for part in path[1:]:
        column = pyarrow.compute.struct_field(column, part)
    return column


def _record_block(stream: InputStream, rows: Any) -> Block:
    """Return the rows of a record batch as records; values that JSON does not have become text."""
    first = stream.lines + 1
    stream.lines += len(rows)
    records: list[Document] = []
    bad: list[BadDocument] = []
    for number, row in enumerate(rows.to_pylist(), first):
        try:
            records.append(Record(orjson.dumps(row, default=str).decode("utf-8"), number))
        except TypeError as error:  # such as invalid UTF-8
            bad.append(stream.bad_document("no JSON", number, str(error)))
    return stream.block(records, bad)


def _text_block(stream: InputStream, column: Any) -> Block:
    import pyarrow

    first = stream.lines + 1
    stream.lines += len(column)
    try:
        values = column.to_pylist()
        if set(map(type, values)) <= {str}:
            return stream.block(values)
    except UnicodeDecodeError:
        values = column.cast(pyarrow.large_binary()).to_pylist()
    documents: list[Document] = []
    bad: list[BadDocument] = []
    for row, value in enumerate(values, first):
        try:
            if value is None:
                bad.append(stream.bad_document("null", row, "the row has no text"))
            else:
                documents.append(value if isinstance(value, str) else value.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad.append(stream.bad_document("invalid UTF-8", row, describe_invalid_utf8(error), value))
    return stream.block(documents, bad)


@contextlib.contextmanager
def _pyarrow_errors(stream: InputStream) -> Iterator[None]:
    """Convert errors of pyarrow to BrokenFile."""
    from pyarrow import ArrowException

    try:
        yield
    except (StorageError, BrokenFile):
        raise
    except (ArrowException, OSError) as error:
        raise BrokenFile("damaged", f"{stream.path}: cannot be read as Parquet or Arrow ({error})") from error


register_format(Format(read_parquet, split=split_parquet, count=count_parquet, hub_builder="parquet"), ".parquet")
register_format(Format(read_arrow, split=split_arrow, count=count_arrow, hub_builder="arrow"), ".arrow")
