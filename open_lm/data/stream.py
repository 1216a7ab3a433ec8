"""From a plan's samples to rows of token ids: shards are fetched, opened, decoded and checked here.

A local shard is mapped into memory; a remote one (s3://, https://, …, or a `pipe:` command) is first fetched whole
into a folder that all workers of a rank share. The next shard is fetched while the current one is read.
Nothing here is opened before the first sample is asked for, so that a `SampleReader` can be sent to a worker process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from open_lm.data.fetch import FetchSettings, needs_fetch
from open_lm.data.order import Samples, Source, hash_key, hash_range
from open_lm.data.shard_format import PAD_ID, token_dtype
from open_lm.data.shards import Shard, ShardStore
from open_lm.data.sources import SYNTHETIC
from open_lm.data.verify import Expected
from open_lm.errors import DataError, StorageError

_LEAST_TOLERANCE_BASE = 1000


@dataclass(frozen=True)
class StreamSpec:
    """What a reader needs to know; plain values that can be sent to a worker.

    `data_keys` is the member kind of each source; `tolerated_share` the share of broken sequences that become filler
    rows, None where the first is an error; `fetch` is how shards reach the reader.
    """

    sources: tuple[Source, ...]
    seq_len: int
    vocab_size: int
    data_keys: tuple[str | None, ...]
    tolerated_share: float | None = None
    fetch: FetchSettings = FetchSettings()


def row_dtype(vocab_size: int, padded: bool = False) -> np.dtype[np.generic]:
    """The type that rows of ids travel in: the smallest that torch can turn into int64 on any device, signed and so
    able to hold PAD_ID where they are `padded` or need more than 16 bits."""
    stored = token_dtype(vocab_size)
    if stored.itemsize <= 2 and not padded:
        return stored
    return np.dtype(np.int32 if vocab_size <= 2**31 else np.int64)


class Notice(NamedTuple):
    """Something to tell the user; once for the whole job where every rank finds the same."""

    text: str
    same_on_all_ranks: bool


class SampleReader:
    """Rows of seq_len + 1 ids for samples of a plan; tells the sizes of shards that no manifest names."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.notices: list[Notice] = []  # each once; whoever reads the rows passes them on and clears them
        self._store = ShardStore(2 * len(spec.sources) + 2, spec.fetch, _expected_files(spec.sources))
        self._rows = Counter[str]()  # "read", "usable", "broken"
        self._last_size = 1
        self._broken_shards: set[str] = set()
        self._noticed: set[str] = set()

    def size_of(self, source: int, shard: int) -> int:
        """Sequences of a shard, found by opening it; 0 for one that cannot be read and is tolerated."""
        opened = self._open(source, shard)
        if opened is None:
            self._count_broken(self._last_size)  # about as many as another shard holds are lost
            return 0
        self._last_size = len(opened)
        return len(opened)

    def prefetch(self, samples: Samples, upcoming: Sequence[tuple[int, int]]) -> None:
        """Begin to fetch the shards of these samples and then the upcoming (source, shard), the nearest first."""
        places = [(source, shard) for source, shard, _ in _by_shard(samples)]
        urls = (self.spec.sources[source].shards[shard] for source, shard in (*places, *upcoming))
        self._store.prefetch([url for url in urls if url not in self._broken_shards])

    def read(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        """Rows (n, seq_len + 1) and whether each holds data (n,) bool; the others are filler, all zeros.

        The rows are of `row_dtype`, the padded one where a row holds PAD_ID. Longer sequences are cut at a random place
        (fixed by the sample's key), shorter ones become filler, broken ones too where they are tolerated. DataError for
        everything else.
        """
        rows = np.zeros((len(samples.source), self.spec.seq_len + 1), row_dtype(self.spec.vocab_size))
        filled = np.zeros(len(rows), bool)
        for source, shard, places in _by_shard(samples):
            done = self._gather(rows, source, shard, samples, places)
            filled[places[done]] = True
            self._count_usable(int(done.sum()))
            for number in places[~done].tolist():
                ids = self._read_one(source, shard, int(samples.member[number]), int(samples.key[number]))
                if ids is not None:
                    if rows.dtype.kind == "u" and ids.min() < 0:
                        rows = rows.astype(row_dtype(self.spec.vocab_size, padded=True))
                    rows[number], filled[number] = ids, True
        return rows, filled

    def _gather(self, rows: np.ndarray, source: int, shard: int, samples: Samples, places: np.ndarray) -> np.ndarray:
        """Fill in at once what stands in plain npy members: which of `places` (n,) that is, bool (n,).

        What holds an id that is negative or beyond the vocabulary is left out, and so is what is not alike.
        """
        done = np.zeros(len(places), bool)
        opened = self._open(source, shard)
        found = None if opened is None else opened.rows
        width = rows.shape[1]
        if found is None or found.length < width:
            return done
        is_row = found.is_row[samples.member[places]]
        numbers = places[is_row]
        ids = found.gather(samples.member[numbers])
        if ids.size and (ids.max() >= self.spec.vocab_size or ids.dtype.kind == "i"):
            usable = ((ids >= 0) & (ids < self.spec.vocab_size)).all(axis=1)
            is_row[is_row], numbers, ids = usable, numbers[usable], ids[usable]
        if found.length == width:
            rows[numbers] = ids
        else:
            for number, long in zip(numbers.tolist(), ids, strict=True):
                rows[number] = self._cut(long, int(samples.member[number]), int(samples.key[number]))
        return is_row

    def _read_one(self, source: int, shard: int, member: int, key: int) -> np.ndarray | None:
        """The seq_len + 1 ids of a sample, int64; None where it is filler."""
        ids = self._ids(source, shard, member)
        if ids is None:
            self._count_broken()
            return None
        if len(ids) <= self.spec.seq_len:
            self._rows["read"] += 1
            self._refuse_if_all_short(source, shard)
            return None
        self._count_usable(1)
        return self._cut(ids, member, key)

    def _cut(self, ids: np.ndarray, member: int, key: int) -> np.ndarray:
        spare = len(ids) - (self.spec.seq_len + 1)
        start = hash_key(key, member) % (spare + 1) if spare else 0
        return ids[start : start + self.spec.seq_len + 1]

    def _count_usable(self, count: int) -> None:
        self._rows["read"] += count
        self._rows["usable"] += count

    def _ids(self, source: int, shard: int, member: int) -> np.ndarray | None:
        """The checked ids of a sample; None for a broken one that is tolerated."""
        opened = self._open(source, shard)
        if opened is None:
            return None
        try:
            ids = opened.ids(member)
        except DataError as error:
            if self.spec.tolerated_share is None:
                raise
            self._notice(f"ignored: {error}")
            return None
        return self._checked(ids, opened, member)

    def _checked(self, ids: np.ndarray, shard: Shard, member: int) -> np.ndarray:
        """Ids within the vocabulary; negative ones count from its end, but PAD_ID stays for the loss mask to see."""
        vocab_size = self.spec.vocab_size
        if not len(ids):
            return ids
        least, greatest = int(ids.min()), int(ids.max())
        if greatest >= vocab_size or least < -vocab_size:
            found = greatest if greatest >= vocab_size else least
            raise DataError(
                f"{shard.url}, member {shard.members[member].key}.{shard.kind}: holds the id {found}, the model's "
                f"vocabulary has {vocab_size}: use a model with the vocabulary of the data's tokenizer, or tokenize "
                "the data again"
            )
        return np.where((ids < 0) & (ids != PAD_ID), ids + vocab_size, ids) if least < 0 else ids

    def _open(self, source: int, shard: int) -> Shard | None:
        """The open shard of a source; None for a broken one that is tolerated."""
        url = self.spec.sources[source].shards[shard]
        if url in self._broken_shards:
            return None
        wanted = self.spec.data_keys[source]
        try:
            opened = self._store.get(url, wanted)
            expected = self.spec.sources[source].sizes[shard]
            if expected is not None and expected != len(opened):
                raise DataError(
                    f"{url}: holds {len(opened)} sequences, its manifest says {expected}; make the manifest again with "
                    "python -m open_lm.utils.make_wds_manifest --data-dir FOLDER, or copy the shard again"
                )
        except (DataError, StorageError) as error:
            if self.spec.tolerated_share is None:
                raise
            self._broken_shards.add(url)
            self._notice(f"ignored: {error}")
            return None
        if wanted is not None and wanted != opened.kind:
            name = self.spec.sources[source].name
            text = f"the data key is {wanted}, but {name} holds {opened.kind}: using that"
            self._notice(text, same_on_all_ranks=True)
        return opened

    def _notice(self, text: str, same_on_all_ranks: bool = False) -> None:
        if text not in self._noticed:
            self._noticed.add(text)
            self.notices.append(Notice(text, same_on_all_ranks))

    def _count_broken(self, count: int = 1) -> None:
        self._rows["read"] += count
        self._rows["broken"] += count
        share = self.spec.tolerated_share or 0.0
        if self._rows["broken"] > share * max(self._rows["read"], _LEAST_TOLERANCE_BASE):
            raise DataError(
                f"{self._rows['broken']} of {self._rows['read']} sequences are broken, more than "
                f"--data-tolerate-error-p {share} allows; the last notices name them"
            )

    def _refuse_if_all_short(self, source: int, shard: int) -> None:
        """At the first short sequence, make sure that not all are: a run on filler alone would train on nothing."""
        if self._rows["usable"] or self._rows["searched"]:
            return
        self._rows["searched"] = 1
        longest = 0
        count = len(self.spec.sources[source].shards)
        for number in (shard, *(n for n in range(min(count, 16)) if n != shard)):
            opened = self._open(source, number)
            for member in range(len(opened) if opened else 0):
                ids = self._ids(source, number, member)
                longest = max(longest, 0 if ids is None else len(ids))
                if longest > self.spec.seq_len:
                    return
        raise DataError(
            f"{self.spec.sources[source].name}: every sequence looked at is too short: the longest has {longest} ids, "
            f"the model's seq_len {self.spec.seq_len} needs {self.spec.seq_len + 1}; use a model with a smaller "
            "seq_len, or tokenize again with a larger one"
        )


def _by_shard(samples: Samples) -> Iterator[tuple[int, int, np.ndarray]]:
    """Source, shard and places (n,) of the samples of each shard, in the order in which shards come first."""
    shards = samples.source << 40 | samples.shard
    values, first, inverse = np.unique(shards, return_index=True, return_inverse=True)
    for number in np.argsort(first).tolist():
        value = int(values[number])
        yield value >> 40, value & (1 << 40) - 1, np.flatnonzero(inverse == number)


class SyntheticReader:
    """Random ids of the vocabulary, fixed by the sample's key; for measuring speed and for tests."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.notices: list[Notice] = []

    def size_of(self, source: int, shard: int) -> int:
        raise AssertionError("the size of synthetic data is always known")

    def prefetch(self, samples: Samples, upcoming: Sequence[tuple[int, int]]) -> None:
        """Nothing to fetch."""

    def read(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        """Rows (n, seq_len + 1) of `row_dtype`, and that all of them hold data (n,) bool."""
        rows = np.empty((len(samples.source), self.spec.seq_len + 1), row_dtype(self.spec.vocab_size))
        for number, (member, key) in enumerate(zip(samples.member.tolist(), samples.key.tolist(), strict=True)):
            rows[number] = hash_range(hash_key(key, member), rows.shape[1]) % np.uint64(self.spec.vocab_size)
        return rows, np.ones(len(rows), bool)


Reader = SampleReader | SyntheticReader


def make_reader(spec: StreamSpec) -> Reader:
    """The reader for the sources of `spec`."""
    kind: Callable[[StreamSpec], Reader] = SyntheticReader if _is_synthetic(spec) else SampleReader
    return kind(spec)


def needs_folder(sources: Sequence[Source]) -> bool:
    """Whether any shard has to be fetched or verified before it can be read."""
    return any(needs_fetch(url) for source in sources for url in source.shards) or any(
        sha256 for source in sources for sha256 in source.sha256
    )


def _expected_files(sources: Sequence[Source]) -> dict[str, Expected]:
    """What manifests say of the shards' files, by address."""
    return {
        url: Expected(num_bytes, sha256)
        for source in sources
        for url, num_bytes, sha256 in zip(source.shards, source.num_bytes, source.sha256, strict=True)
        if sha256 or num_bytes is not None
    }


def _is_synthetic(spec: StreamSpec) -> bool:
    return spec.sources[0].shards == (SYNTHETIC,)
