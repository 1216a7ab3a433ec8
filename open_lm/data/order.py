"""Data order: which sample comes next. A pure function of (sources, seed, position).

Batch path: loader.py asks `DataOrder` for the samples of each global batch; next: stream.py reads them.

    one source     visits of shards, one at a time. A visit reads each sequence of its shard once, in an order fixed by
                   (seed, source, pass, visit). Without replacement, a pass visits every shard once, in a new order for
                   each pass; an upsampling factor f means f visits a pass, averaged over the passes. With replacement,
                   every visit draws a shard.
    all sources    interleaved sample by sample (mixture.py): after any n samples, a source has given n times its share,
                   to within one sample.
    global batch   batch k is samples [k * G, (k + 1) * G) of that order. Ranks and workers only split the work.

The state after any sample is a few integers and a fingerprint for each source, which is all that resuming needs.
There is no I/O here: a callable returns the sizes of shards that have no manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from open_lm.data.hashing import hash_each, hash_key, permutation
from open_lm.data.mixture import Interleaving, integer_weights
from open_lm.data.resume import resume_state
from open_lm.errors import DataError

_MAX_EMPTY_VISITS = 1000
SizeOf = Callable[[int, int], int]  # (source, shard) -> number of sequences


@dataclass(frozen=True)
class Source:
    """One data set of a mixture: its shards and its share of the samples.

    `sizes` are the numbers of sequences of the shards, None if unknown until the shard is read. `repeats` are the
    upsampling factors of the shards (relative chances when shards are drawn); empty means 1 for all. `num_bytes` and
    `sha256` (hex) come from a manifest; None and "" without one. `data_key` is the requested member kind. `datasets`
    holds the dataset.json of each folder of shards (provenance.read_dataset).
    """

    name: str
    shards: tuple[str, ...]
    sizes: tuple[int | None, ...]
    weight: Fraction = Fraction(1)
    repeats: tuple[Fraction, ...] = ()
    num_bytes: tuple[int | None, ...] = ()
    sha256: tuple[str, ...] = ()
    data_key: str = ""
    datasets: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_bytes", self.num_bytes or (None,) * len(self.shards))
        object.__setattr__(self, "sha256", self.sha256 or ("",) * len(self.shards))

    @cached_property
    def num_sequences(self) -> int | None:
        """Sequences of the first pass, None if a size is not known."""
        if None in self.sizes:
            return None
        return int(np.dot(np.array(self.sizes, np.int64), copies_in_pass(self, 0)))

    @cached_property
    def fingerprint(self) -> str:
        """Four hashes joined by ":" that identify the data, independent of its folder.

        They cover the shards' names, order and factors; their numbers of sequences; their sha256; their dataset.json.
        A hash is empty if nothing is known.
        """
        stems = "\n".join(url.rpartition("/")[2] for url in self.shards)
        repeats = ",".join(map(str, self.repeats)) if any(factor != 1 for factor in self.repeats) else ""
        sizes = ["" if size is None else str(size) for size in self.sizes]
        digests = [dataset["digest"] for dataset in self.datasets]
        known = [",".join(values) if any(values) else "" for values in (sizes, self.sha256, digests)]
        texts = [f"{stems}\n{repeats}", *known]
        return ":".join(text and hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)


def copies_in_pass(source: Source, pass_number: int) -> np.ndarray:
    """Return how often each shard is visited in a pass, int64 (shards,).

    The average over many passes is exactly the shard's factor. Shards with the same fractional factor get their extra
    visit in different passes; the shard's number decides in which ones.
    """
    copies = np.ones(len(source.shards), np.int64)
    numbers = {factor: number for number, factor in enumerate(dict.fromkeys(source.repeats))}
    factor_of_shard = np.array([numbers[factor] for factor in source.repeats])
    for factor, number in numbers.items():
        shards = np.flatnonzero(factor_of_shard == number)
        shifts = hash_each(len(copies))[shards] % np.uint64(factor.denominator)
        start = shifts.astype(object) + factor.numerator * pass_number  # Python integers, which do not overflow
        copies[shards] = (start + factor.numerator) // factor.denominator - start // factor.denominator
    return copies


class Samples(NamedTuple):
    """Consecutive samples of the data order; all arrays (n,)."""

    source: np.ndarray  # int64: index of the source
    shard: np.ndarray  # int64: index of the shard in its source
    member: np.ndarray  # int64: index of the sequence in its shard, in file order
    key: np.ndarray  # uint64: key of the visit, for any random choice about the sample

    def slice(self, start: int, stop: int) -> Samples:
        return Samples(*(array[start:stop] for array in self))


@dataclass(frozen=True)
class OrderSettings:
    """Options of the order: with replacement or in passes, shuffled or as stored, and the maximum number of passes."""

    resampled: bool = False
    shuffle_shards: bool = True
    shuffle_samples: bool = True
    max_passes: int | None = None


class DataOrder:
    """The order of samples from a position on.

    `size_of(source, shard)` returns the sizes that the sources do not know. With a `state` the order resumes there,
    with that state's seed. A state of other data or of another order is a DataError, or with `allow_changed` a
    `change_warning` that lists the changes and where each source resumes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        settings: OrderSettings | None = None,
        *,
        size_of: SizeOf | None = None,
        state: dict[str, Any] | None = None,
        allow_changed: bool = False,
    ) -> None:
        self.settings = settings or OrderSettings()
        self.seed = int(state["seed"]) if state else seed
        size_of = size_of or _unknown_size
        self._cursors = [_Cursor(n, source, self.seed, self.settings, size_of) for n, source in enumerate(sources)]
        self._weights = integer_weights([source.weight for source in sources])
        self.change_warning = ""
        if state:
            names = [source.name for source in sources]
            accepted, self.change_warning = resume_state(state, self.state(), names, allow_changed)
            for cursor, position in zip(self._cursors, accepted["sources"], strict=True):
                cursor.restore(position)
        self._interleaving = Interleaving(self._weights, [cursor.samples for cursor in self._cursors])

    @property
    def position(self) -> int:
        """Samples taken since the beginning, or since the data was changed."""
        return sum(cursor.samples for cursor in self._cursors)

    def take(self, count: int, partial: bool = False) -> Samples:
        """Return the next `count` samples.

        When the last pass of a single source ends: fewer samples with `partial`, else DataError.
        """
        if len(self._cursors) == 1:
            shard, member, key = self._cursors[0].take(count, partial)
            return Samples(np.zeros(len(shard), np.int64), shard, member, key)
        source = self._interleaving.take(count)
        samples = Samples(source, np.empty_like(source), np.empty_like(source), np.empty(count, np.uint64))
        for number, cursor in enumerate(self._cursors):
            places = np.flatnonzero(source == number)
            for array, values in zip(samples[1:], cursor.take(len(places)), strict=True):
                array[places] = values
        return samples

    def upcoming(self, count: int = 1) -> list[tuple[int, int]]:
        """Return (source, shard) of the visits after the current ones, to fetch ahead, the nearest first.

        One visit for each source, or more as long as that is at most `count` in total.
        """
        cursors = [cursor for cursor in self._cursors if self._weights[cursor.number]]
        shards = [cursor.upcoming(max(1, count // len(cursors))) for cursor in cursors]
        visits = [(cursor.number, row) for cursor, row in zip(cursors, shards, strict=True)]
        depth = max(map(len, shards))
        return [(source, row[number]) for number in range(depth) for source, row in visits if number < len(row)]

    def state(self) -> dict[str, Any]:
        """Return the position as integers and strings, ready for JSON."""
        return {
            "seed": self.seed,
            "resampled": self.settings.resampled,
            "shuffled": self.settings.shuffle_samples,
            "sources": [
                {**cursor.state(), "weight": weight}
                for cursor, weight in zip(self._cursors, self._weights, strict=True)
            ],
        }


class _Cursor:
    """The position in one source: (pass, visit in the pass or draw, offset in the visit, samples so far).

    `stream` enters every hash, so that each source has its own order: the source's number when it was added to the run.
    """

    def __init__(self, number: int, source: Source, seed: int, settings: OrderSettings, size_of: SizeOf) -> None:
        self.number, self.source, self.seed, self.settings, self.size_of = number, source, seed, settings, size_of
        self.stream = number
        self.pass_number = self.visit = self.offset = self.samples = 0
        self._pass_order: tuple[int, np.ndarray] | None = None
        self._visit_order: tuple[tuple[int, int], np.ndarray] | None = None
        if settings.resampled:
            self._chances = np.cumsum(integer_weights(source.repeats or [Fraction(1)] * len(source.shards)))

    def take(self, count: int, partial: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return shard, member and key of the next `count` samples; with `partial`, fewer if the last pass ends."""
        shards = np.empty(count, np.int64)
        members = np.empty(count, np.int64)
        keys = np.empty(count, np.uint64)
        done = empty_visits = 0
        while done < count:
            shard = self._shard_at(self.visit)
            if shard is None:
                if partial and self._is_last_pass:
                    break
                self._start_pass(self.samples + done, count - done)
                continue
            order = self._order_of_visit(shard)
            empty_visits = 0 if len(order) else empty_visits + 1
            if empty_visits > max(_MAX_EMPTY_VISITS, len(self.source.shards)):
                raise DataError(f"{self.source.name}: all of its shards are empty")
            step = min(count - done, len(order) - self.offset)
            shards[done : done + step] = shard
            members[done : done + step] = order[self.offset : self.offset + step]
            keys[done : done + step] = self._key()
            done += step
            self.offset += step
            if self.offset == len(order):
                self.visit, self.offset = self.visit + 1, 0
        self.samples += done
        return shards[:done], members[:done], keys[:done]

    @property
    def _is_last_pass(self) -> bool:
        return self.settings.max_passes is not None and self.pass_number + 1 >= self.settings.max_passes

    def _start_pass(self, used: int, missing: int) -> None:
        if self._is_last_pass:
            raise DataError(
                f"{self.source.name}: all {used} sequences are used up, but {missing} more are needed; use "
                "--multiple-data-passes, more data, or a smaller --train-num-samples or --epochs"
            )
        self.pass_number, self.visit, self.offset = self.pass_number + 1, 0, 0

    def _key(self) -> int:
        return hash_key(self.seed, self.stream, self.pass_number, self.visit)

    def _shard_at(self, visit: int) -> int | None:
        """Return the shard of a visit in this pass (or of a draw), None after the end of the pass."""
        if self.settings.resampled:
            draw = hash_key(self.seed, self.stream, visit, 1) % int(self._chances[-1])
            return int(np.searchsorted(self._chances, draw, side="right"))
        shards = self._shards_of_pass()
        return int(shards[visit]) if visit < len(shards) else None

    def _shards_of_pass(self) -> np.ndarray:
        if self._pass_order is None or self._pass_order[0] != self.pass_number:
            shards = np.repeat(np.arange(len(self.source.shards)), copies_in_pass(self.source, self.pass_number))
            if self.settings.shuffle_shards:
                shards = shards[permutation(hash_key(self.seed, self.stream, self.pass_number, -1), len(shards))]
            self._pass_order = (self.pass_number, shards)
        return self._pass_order[1]

    def _order_of_visit(self, shard: int) -> np.ndarray:
        """Return the member indices (n,) of the current visit in reading order."""
        visit = (self.pass_number, self.visit)
        if self._visit_order is None or self._visit_order[0] != visit:
            known = self.source.sizes[shard]
            size = self.size_of(self.number, shard) if known is None else known
            order = permutation(self._key(), size) if self.settings.shuffle_samples else np.arange(size)
            self._visit_order = (visit, order)
        return self._visit_order[1]

    def upcoming(self, count: int) -> list[int]:
        """Return the shards of the next `count` visits of this pass."""
        shards = (self._shard_at(self.visit + number) for number in range(1, count + 1))
        return [shard for shard in shards if shard is not None]

    def state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.source.fingerprint,
            "num_sequences": self.source.num_sequences,
            "data_key": self.source.data_key,
            "stream": self.stream,
            "pass": self.pass_number,
            "visit": self.visit,
            "offset": self.offset,
            "samples": self.samples,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.stream, self.pass_number, self.visit, self.offset, self.samples = (
            state[name] for name in ("stream", "pass", "visit", "offset", "samples")
        )


def _unknown_size(source: int, shard: int) -> int:
    raise DataError(f"the size of shard {shard} of source {source} is not known")
