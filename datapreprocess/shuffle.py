"""Shuffle all sequences of a data set in bounded memory, with an external sort by pseudo-random keys.

Each sequence has a 64-bit key that depends only on the seed and on the origin of the sequence (its unit of work and
its number in the unit). The output is in key order, so it does not depend on the number of workers, the memory limit
or interruptions. Since keys are uniform, their leading bits divide the output into buckets of about the same size:
units spill sorted runs that record where each bucket starts, and a writer reads only its buckets from every run.

Without shuffling the output is in run order. A run is then a flat array of ids, and sequences are cut from the
concatenation of all runs (see `OrderedRuns`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from open_lm import storage
from open_lm.data.shard_format import GOLDEN_GAMMA, PAD_ID, splitmix64

_MASK = (1 << 64) - 1
_OFFSET_BYTES = 8
_MAX_PARALLEL_REQUESTS = 16  # to remote storage
MIXED = 0xFFFF  # source number of a sequence with tokens of several sources


def random_keys(seed: int, stream: int, start: int, count: int) -> np.ndarray:
    """Return keys start … start + count - 1 of a stream, uint64 (count,): uniform and the same on every machine."""
    base = splitmix64(np.array([(seed + 1) * GOLDEN_GAMMA & _MASK], np.uint64))
    base = splitmix64(base + np.array([(stream + 1) * GOLDEN_GAMMA & _MASK], np.uint64))
    return splitmix64(base + np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA))


@dataclass(frozen=True)
class Run:
    """A spilled file: `count` sequences sorted by key if shuffled, otherwise `count` ids in input order.

    source: number of the source of all tokens, or MIXED.
    """

    url: str
    count: int
    source: int


def run_url(prefix: str, number: int) -> str:
    """Return the path of run number `number` of a writer."""
    return f"{prefix}-{number:04d}.run"


@dataclass(frozen=True)
class SequenceBlock:
    """Consecutive sequences of the output.

    ids: (n, length).
    sources: source number of each sequence, uint16 (n,).
    mixed_tokens: for each sequence whose source is MIXED, by its index: the number of tokens by source number.
    """

    ids: np.ndarray
    sources: np.ndarray
    mixed_tokens: Mapping[int, Mapping[int, int]]

    def split(self, count: int) -> tuple[SequenceBlock, SequenceBlock]:
        """Return the first `count` sequences (or all, if there are fewer) and the remaining ones."""
        return self.slice(0, count), self.slice(count, len(self.ids))

    def slice(self, first: int, end: int) -> SequenceBlock:
        """Return the sequences first … end - 1."""
        mixed_tokens = {index - first: tokens for index, tokens in self.mixed_tokens.items() if first <= index < end}
        return SequenceBlock(self.ids[first:end], self.sources[first:end], mixed_tokens)


class Runs(Protocol):
    """All runs of an output, read in output order."""

    @property
    def num_sequences(self) -> int: ...

    def blocks(self, first: int, count: int) -> Iterator[SequenceBlock]:
        """Yield the sequences first … first + count - 1 of the output in blocks of bounded size."""
        ...


# --- shuffled ----------------------------------------------------------------------------------------------------


def record_dtype(length: int, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a sequence in a sorted run: its key, then its ids."""
    return np.dtype([("key", "<u8"), ("ids", dtype.newbyteorder("<"), (length,))])


class ShuffledRunWriter:
    """A writer that buffers the sequences of one unit and spills them as sorted runs of about `run_bytes` each.

    `prefix` is the beginning of the paths of the runs. Each run is one file, written atomically. It starts with the
    index of the first record of every bucket and the number of records, int64 (buckets + 1,), followed by the records.
    """

    def __init__(self, prefix: str, *, stream: int, seed: int, source: int, buckets: int, run_bytes: int) -> None:
        self._prefix, self._stream, self._seed, self._source = prefix, stream, seed, source
        self._edges = bucket_edges(buckets)
        self._run_bytes = run_bytes
        self._blocks: list[np.ndarray] = []
        self._bytes = 0
        self.count = 0
        self.runs: list[Run] = []

    def add(self, sequences: np.ndarray) -> None:
        """Add sequences (n, length)."""
        if len(sequences):
            self._blocks.append(sequences)
            self._bytes += sequences.nbytes
            if self._bytes >= self._run_bytes:
                self.flush()

    def flush(self) -> None:
        """Spill the buffered sequences."""
        if not self._blocks:
            return
        count = sum(map(len, self._blocks))
        keys = random_keys(self._seed, self._stream, self.count, count)
        order = np.argsort(keys, kind="stable")
        records = np.empty(count, record_dtype(self._blocks[0].shape[1], self._blocks[0].dtype))
        records["key"] = keys[order]
        targets = np.empty(count, np.int64)  # index in `records` of each buffered sequence
        targets[order] = np.arange(count)
        start = 0
        for block in self._blocks:
            records["ids"][targets[start : start + len(block)]] = block
            start += len(block)
        self._blocks, self._bytes = [], 0
        run = Run(run_url(self._prefix, len(self.runs)), count, self._source)
        offsets = np.append(np.searchsorted(records["key"], self._edges, side="left"), count).astype(np.int64)
        with storage.atomic_write(run.url, "wb") as file:
            file.write(offsets.data)
            file.write(records.view(np.uint8).data)
        self.count += count
        self.runs.append(run)


def bucket_edges(buckets: int) -> np.ndarray:
    """Return the smallest key of each bucket, uint64 (buckets,); `buckets` is a power of two."""
    return np.arange(buckets, dtype=np.uint64) << np.uint64(64 - (buckets.bit_length() - 1))


def bucket_counts(runs: Sequence[Run], buckets: int) -> np.ndarray:
    """Return the number of sequences of all runs in each bucket, int64 (buckets,)."""
    counts = np.zeros(buckets, np.int64)
    for run in runs:
        offsets = np.frombuffer(storage.read_range(run.url, 0, (buckets + 1) * _OFFSET_BYTES), np.int64)
        counts += offsets[1:] - offsets[:-1]
    return counts


@dataclass(frozen=True)
class ShuffledRuns:
    """Sorted runs, merged into one output in key order.

    counts: sequences in each bucket, int64 (buckets,), from `bucket_counts`.
    mixed_tokens: for each sequence of a run whose source is MIXED, by its key: the number of tokens by source number.
    block_bytes: approximate size of the sequences in memory at a time.
    """

    runs: tuple[Run, ...]
    counts: np.ndarray
    length: int
    dtype: np.dtype[Any]
    mixed_tokens: Mapping[int, Mapping[int, int]]
    block_bytes: int

    @property
    def num_sequences(self) -> int:
        return int(self.counts.sum())

    def blocks(self, first: int, count: int) -> Iterator[SequenceBlock]:
        ends = np.cumsum(self.counts)
        bucket = int(np.searchsorted(ends, first, side="right"))
        last = int(np.searchsorted(ends, first + count, side="left"))
        offsets = self._offsets(bucket, last + 1)
        limit = max(1, self.block_bytes // self._record.itemsize)
        base = bucket
        while bucket <= last:
            before = int(ends[bucket] - self.counts[bucket])
            end = max(bucket + 1, min(last + 1, int(np.searchsorted(ends, before + limit, side="right"))))
            block = self._merge(offsets[:, [bucket - base, end - base]])
            yield block.slice(max(0, first - before), min(len(block.ids), first + count - before))
            bucket = end

    @property
    def _record(self) -> np.dtype[Any]:
        return record_dtype(self.length, self.dtype)

    def _offsets(self, first: int, last: int) -> np.ndarray:
        """Return the index of the first record of buckets first … last in each run, int64 (runs, last - first + 1)."""
        offsets = np.empty((len(self.runs), last - first + 1), np.int64)
        _read_all((run, first * _OFFSET_BYTES, row) for run, row in zip(self.runs, offsets, strict=True))
        return offsets

    def _merge(self, bounds: np.ndarray) -> SequenceBlock:
        """Return the records [first, last) of every run, given by bounds int64 (runs, 2), in key order."""
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
        mixed_tokens = {int(index): self.mixed_tokens[int(records["key"][order[index]])] for index in mixed}
        return SequenceBlock(records["ids"][order], sources, mixed_tokens)


# --- in input order ----------------------------------------------------------------------------------------------


class OrderedRunWriter:
    """A writer that buffers the ids of one unit in their order and spills them as runs of about `run_bytes` each."""

    def __init__(self, prefix: str, *, source: int, run_bytes: int) -> None:
        self._prefix, self._source, self._run_bytes = prefix, source, run_bytes
        self._blocks: list[np.ndarray] = []
        self._bytes = 0
        self.runs: list[Run] = []

    def add(self, ids: np.ndarray) -> None:
        """Add ids of any shape, flattened in C order."""
        self._blocks.append(ids.reshape(-1))
        self._bytes += ids.nbytes
        if self._bytes >= self._run_bytes:
            self.flush()

    def flush(self) -> None:
        """Spill the buffered ids."""
        if not self._bytes:
            return
        run = Run(run_url(self._prefix, len(self.runs)), sum(map(len, self._blocks)), self._source)
        with storage.atomic_write(run.url, "wb") as file:
            for block in self._blocks:
                file.write(np.ascontiguousarray(block).view(np.uint8).data)
        self._blocks, self._bytes = [], 0
        self.runs.append(run)


@dataclass(frozen=True)
class OrderedRuns:
    """Runs of ids, concatenated in order and cut into sequences; `tail()` returns the ids after the last sequence."""

    runs: tuple[Run, ...]
    length: int
    dtype: np.dtype[Any]
    block_bytes: int

    @property
    def num_sequences(self) -> int:
        return sum(run.count for run in self.runs) // self.length

    def tail(self) -> tuple[np.ndarray, dict[int, int]]:
        """Return the ids after the last sequence and their number by source number."""
        first = self.num_sequences * self.length
        return self._ids(first, sum(run.count for run in self.runs) - first)

    def blocks(self, first: int, count: int) -> Iterator[SequenceBlock]:
        step = max(1, self.block_bytes // (self.length * self.dtype.itemsize))
        for start in range(first, first + count, step):
            number = min(step, first + count - start)
            ids, _ = self._ids(start * self.length, number * self.length)
            yield self._with_sources(ids.reshape(number, self.length), start * self.length)

    def _ids(self, first: int, count: int) -> tuple[np.ndarray, dict[int, int]]:
        """Return the ids first … first + count - 1 and their number by source number."""
        ids = np.empty(count, self.dtype)
        tokens_by_source: dict[int, int] = {}
        for run, offset, start, end in self._overlaps(first, count):
            _read_piece((run, offset * self.dtype.itemsize, ids[start:end]))
            tokens_by_source[run.source] = tokens_by_source.get(run.source, 0) + end - start
        return ids, tokens_by_source

    def _with_sources(self, ids: np.ndarray, first: int) -> SequenceBlock:
        """Determine the sources of the sequences (n, length), which start at id number `first` of the output."""
        sources = np.empty(len(ids), np.uint16)
        mixed_tokens: dict[int, dict[int, int]] = {}
        for run, _, start, end in self._overlaps(first, ids.size):
            first_full, end_full = -(-start // self.length), end // self.length
            sources[first_full:end_full] = run.source
            for index in {start // self.length, end // self.length} - set(range(first_full, end_full)):
                part = ids.reshape(-1)[max(start, index * self.length) : min(end, (index + 1) * self.length)]
                if part.size:
                    sources[index] = MIXED
                    tokens = mixed_tokens.setdefault(index, {})
                    tokens[run.source] = tokens.get(run.source, 0) + int(np.count_nonzero(part != PAD_ID))
        return SequenceBlock(ids, sources, mixed_tokens)

    def _overlaps(self, first: int, count: int) -> Iterator[tuple[Run, int, int, int]]:
        """Yield (run, offset in the run, start, end) for each run that overlaps the ids [first, first + count).

        The ids [start, end), counted from `first`, are in the run from `offset` on.
        """
        run_ends = np.cumsum([run.count for run in self.runs])
        for index in range(int(np.searchsorted(run_ends, first, side="right")), len(self.runs)):
            run = self.runs[index]
            run_start = int(run_ends[index]) - run.count
            start, end = max(run_start - first, 0), min(run_start + run.count - first, count)
            if start >= count:
                return
            if start < end:
                yield run, first + start - run_start, start, end


def _read_all(pieces: Iterable[tuple[Run, int, np.ndarray]]) -> None:
    """Fill each array from the given byte offset of its run; read remote runs in parallel to hide the latency."""
    local: list[tuple[Run, int, np.ndarray]] = []
    remote: list[tuple[Run, int, np.ndarray]] = []
    for piece in pieces:
        (remote if storage.is_remote(piece[0].url) else local).append(piece)
    for piece in local:
        _read_piece(piece)
    if remote:
        with ThreadPoolExecutor(min(len(remote), _MAX_PARALLEL_REQUESTS)) as pool:
            list(pool.map(_read_piece, remote))


def _read_piece(piece: tuple[Run, int, np.ndarray]) -> None:
    run, offset, target = piece
    target[:] = np.frombuffer(storage.read_range(run.url, offset, target.nbytes), target.dtype)
