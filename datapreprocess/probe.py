"""Probes: read and encode small samples of the inputs, at positions spread evenly over all bytes.

A probe of a splittable file is a piece from anywhere in it; of other files it is the beginning.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from open_lm import storage
from open_lm.data.shard_format import encode_member
from open_lm.datapreprocess.inputs import InputFile
from open_lm.datapreprocess.job import PreprocessJob
from open_lm.datapreprocess.readers import (
    TO_END,
    Block,
    BrokenFile,
    Chunk,
    ChunkReader,
    Piece,
    PieceReader,
    ReadOptions,
    can_stream,
    separator_of,
    split,
    split_suffixes,
)
from open_lm.datapreprocess.readers.base import CUT_SHORT
from open_lm.datapreprocess.readers.compression import decompress
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import DataError

_PIECE_BYTES = 256 << 10  # input bytes read at one position
_STEP_BYTES = 4 << 10
_MIN_BLOCKS = 3  # blocks to read of a piece that is not read to its end
_TAR_BLOCK = 512


@dataclass
class Probe:
    """Measurements at one position of the inputs.

    Attributes:
        documents, tokens, bad: counts of documents, of tokens, and of bad documents.
        read: input bytes read.
        represents: input bytes that the counts account for. Readers read ahead, so this may be less than `read`.
        seconds: CPU time for reading and encoding.
        is_beginning: whether the file continues, but could only be read from its start.
        member_bytes: sizes of sample sequences as members of a shard.
        problem: why the input could not be read further.
    """

    documents: int = 0
    tokens: int = 0
    bad: int = 0
    read: int = 0
    represents: float = 0.0
    seconds: float = 0.0
    is_beginning: bool = False
    member_bytes: list[int] = field(default_factory=list)
    problem: str | None = None


def probe_files(
    files: Sequence[InputFile], budget: float, offset: float, job: PreprocessJob, encoder: DocumentEncoder
) -> list[Probe]:
    """Read about `budget` bytes, at positions spread evenly over all bytes of the files, and encode them.

    At least one position is read. Reading from the beginning of a file continues until a line ends.

    Args:
        offset: the first position, as a fraction (below 1) of the distance between positions.
    """
    probes = []
    for item, offsets in _positions(files, budget, offset):
        for probe, blocks in _open_probes(item, offsets, job.options):
            try:
                _encode(probe, blocks, job, encoder)
            except DataError as error:
                probe.problem = str(error)
            probes.append(probe)
    return probes


def _positions(files: Sequence[InputFile], budget: float, offset: float) -> Iterator[tuple[InputFile, list[int]]]:
    """Yield files, each with the offsets at which to read it."""
    ends = list(accumulate(item.num_bytes for item in files))
    if budget >= ends[-1]:
        yield from ((item, list(range(0, item.num_bytes, _PIECE_BYTES))) for item in files if item.num_bytes)
        return
    count = max(1, int(budget / _PIECE_BYTES))
    selected: dict[int, list[int]] = {}
    for number in range(count):
        position = min(int((number + offset) * ends[-1] / count), ends[-1] - 1)
        index = bisect_right(ends, position)
        selected.setdefault(index, []).append(position - (ends[index] - files[index].num_bytes))
    for index, offsets in selected.items():
        yield files[index], offsets


def _open_probes(
    item: InputFile, offsets: Sequence[int], options: ReadOptions
) -> Iterator[tuple[Probe, Iterable[Block]]]:
    """Yield the probes of a file, each with the blocks to encode; iterating over the blocks updates the probe."""
    if split_suffixes(item.url)[0] and can_stream(item.url, options):
        probe = Probe()
        yield probe, _read_beginning(item, len(offsets) * _PIECE_BYTES, options, probe)
        return
    pieces = split(item.url, item.num_bytes, _PIECE_BYTES)
    ends = list(accumulate(piece.num_bytes for piece in pieces))
    indices = [min(bisect_right(ends, offset), len(pieces) - 1) for offset in offsets]
    for index in sorted(set(indices)):
        probe = Probe()
        yield probe, _read_piece(pieces[index], indices.count(index) * _PIECE_BYTES, options, probe)


def _read_piece(piece: Piece, limit: int, options: ReadOptions, probe: Probe) -> Iterator[Block]:
    """Yield the blocks of a piece until `limit` bytes of it are read.

    Readers read ahead of the documents that they return. The text per input byte is therefore measured on the blocks
    after the first one.
    """
    blocks = iter(PieceReader(piece, options))
    number = length = first_length = first_bytes = 0
    while True:
        with _timed(probe):
            block = next(blocks, None)
        if block is None:
            probe.read, probe.represents = piece.num_bytes, float(piece.num_bytes)
            return
        length += sum(map(len, block.documents))
        if not number:
            first_length, first_bytes = length, block.bytes_read
        number += 1
        probe.read = block.bytes_read
        probe.represents = float(block.bytes_read)
        yield block
        is_measurable = number >= _MIN_BLOCKS and block.bytes_read > first_bytes and length > first_length
        if is_measurable and limit <= block.bytes_read < piece.num_bytes:
            probe.represents = length * (block.bytes_read - first_bytes) / (length - first_length)
            probe.is_beginning = piece.end == TO_END
            return


def _read_beginning(item: InputFile, limit: int, options: ReadOptions, probe: Probe) -> Iterator[Block]:
    """Yield the complete lines (or texts) in the first `limit` bytes of a compressed file."""
    separator = separator_of(item.url, options)
    assert separator is not None, "only files with separators can be streamed"
    with _timed(probe):
        content, probe.read, expansion = _decompress_head(item, split_suffixes(item.url)[0], separator, limit)
    if probe.read >= item.num_bytes:
        probe.represents = float(item.num_bytes)
    else:
        probe.is_beginning = True
        content = content[: content.rfind(separator) + len(separator)]
        probe.represents = len(content) / expansion
    with _timed(probe):
        blocks = list(ChunkReader(Chunk(0, content, 1), item.url, options))
    yield from blocks


def _decompress_head(item: InputFile, compression: str, separator: bytes, limit: int) -> tuple[bytes, int, float]:
    """Return the decompressed bytes, the number of compressed bytes read, and the expansion ratio.

    The beginning of a file compresses worse than the rest, and compressed blocks are emitted late. The ratio is
    therefore measured on the second half, between points where a block was emitted.
    """
    parts: list[bytes] = []
    marks = [(0, 0)]  # compressed bytes read, decompressed bytes emitted
    position = 0
    has_separator = False

    def read_steps() -> Iterator[bytes]:
        nonlocal position
        with storage.open_file(item.url) as file:
            while (position < limit or len(marks) < 3 or not has_separator) and (data := file.read(_STEP_BYTES)):
                position += len(data)
                yield data

    try:
        for part in decompress(read_steps(), compression, item.url):
            tail = parts[-1][1 - len(separator) :] if parts else b""
            has_separator = has_separator or separator in tail + part
            parts.append(part)
            marks.append((position, marks[-1][1] + len(part)))
    except BrokenFile as error:
        if error.kind != CUT_SHORT or position >= item.num_bytes:  # otherwise reading stopped at the limit
            raise
    (end, length), (start, length_before) = marks[-1], marks[(len(marks) - 1) // 2]
    return b"".join(parts), position, (length - length_before) / max(1, end - start)


@contextlib.contextmanager
def _timed(probe: Probe) -> Iterator[None]:
    """Add the seconds that one processor needs: the elapsed time, or the processor time of several threads."""
    wall_s, processor_s = time.perf_counter(), time.process_time()
    yield
    probe.seconds += max(time.perf_counter() - wall_s, time.process_time() - processor_s)


def _encode(probe: Probe, blocks: Iterable[Block], job: PreprocessJob, encoder: DocumentEncoder) -> None:
    """Encode the blocks and add the counts to the probe."""
    for block in blocks:
        probe.bad += len(block.bad)
        if not block.documents:
            continue
        with _timed(probe):
            ids = encoder.encode(block.documents).ids
        probe.documents += len(block.documents)
        probe.tokens += len(ids)
        if len(ids):
            member = encode_member(np.resize(ids, job.length), job.kind, encoder.dtype)
            probe.member_bytes.append(_TAR_BLOCK + -(-len(member) // _TAR_BLOCK) * _TAR_BLOCK)
