"""Probes: what a little of the inputs holds, at points spread over all of them.

Where a format can be cut, a probe is a piece from anywhere in a file; of other files it is the beginning.
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
    FORMATS,
    TO_END,
    Block,
    BrokenFile,
    Piece,
    PieceReader,
    ReadOptions,
    Chunk,
    ChunkReader,
    can_stream,
    split,
    split_suffixes,
)
from open_lm.datapreprocess.readers.compression import decompressed
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import DataError

_PIECE_BYTES = 256 << 10  # input read at one point
_STEP_BYTES = 4 << 10
_LEAST_BLOCKS = 3  # of a piece that is not read to its end
_TAR_BLOCK = 512


@dataclass
class Probe:
    """What was found at one place: counts, seconds of reading and encoding, sizes that sequences have in a shard.

    read: input bytes that were read. stands_for: bytes of input that hold as much, as the file goes on.
    beginning: the file goes on, and could not be read but from its start. problem: why it cannot be read further.
    """

    documents: int = 0
    tokens: int = 0
    bad: int = 0
    read: int = 0
    stands_for: float = 0.0
    seconds: float = 0.0
    beginning: bool = False
    member_bytes: list[int] = field(default_factory=list)
    problem: str | None = None


def probe(files: Sequence[InputFile], budget: float, draw: float, job: PreprocessJob, encoder: DocumentEncoder) -> list[Probe]:
    """Read about `budget` bytes, at even distances over all bytes of the files, and encode what they hold.

    draw: where the first place lies, as a share (below 1) of the distance. At least one place is read, and a beginning
    until a line ends in it.
    """
    probes = []
    for item, offsets in _places(files, budget, draw):
        for found, blocks in _openings(item, offsets, job.options):
            try:
                _count(found, blocks, job, encoder)
            except DataError as error:
                found.problem = str(error)
            probes.append(found)
    return probes


def _places(files: Sequence[InputFile], budget: float, draw: float) -> Iterator[tuple[InputFile, list[int]]]:
    """Files, each with the offsets in it at which to read."""
    ends = list(accumulate(item.num_bytes for item in files))
    if budget >= ends[-1]:
        yield from ((item, list(range(0, item.num_bytes, _PIECE_BYTES))) for item in files if item.num_bytes)
        return
    count = max(1, int(budget / _PIECE_BYTES))
    chosen: dict[int, list[int]] = {}
    for number in range(count):
        position = min(int((number + draw) * ends[-1] / count), ends[-1] - 1)
        index = bisect_right(ends, position)
        chosen.setdefault(index, []).append(position - (ends[index] - files[index].num_bytes))
    for index, offsets in chosen.items():
        yield files[index], offsets


def _openings(item: InputFile, offsets: Sequence[int], options: ReadOptions) -> Iterator[tuple[Probe, Iterable[Block]]]:
    """What to read of a file, each with the probe that it fills."""
    if split_suffixes(item.url)[0] and can_stream(item.url, options):
        found = Probe()
        yield found, _beginning(item, len(offsets) * _PIECE_BYTES, options, found)
        return
    pieces = split(item.url, item.num_bytes, _PIECE_BYTES)
    ends = list(accumulate(piece.num_bytes for piece in pieces))
    chosen = [min(bisect_right(ends, offset), len(pieces) - 1) for offset in offsets]
    for index in sorted(set(chosen)):
        found = Probe()
        yield found, _piece(pieces[index], chosen.count(index) * _PIECE_BYTES, options, found)


def _piece(piece: Piece, limit: int, options: ReadOptions, found: Probe) -> Iterator[Block]:
    """The blocks of a piece until `limit` bytes of it are read.

    Readers read ahead of the documents that they give, so what a byte holds is taken from what follows the first block.
    """
    blocks = iter(PieceReader(piece, options))
    number = length = first_length = first_bytes = 0
    while True:
        with _timed(found):
            block = next(blocks, None)
        if block is None:
            found.read, found.stands_for = piece.num_bytes, float(piece.num_bytes)
            return
        length += sum(map(len, block.documents))
        if not number:
            first_length, first_bytes = length, block.bytes_read
        number += 1
        found.read = block.bytes_read
        found.stands_for = float(block.bytes_read)
        yield block
        ahead = number >= _LEAST_BLOCKS and block.bytes_read > first_bytes and length > first_length
        if ahead and limit <= block.bytes_read < piece.num_bytes:
            found.stands_for = length * (block.bytes_read - first_bytes) / (length - first_length)
            found.beginning = piece.end == TO_END
            return


def _beginning(item: InputFile, limit: int, options: ReadOptions, found: Probe) -> Iterator[Block]:
    """The whole lines (or texts) in the first `limit` bytes of a compressed file."""
    compression, suffix = split_suffixes(item.url)
    separator_of = FORMATS[suffix].separator
    separator = separator_of(options) if separator_of else None
    assert separator is not None, "only what has separators can be streamed"
    with _timed(found):
        content, found.read, expansion = _head(item, compression, separator, limit)
    if found.read >= item.num_bytes:
        found.stands_for = float(item.num_bytes)
    else:
        found.beginning = True
        content = content[: content.rfind(separator) + len(separator)]
        found.stands_for = len(content) / expansion
    with _timed(found):
        blocks = list(ChunkReader(Chunk(0, content, 1), item.url, options))
    yield from blocks


def _head(item: InputFile, compression: str, separator: bytes, limit: int) -> tuple[bytes, int, float]:
    """Decompressed bytes, how many compressed ones were read for them, and how many of the first one more gives.

    Compression begins badly, for want of anything to refer to, and its blocks come out late: so the last figure is
    taken from the later half, between points where a block came out.
    """
    parts: list[bytes] = []
    marks = [(0, 0)]  # bytes read and bytes that came out of them
    position = 0
    complete = False

    def steps() -> Iterator[bytes]:
        nonlocal position
        with storage.open_file(item.url) as file:
            while (position < limit or len(marks) < 3 or not complete) and (data := file.read(_STEP_BYTES)):
                position += len(data)
                yield data

    try:
        for part in decompressed(steps(), compression, item.url):
            complete = complete or separator in (parts[-1][1 - len(separator) :] if parts else b"") + part
            parts.append(part)
            marks.append((position, marks[-1][1] + len(part)))
    except BrokenFile as error:
        if error.kind != "cut short" or position >= item.num_bytes:  # else it is we who stopped
            raise
    (end, length), (start, before) = marks[-1], marks[(len(marks) - 1) // 2]
    return b"".join(parts), position, (length - before) / max(1, end - start)


@contextlib.contextmanager
def _timed(found: Probe) -> Iterator[None]:
    """Add the seconds that one processor needs: those that pass, or more where several work at once."""
    wall, processors = time.perf_counter(), time.process_time()
    yield
    found.seconds += max(time.perf_counter() - wall, time.process_time() - processors)


def _count(found: Probe, blocks: Iterable[Block], job: PreprocessJob, encoder: DocumentEncoder) -> None:
    """Encode the blocks and fill the probe."""
    for block in blocks:
        found.bad += len(block.bad)
        if not block.documents:
            continue
        with _timed(found):
            ids = encoder.encode(block.documents).ids
        found.documents += len(block.documents)
        found.tokens += len(ids)
        if len(ids):
            member = encode_member(np.resize(ids, job.length), job.kind, encoder.dtype)
            found.member_bytes.append(_TAR_BLOCK + -(-len(member) // _TAR_BLOCK) * _TAR_BLOCK)
