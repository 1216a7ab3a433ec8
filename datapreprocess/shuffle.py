"""A global shuffle of sequences in bounded memory: an external sort by pseudo-random keys.

Every sequence gets a 64-bit key that depends on the seed and on where the sequence comes from (unit of work, number in
it), on nothing else. The output order is the order of the keys, so that it is the same for any number of workers, any
memory and any interruption. Since the keys are uniform, their leading bits cut the output into buckets of like size:
units spill sorted runs that know where each bucket begins, and a writer reads the stretch of its buckets, and no more,
from every run.

Without a shuffle the order is that of the runs; then a run is one long row of ids, and sequences are cut from all runs
joined together (see `OrderedRuns`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from open_lm import storage
from open_lm.data.shard_format import PAD_ID

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_OFFSET_BYTES = 8
_REQUESTS = 16  # at a time, to remote storage
MIXED = 0xFFFF  # the source of a sequence with tokens of several sources


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 (n,) that scatters its values evenly (SplitMix64; Steele, Lea and Flood 2014)."""
    values = values.astype(np.uint64, copy=True)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def random_keys(seed: int, stream: int, start: int, count: int) -> np.ndarray:
    """The keys number start … start + count - 1 of a stream, uint64 (count,): uniform, the same on every machine."""
    base = mix(np.array([(seed + 1) * int(_GOLDEN) & _MASK], np.uint64))
    base = mix(base + np.array([(stream + 1) * int(_GOLDEN) & _MASK], np.uint64))
    return mix(base + np.arange(start + 1, start + count + 1, dtype=np.uint64) * _GOLDEN)


@dataclass(frozen=True)
class Run:
    """A spilled file. Of a shuffle: `count` sequences sorted by key. Without one: `count` ids in a row.

    source: number of the source that all tokens come from, or MIXED.
    """

    url: str
    count: int
    source: int


@dataclass(frozen=True)
class Rows:
    """Consecutive sequences of the output: ids (n, length), the source of each, uint16 (n,).

    `shares` tells the tokens of each source in the rows (by index) whose source is MIXED.
    """

    ids: np.ndarray
    sources: np.ndarray
    shares: Mapping[int, Mapping[int, int]]

    def split(self, count: int) -> tuple[Rows, Rows]:
        """The first `count` rows (or all there are), and the others."""
        return self.part(0, count), self.part(count, len(self.ids))

    def part(self, first: int, end: int) -> Rows:
        """The rows first … end - 1."""
        shares = {row - first: share for row, share in self.shares.items() if first <= row < end}
        return Rows(self.ids[first:end], self.sources[first:end], shares)


class Runs(Protocol):
    """All runs of an output, in whichever order it has."""

    @property
    def num_sequences(self) -> int: ...

    def rows(self, first: int, count: int) -> Iterator[Rows]:
        """The sequences number first … first + count - 1 of the output, a bounded number of bytes at a time."""
        ...


# --- shuffled ----------------------------------------------------------------------------------------------------


def record_dtype(length: int, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A sequence in a sorted run: its key, then its ids."""
    return np.dtype([("key", "<u8"), ("ids", dtype.newbyteorder("<"), (length,))])


class ShuffledRunWriter:
    """Collects the sequences of one unit of work and spills them as sorted runs of at most about `run_bytes`.

    `name` is a template with one field for the run's number. Runs appear whole, each in a file of its own: first the
    number of the first record of every bucket and the count after the last, int64 (buckets + 1,), then the records.
    """

    def __init__(self, name: str, *, stream: int, seed: int, source: int, buckets: int, run_bytes: int) -> None:
        self._name, self._stream, self._seed, self._source = name, stream, seed, source
        self._edges = bucket_edges(buckets)
        self._run_bytes = run_bytes
        self._blocks: list[np.ndarray] = []
        self._bytes = 0
        self.count = 0
        self.runs: list[Run] = []

    def add(self, sequences: np.ndarray) -> None:
        """Take sequences (n, length)."""
        if len(sequences):
            self._blocks.append(sequences)
            self._bytes += sequences.nbytes
            if self._bytes >= self._run_bytes:
                self.flush()

    def flush(self) -> None:
        """Spill what is held."""
        if not self._blocks:
            return
        count = sum(map(len, self._blocks))
        keys = random_keys(self._seed, self._stream, self.count, count)
        order = np.argsort(keys, kind="stable")
        records = np.empty(count, record_dtype(self._blocks[0].shape[1], self._blocks[0].dtype))
        records["key"] = keys[order]
        places = np.empty(count, np.int64)  # where each held sequence goes
        places[order] = np.arange(count)
        start = 0
        for block in self._blocks:
            records["ids"][places[start : start + len(block)]] = block
            start += len(block)
        self._blocks, self._bytes = [], 0
        run = Run(self._name.format(len(self.runs)), count, self._source)
        offsets = np.append(np.searchsorted(records["key"], self._edges, side="left"), count).astype(np.int64)
        with storage.atomic_write(run.url, "wb") as file:
            file.write(offsets.data)
            file.write(records.view(np.uint8).data)
        self.count += count
        self.runs.append(run)


def bucket_edges(buckets: int) -> np.ndarray:
    """The smallest key of each bucket, uint64 (buckets,); `buckets` is a power of two."""
    return np.arange(buckets, dtype=np.uint64) << np.uint64(64 - (buckets.bit_length() - 1))


def bucket_counts(runs: Sequence[Run], buckets: int) -> np.ndarray:
    """How many sequences of the runs fall into each bucket, int64 (buckets,)."""
    counts = np.zeros(buckets, np.int64)
    for run in runs:
        offsets = np.frombuffer(storage.read_range(run.url, 0, (buckets + 1) * _OFFSET_BYTES), np.int64)
        counts += offsets[1:] - offsets[:-1]
    return counts


@dataclass(frozen=True)
class ShuffledRuns:
    """Sorted runs as one output in the order of the keys.

    counts: sequences in each bucket, int64 (buckets,), from `bucket_counts`.
    shares: tokens of each source in sequences whose run says MIXED, by key.
    part_bytes: about how many bytes of sequences are held at a time.
    """

    runs: tuple[Run, ...]
    counts: np.ndarray
    length: int
    dtype: np.dtype[Any]
    shares: Mapping[int, Mapping[int, int]]
    part_bytes: int

    @property
    def num_sequences(self) -> int:
        return int(self.counts.sum())

    def rows(self, first: int, count: int) -> Iterator[Rows]:
        ends = np.cumsum(self.counts)
        bucket = int(np.searchsorted(ends, first, side="right"))
        last = int(np.searchsorted(ends, first + count, side="left"))
        offsets = self._offsets(bucket, last + 1)
        limit = max(1, self.part_bytes // self._record.itemsize)
        base = bucket
        while bucket <= last:
            before = int(ends[bucket] - self.counts[bucket])
            end = max(bucket + 1, min(last + 1, int(np.searchsorted(ends, before + limit, side="right"))))
            part = self._part(offsets[:, [bucket - base, end - base]])
            yield part.part(max(0, first - before), min(len(part.ids), first + count - before))
            bucket = end

    @property
    def _record(self) -> np.dtype[Any]:
        return record_dtype(self.length, self.dtype)

    def _offsets(self, first: int, last: int) -> np.ndarray:
        """The number of the first record of buckets first … last in each run, int64 (runs, last - first + 1)."""
        offsets = np.empty((len(self.runs), last - first + 1), np.int64)
        _read_all((run, first * _OFFSET_BYTES, row) for run, row in zip(self.runs, offsets, strict=True))
        return offsets

    def _part(self, bounds: np.ndarray) -> Rows:
        """The records [first, last) of every run, bounds int64 (runs, 2), in the order of their keys."""
        counts = bounds[:, 1] - bounds[:, 0]
        ends = np.cumsum(counts)
        records = np.empty(int(ends[-1]), self._record)
        sources = np.repeat(np.array([run.source for run in self.runs], np.uint16), counts)
        header = (len(self.counts) + 1) * _OFFSET_BYTES
        _read_all(
            (run, header + start * self._record.itemsize, records[end - count : end])
            for run, start, count, end in zip(
                self.runs, bounds[:, 0].tolist(), counts.tolist(), ends.tolist(), strict=True
            )
            if count
        )
        order = np.argsort(records["key"], kind="stable")
        sources = sources[order]
        mixed = np.flatnonzero(sources == MIXED)
        shares = {int(row): self.shares[int(records["key"][order[row]])] for row in mixed}
        return Rows(records["ids"][order], sources, shares)


# --- in the order of the input -----------------------------------------------------------------------------------


class OrderedRunWriter:
    """Collects the ids of one unit of work, in their order, and spills them as runs of about `run_bytes`."""

    def __init__(self, name: str, *, source: int, run_bytes: int) -> None:
        self._name, self._source, self._run_bytes = name, source, run_bytes
        self._blocks: list[np.ndarray] = []
        self._bytes = 0
        self.runs: list[Run] = []

    def add(self, ids: np.ndarray) -> None:
        """Take ids of any shape, in C order."""
        self._blocks.append(ids.reshape(-1))
        self._bytes += ids.nbytes
        if self._bytes >= self._run_bytes:
            self.flush()

    def flush(self) -> None:
        """Spill what is held."""
        if not self._bytes:
            return
        run = Run(self._name.format(len(self.runs)), sum(map(len, self._blocks)), self._source)
        with storage.atomic_write(run.url, "wb") as file:
            for block in self._blocks:
                file.write(np.ascontiguousarray(block).view(np.uint8).data)
        self._blocks, self._bytes = [], 0
        self.runs.append(run)


@dataclass(frozen=True)
class OrderedRuns:
    """Runs of ids joined in their order and cut into sequences; what fills none at the end is `tail()`."""

    runs: tuple[Run, ...]
    length: int
    dtype: np.dtype[Any]
    part_bytes: int

    @property
    def num_sequences(self) -> int:
        return sum(run.count for run in self.runs) // self.length

    def tail(self) -> tuple[np.ndarray, dict[int, int]]:
        """The ids after the last sequence, and how many come from each source."""
        first = self.num_sequences * self.length
        return self._ids(first, sum(run.count for run in self.runs) - first)

    def rows(self, first: int, count: int) -> Iterator[Rows]:
        step = max(1, self.part_bytes // (self.length * self.dtype.itemsize))
        for start in range(first, first + count, step):
            number = min(step, first + count - start)
            ids, _ = self._ids(start * self.length, number * self.length)
            yield self._attributed(ids.reshape(number, self.length), start * self.length)

    def _ids(self, first: int, count: int) -> tuple[np.ndarray, dict[int, int]]:
        """The ids number first … first + count - 1, and how many of them come from each source."""
        ids = np.empty(count, self.dtype)
        shares: dict[int, int] = {}
        for run, offset, begin, end in self._overlaps(first, count):
            _read_piece((run, offset * self.dtype.itemsize, ids[begin:end]))
            shares[run.source] = shares.get(run.source, 0) + end - begin
        return ids, shares

    def _attributed(self, ids: np.ndarray, first: int) -> Rows:
        """Whose tokens the rows (n, length) are, the first of which begins at id number `first`."""
        sources = np.empty(len(ids), np.uint16)
        shares: dict[int, dict[int, int]] = {}
        for run, _, begin, end in self._overlaps(first, ids.size):
            whole, after = -(-begin // self.length), end // self.length
            sources[whole:after] = run.source
            for row in {begin // self.length, end // self.length} - set(range(whole, after)):
                part = ids.reshape(-1)[max(begin, row * self.length) : min(end, (row + 1) * self.length)]
                if part.size:
                    sources[row] = MIXED
                    share = shares.setdefault(row, {})
                    share[run.source] = share.get(run.source, 0) + int(np.count_nonzero(part != PAD_ID))
        return Rows(ids, sources, shares)

    def _overlaps(self, first: int, count: int) -> Iterator[tuple[Run, int, int, int]]:
        """The runs that hold some of the ids [first, first + count): where in the run these begin, which they are."""
        ends = np.cumsum([run.count for run in self.runs])
        for index in range(int(np.searchsorted(ends, first, side="right")), len(self.runs)):
            run = self.runs[index]
            start = int(ends[index]) - run.count
            begin, end = max(start - first, 0), min(start + run.count - first, count)
            if begin >= count:
                return
            if begin < end:
                yield run, first + begin - start, begin, end


def _read_all(pieces: Iterable[tuple[Run, int, np.ndarray]]) -> None:
    """Fill each array from its run's file, from a byte on; remote ones many at a time, since each has to wait."""
    local: list[tuple[Run, int, np.ndarray]] = []
    remote: list[tuple[Run, int, np.ndarray]] = []
    for piece in pieces:
        (remote if storage.is_remote(piece[0].url) else local).append(piece)
    for piece in local:
        _read_piece(piece)
    if remote:
        with ThreadPoolExecutor(min(len(remote), _REQUESTS)) as pool:
            list(pool.map(_read_piece, remote))


def _read_piece(piece: tuple[Run, int, np.ndarray]) -> None:
    run, offset, target = piece
    target[:] = np.frombuffer(storage.read_range(run.url, offset, target.nbytes), target.dtype)
