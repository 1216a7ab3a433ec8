"""Read the token ids of samples: open shards, decode and check members, replace unusable sequences by filler.

Batch path: loader.py passes the samples of a global batch to a reader; next: shards.py opens the shards.

A local shard is mapped into memory. A remote one (s3://, https://, …, or a `pipe:` command) is first downloaded to a
folder that all workers of a rank share; the next shards are downloaded while the current one is read. A reader opens
nothing before its first sample, so it can be sent to a worker process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from open_lm.config.sections import DataConfig
from open_lm.data.block_shards import BlockShard, ShardPiece
from open_lm.data.fetch import FetchFolder, FetchSettings
from open_lm.data.hashing import hash_key
from open_lm.data.order import Piece, Samples, SizeOf, Source
from open_lm.data.shard_format import PAD_ID
from open_lm.data.shards import Shard, ShardStore
from open_lm.data.sources import SYNTHETIC_URL
from open_lm.data.synthetic import SyntheticReader
from open_lm.data.token_flags import ID_MASK, are_valid, as_signed, may_have_flags, stored_dtype
from open_lm.data.verify import expected_files
from open_lm.errors import DataError, StorageError

_MIN_TOLERANCE_BASE = 1000  # sequences
_MAX_SHARDS_SEARCHED = 16


@dataclass(frozen=True)
class StreamSpec:
    """The settings of a reader, as plain values that can be sent to a worker.

    `data_key` is the requested member kind (None: any). `max_broken_fraction` is the largest fraction of broken
    sequences that may become filler; if it is None, the first one is an error.
    """

    sources: tuple[Source, ...]
    seq_len: int
    vocab_size: int
    data_key: str | None
    max_broken_fraction: float | None = None
    fetch: FetchSettings = FetchSettings()

    @classmethod
    def from_config(
        cls,
        data: DataConfig,
        sources: tuple[Source, ...],
        data_key: str,
        folder: FetchFolder | None,
        *,
        seq_len: int,
        vocab_size: int,
    ) -> StreamSpec:
        max_broken_fraction = data.data_tolerate_error_p if data.ignore_parse_errors else None
        fetch = FetchSettings.from_config(data, folder.name if folder else None)
        return cls(sources, seq_len, vocab_size, data_key, max_broken_fraction, fetch)


class Notice(NamedTuple):
    """A warning for the user; log it on one rank only if every rank finds the same."""

    text: str
    same_on_all_ranks: bool


class _ReadyShard(NamedTuple):
    """An open shard, and the ids (n, seq_len + 1) of all its members, without copying them."""

    shard: Shard | BlockShard
    rows: np.ndarray
    itemsize: int  # of the ids, in bytes
    is_whole: bool  # every member is readable


class SampleReader:
    """A reader of seq_len + 1 ids for each sample, and of the sizes of shards that have no manifest."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.notices: list[Notice] = []  # each text once; the caller of `read` logs and clears them
        self.needs_prefetch = FetchFolder.is_needed(spec.sources)
        self._spare_shards = 2 * len(spec.sources) + 2
        self._num_shards = 0  # the most in a batch so far
        self._store = ShardStore(self._spare_shards, spec.fetch, expected_files(spec.sources))
        self._ready: dict[int, _ReadyShard] = {}  # by source << 40 | shard
        self._store.on_close = self._forget
        self._counts = Counter[str]()  # sequences: "read", "usable", "broken"
        self._searched_long_sequence = False
        self._has_flags = False  # whether an id read so far has flags (token_flags)
        self._last_size = 1
        self._broken_shards: set[str] = set()
        self._noticed: set[str] = set()

    def size_of(self, source: int, shard: int) -> int:
        """Open a shard and return its number of sequences; 0 for a tolerated broken shard."""
        opened = self._open(source, shard)
        if opened is None:
            self._count_broken(self._last_size)  # assume the size of the previous shard
            return 0
        self._last_size = len(opened)
        return len(opened)

    def prefetch(self, upcoming: Sequence[Piece]) -> None:
        """Start to fetch pieces of shards, the nearest first."""
        if not self.needs_prefetch or not upcoming:
            return
        pieces = [ShardPiece(self._url(piece.source, piece.shard), piece.start, piece.stop) for piece in upcoming]
        self._store.keep_open(self._num_shards + len(pieces) + self._spare_shards)
        self._store.prefetch([piece for piece in pieces if piece.url not in self._broken_shards], self.spec.data_key)

    def _url(self, source: int, shard: int) -> str:
        return self.spec.sources[source].shards[shard]

    def read(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        """Return ids (n, seq_len + 1) of the samples, and which rows hold data, bool (n,); the others are all zeros.

        The ids have `stored_dtype`, the signed one if an id is PAD_ID or has flags. A longer sequence is cropped at a
        random position that the sample's key fixes. A shorter one becomes filler, and so does a broken one if it is
        tolerated. DataError for everything else.
        """
        dtype = stored_dtype(self.spec.vocab_size, signed=self._has_flags)
        ids = np.zeros((len(samples.source), self.spec.seq_len + 1), dtype)
        codes = _codes(samples)
        self._num_shards = max(self._num_shards, len(set(codes)))
        self._store.keep_open(self._num_shards + self._spare_shards)
        filled = self._copy_ready(ids, codes, samples.member.tolist())
        self._count_usable(int(filled.sum()))
        remaining = np.flatnonzero(~filled)
        if not len(remaining):
            return ids, filled
        for ready in filter(None, map(self._ready.get, codes)):
            self._store.mark_used(ready.shard.url, self.spec.data_key)
        groups = [
            (source, shard, remaining[rows])
            for source, shard, rows in _by_shard(Samples(*(column[remaining] for column in samples)))
        ]
        if self.needs_prefetch:
            members = [(self._url(source, shard), samples.member[rows]) for source, shard, rows in groups]
            self._store.fetch([part for part in members if part[0] not in self._broken_shards], self.spec.data_key)
        for source, shard, rows in groups:
            ids = self._signed(ids) if self._has_flags else ids
            done = self._read_npy(ids, source, shard, samples, rows)
            filled[rows[done]] = True
            self._count_usable(int(done.sum()))
            for row in rows[~done].tolist():
                sequence = self._read_one(source, shard, int(samples.member[row]), int(samples.key[row]))
                if sequence is not None:
                    ids = self._signed(ids) if self._has_flags or sequence.min() < 0 else ids
                    ids[row], filled[row] = sequence, True
        return ids, filled

    def _signed(self, ids: np.ndarray) -> np.ndarray:
        """Return ids in the type that holds padding and flags."""
        return ids.astype(stored_dtype(self.spec.vocab_size, signed=True)) if ids.dtype.kind == "u" else ids

    def _copy_ready(self, ids: np.ndarray, codes: list[int], members: list[int]) -> np.ndarray:
        """Fill the rows of `ids` whose shards were read before and hold nothing but such rows; return which, bool (n,).

        A batch has few rows of each shard, so this takes the least time for each row.
        """
        filled = np.zeros(len(ids), bool)
        if not self._ready:
            return filled
        copied, itemsize = [], ids.itemsize
        for row, (ready, member) in enumerate(zip(map(self._ready.get, codes), members, strict=True)):
            # A larger type is not copied: that could change an invalid id.
            if ready is not None and ready.itemsize <= itemsize and (ready.is_whole or ready.shard.is_readable(member)):
                ids[row] = ready.rows[member]
                copied.append(row)
        filled[copied] = True
        if ids.size and (ids.max() >= self.spec.vocab_size or (ids.dtype.kind == "i" and ids.min() < 0)):
            filled &= self._are_usable(ids).all(axis=1)
            ids[~filled] = 0
        return filled

    def _are_usable(self, ids: np.ndarray) -> np.ndarray:
        """Return which ids (n, T), stored without a sign, are in the vocabulary, with their flags, if any; bool."""
        if self._has_flags and ids.dtype.itemsize == 4:
            return are_valid(ids, self.spec.vocab_size)
        usable: np.ndarray = (ids >= 0) & (ids < self.spec.vocab_size)
        return usable

    def _note_ready(self, code: int, shard: Shard | BlockShard, ids: np.ndarray) -> None:
        rows = None if shard.npy is None else shard.npy.rows
        if rows is None or rows.shape[1] != ids.shape[1]:
            return
        if rows.dtype.kind == "u" and rows.itemsize <= ids.itemsize:
            self._ready[code] = _ReadyShard(shard, rows, rows.itemsize, isinstance(shard, Shard))

    def _forget(self, url: str) -> None:
        self._ready = {code: ready for code, ready in self._ready.items() if ready.shard.url != url}

    def _read_npy(self, ids: np.ndarray, source: int, shard: int, samples: Samples, rows: np.ndarray) -> np.ndarray:
        """Fill the `rows` (n,) of `ids` whose members are plain npy, all at once; return which were filled, bool (n,).

        Members with negative ids, ids beyond the vocabulary, or a header that differs from the first member's are
        skipped; `_read_one` handles them.
        """
        done = np.zeros(len(rows), bool)
        opened = self._open(source, shard, samples.member[rows])
        npy = None if opened is None else opened.npy
        width = ids.shape[1]
        if opened is None or npy is None or npy.length < width:
            return done
        self._note_ready(source << 40 | shard, opened, ids)
        done = npy.is_row[samples.member[rows]]
        rows = rows[done]
        found = npy.gather(samples.member[rows])
        if found.size and (found.max() >= self.spec.vocab_size or found.dtype.kind == "i"):
            usable = self._are_usable(found).all(axis=1)
            done[done], rows, found = usable, rows[usable], found[usable]
        if npy.length == width:
            ids[rows] = found
        else:
            for row, sequence in zip(rows.tolist(), found, strict=True):
                ids[row] = self._crop(sequence, int(samples.member[row]), int(samples.key[row]))
        return done

    def _read_one(self, source: int, shard: int, member: int, key: int) -> np.ndarray | None:
        """Return the seq_len + 1 ids of a sample, int64; None if it becomes filler."""
        ids = self._ids(source, shard, member)
        if ids is None:
            self._count_broken()
            return None
        if len(ids) <= self.spec.seq_len:
            self._counts["read"] += 1
            self._check_not_all_short(source, shard)
            return None
        self._count_usable(1)
        return self._crop(ids, member, key)

    def _crop(self, ids: np.ndarray, member: int, key: int) -> np.ndarray:
        spare = len(ids) - (self.spec.seq_len + 1)
        start = hash_key(key, member) % (spare + 1) if spare else 0
        return ids[start : start + self.spec.seq_len + 1]

    def _ids(self, source: int, shard: int, member: int) -> np.ndarray | None:
        """Return the checked ids of a sample; None for a tolerated broken one."""
        opened = self._open(source, shard, np.array([member]))
        if opened is None:
            return None
        try:
            ids = opened.ids(member)
        except DataError as error:
            if self.spec.max_broken_fraction is None:
                raise
            self._notice(f"ignored: {error}")
            return None
        return self._checked(ids, opened, member)

    def _checked(self, ids: np.ndarray, shard: Shard | BlockShard, member: int) -> np.ndarray:
        """Check the ids against the vocabulary. Negative ids count from its end; PAD_ID stays, for the loss mask.

        Ids with flags (token_flags) become signed ones.
        """
        vocab_size = self.spec.vocab_size
        if not len(ids):
            return ids
        if vocab_size <= ID_MASK and may_have_flags(ids):
            flagged = as_signed(ids)
            invalid = flagged[~are_valid(flagged, vocab_size)]
            if not len(invalid):
                self._has_flags = True
                return flagged
            ids = invalid & ID_MASK
        smallest, largest = int(ids.min()), int(ids.max())
        if largest >= vocab_size or smallest < -vocab_size:
            raise DataError(
                f"{shard.url}, member {shard.member_name(member)}: found the id "
                f"{largest if largest >= vocab_size else smallest}, but the model's vocabulary has {vocab_size} ids; "
                "use a model with the vocabulary of the data's tokenizer, or tokenize the data again"
            )
        return np.where((ids < 0) & (ids != PAD_ID), ids + vocab_size, ids) if smallest < 0 else ids

    def _open(self, source: int, shard: int, members: np.ndarray | None = None) -> Shard | BlockShard | None:
        """Return the open shard of a source, with some members (n,) readable; None for a tolerated broken one."""
        url = self._url(source, shard)
        if url in self._broken_shards:
            return None
        data_key = self.spec.data_key
        try:
            opened = self._store.get(url, data_key)
            expected = self.spec.sources[source].sizes[shard]
            if expected is not None and expected != len(opened):
                raise DataError(
                    f"{url}: holds {len(opened)} sequences, but its manifest lists {expected}; recreate the manifest "
                    "with python -m open_lm.utils.make_wds_manifest --data-dir FOLDER, or copy the shard again"
                )
            if members is not None:
                self._store.make_readable(opened, members)
        except (DataError, StorageError) as error:
            if self.spec.max_broken_fraction is None:
                raise
            self._broken_shards.add(url)
            self._notice(f"ignored: {error}")
            return None
        if data_key is not None and data_key != opened.kind:
            name = self.spec.sources[source].name
            self._notice(f"the data key is {data_key}, but {name} holds {opened.kind}; using {opened.kind}", True)
        return opened

    def _notice(self, text: str, same_on_all_ranks: bool = False) -> None:
        if text not in self._noticed:
            self._noticed.add(text)
            self.notices.append(Notice(text, same_on_all_ranks))

    def _count_usable(self, count: int) -> None:
        self._counts["read"] += count
        self._counts["usable"] += count

    def _count_broken(self, count: int = 1) -> None:
        self._counts["read"] += count
        self._counts["broken"] += count
        fraction = self.spec.max_broken_fraction or 0.0
        if self._counts["broken"] > fraction * max(self._counts["read"], _MIN_TOLERANCE_BASE):
            raise DataError(
                f"{self._counts['broken']} of {self._counts['read']} sequences are broken, more than "
                f"--data-tolerate-error-p {fraction} allows; the last warnings name them"
            )

    def _check_not_all_short(self, source: int, shard: int) -> None:
        """Search for a longer sequence after the first short one: a run must not train on filler only."""
        if self._counts["usable"] or self._searched_long_sequence:
            return
        self._searched_long_sequence = True
        longest = 0
        count = min(len(self.spec.sources[source].shards), _MAX_SHARDS_SEARCHED)
        for number in (shard, *(n for n in range(count) if n != shard)):
            opened = self._open(source, number)
            for member in range(len(opened) if opened else 0):
                ids = self._ids(source, number, member)
                longest = max(longest, 0 if ids is None else len(ids))
                if longest > self.spec.seq_len:
                    return
        raise DataError(
            f"{self.spec.sources[source].name}: every sequence read so far is too short: the longest has {longest} "
            f"ids, but the model's seq_len {self.spec.seq_len} needs {self.spec.seq_len + 1}; use a model with a "
            "smaller seq_len, or tokenize the data again with a larger one"
        )


def _codes(samples: Samples) -> list[int]:
    """Return a number for the shard of each sample."""
    return (samples.source << 40 | samples.shard).tolist()


def _by_shard(samples: Samples) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield source, shard and row numbers (n,) of the samples of each shard, by first appearance of the shard."""
    shards = samples.source << 40 | samples.shard
    values, first, inverse = np.unique(shards, return_index=True, return_inverse=True)
    for number in np.argsort(first).tolist():
        value = int(values[number])
        yield value >> 40, value & (1 << 40) - 1, np.flatnonzero(inverse == number)


Reader = SampleReader | SyntheticReader


def make_reader(spec: StreamSpec) -> Reader:
    """Return the reader for the sources of `spec`."""
    return SyntheticReader(spec) if spec.sources[0].shards == (SYNTHETIC_URL,) else SampleReader(spec)


def lazy_size_of(spec: StreamSpec) -> SizeOf:
    """Return a function that looks up the sizes of shards without a manifest; its reader is created on first use."""
    readers: list[Reader] = []

    def size_of(source: int, shard: int) -> int:
        if not readers:
            readers.append(make_reader(spec))
        return readers[0].size_of(source, shard)

    return size_of
