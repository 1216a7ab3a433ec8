"""Which sample comes next: a pure function of (sources, seed, position), the same for any number of ranks and workers.

    one source     visits of shards, one after the other; a visit reads each sequence of its shard once, in an order
                   fixed by (seed, source, pass, visit). Without replacement a pass visits every shard (an upsampling
                   factor f visits it f times, on average over the passes), in an order of its own for each pass;
                   with replacement every visit draws a shard.
    all sources    interleaved sample by sample (mixture.py): after any n samples a source has given less than one
                   sample more or less than n * its share, so exactly its share in each full period.
    global batch   batch k is samples [k * G, (k + 1) * G) of that order; ranks and workers only split the work.

The state after any sample is a few integers and a fingerprint for each source, all that is needed to go on from there.
No I/O happens here: sizes of shards that no manifest tells come from a callable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from open_lm.data.continuation import continued
from open_lm.data.mixture import Interleaving, integer_weights, most_samples
from open_lm.errors import DataError, join_problems

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1
_MAX_EMPTY_VISITS = 1000
SizeOf = Callable[[int, int], int]


# --- numbers that depend on nothing but their key (numpy's own generators may change between its versions) ----------
def hash_key(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64, chained)."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK_64)) + _GOLDEN & _MASK_64
        state = (state ^ state >> 30) * _MIX_1 & _MASK_64
        state = (state ^ state >> 27) * _MIX_2 & _MASK_64
        state ^= state >> 31
    return state


def hash_range(key: int, count: int) -> np.ndarray:
    """`count` 64-bit random numbers of a key (splitmix64): uint64 (count,)."""
    return _mixed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def _hash_each(count: int) -> np.ndarray:
    """`hash_key` of each of 0 … count - 1: uint64 (count,)."""
    return _mixed(np.arange(count, dtype=np.uint64) + np.uint64(_GOLDEN))


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ state >> np.uint64(30)) * np.uint64(_MIX_1)
    state = (state ^ state >> np.uint64(27)) * np.uint64(_MIX_2)
    return state ^ state >> np.uint64(31)


def permutation(key: int, count: int) -> np.ndarray:
    """A permutation of 0 … count - 1: int64 (count,)."""
    return np.argsort(hash_range(key, count), kind="stable")


# --- token accounting ------------------------------------------------------------------------------------------------
def epoch_sequences(epoch_tokens: int, seq_len: int) -> int:
    """Sequences of an epoch of --train-num-samples tokens: a sequence trains seq_len tokens."""
    return epoch_tokens // seq_len


def epoch_end_step(epoch: int, *, epoch_tokens: int, seq_len: int, global_batch_size: int) -> int:
    """Optimizer steps done when `epoch` epochs have ended.

    Only full global batches are stepped; what an epoch leaves over counts for the next one, so that after all epochs
    less than one batch of the promised sequences is missing.
    """
    return epoch * epoch_sequences(epoch_tokens, seq_len) // global_batch_size


class Leftover(NamedTuple):
    """What is not trained on: sequences that fill no global batch, and tokens that fill no sequence."""

    sequences: int
    tokens: int


def leftover(epochs: int, *, epoch_tokens: int, seq_len: int, global_batch_size: int) -> Leftover:
    """What `epochs` epochs of --train-num-samples leave over; steps * batch, it and no more are what was promised."""
    sequences = epochs * epoch_sequences(epoch_tokens, seq_len)
    return Leftover(sequences % global_batch_size, epochs * (epoch_tokens % seq_len))


# --- sources ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Source:
    """One stream of shards, with its share of the samples.

    `sizes` are the sequences of each shard, None where they are not known before the shard is read. `repeats` is how
    often each shard counts in a pass (or its relative chance to be drawn); empty means once each. `num_bytes` and
    `sha256` (hex) are what a manifest says of each shard's file; None and "" where none does. `data_key` is the kind of
    members asked for, `datasets` what the dataset.json of each of the shards' folders says (provenance.read_dataset).
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
        """Sequences of the first pass, None where a size is not known."""
        if None in self.sizes:
            return None
        return int(np.dot(np.array(self.sizes, np.int64), copies_in_pass(self, 0)))

    @cached_property
    def fingerprint(self) -> str:
        """Four hashes joined by ":" that name the data wherever its folder lies: of the shards' names, order and
        factors; of their numbers of sequences; of their sha256; of their dataset.json. Empty where nothing is known.
        """
        stems = "\n".join(url.rpartition("/")[2] for url in self.shards)
        repeats = ",".join(map(str, self.repeats)) if any(factor != 1 for factor in self.repeats) else ""
        sizes = ["" if size is None else str(size) for size in self.sizes]
        digests = [dataset["digest"] for dataset in self.datasets]
        known = [",".join(values) if any(values) else "" for values in (sizes, self.sha256, digests)]
        texts = [f"{stems}\n{repeats}", *known]
        return ":".join(text and hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)


def copies_in_pass(source: Source, pass_number: int) -> np.ndarray:
    """How often each shard is visited in a pass, int64 (shards,): its factor exactly, in the long run; once without.

    Shards with the same broken factor take turns: which passes a shard gets its extra visit in is fixed by its number.
    """
    copies = np.ones(len(source.shards), np.int64)
    numbers = {factor: number for number, factor in enumerate(dict.fromkeys(source.repeats))}
    which = np.array([numbers[factor] for factor in source.repeats])
    for factor, number in numbers.items():
        shards = np.flatnonzero(which == number)
        shifts = _hash_each(len(copies))[shards] % np.uint64(factor.denominator)
        parts = shifts.astype(object) + factor.numerator * pass_number  # whole numbers of any size
        copies[shards] = (parts + factor.numerator) // factor.denominator - parts // factor.denominator
    return copies


def check_enough(sources: Sequence[Source], count: int, seq_len: int) -> None:
    """DataError that lists every source whose first pass is too short for `count` samples of the mixture."""
    problems = []
    for source, needed in zip(sources, most_samples([s.weight for s in sources], count), strict=True):
        available = source.num_sequences
        if available is not None and needed > available:
            problems.append(
                f"{source.name} holds {available} sequences ({available * seq_len} tokens), "
                f"{needed} ({needed * seq_len} tokens) are needed"
            )
    if problems:
        heading = (
            f"Not enough data for {count} sequences in one pass: give --multiple-data-passes, more data, or a smaller "
            "--train-num-samples or --epochs"
        )
        raise DataError(join_problems(problems, heading))


# --- the order -------------------------------------------------------------------------------------------------------
class Samples(NamedTuple):
    """Consecutive samples of the order; all arrays (n,)."""

    source: np.ndarray  # int64: which source
    shard: np.ndarray  # int64: which of its shards
    member: np.ndarray  # int64: which sequence of the shard, in file order
    key: np.ndarray  # uint64: key of the visit, for anything random about the sample

    def rows(self, start: int, stop: int) -> Samples:
        return Samples(*(array[start:stop] for array in self))


@dataclass(frozen=True)
class Order:
    """How samples are ordered: with replacement or in passes, shuffled or as stored, and how many passes at most."""

    resampled: bool = False
    shuffle_shards: bool = True
    shuffle_samples: bool = True
    max_passes: int | None = None


class _Cursor:
    """The position in one source: (pass, visit in the pass or draw, offset in the visit, samples so far).

    `stream` makes the source's order its own: its number among the sources when it came into the run.
    """

    def __init__(self, number: int, source: Source, seed: int, order: Order, size_of: SizeOf) -> None:
        self.number, self.source, self.seed, self.order, self.size_of = number, source, seed, order, size_of
        self.stream = number
        self.pass_number = self.visit = self.offset = self.samples = 0
        self._pass_order: tuple[int, np.ndarray] | None = None
        self._visit_order: tuple[tuple[int, int], np.ndarray] | None = None
        if order.resampled:
            self._chances = np.cumsum(integer_weights(source.repeats or [Fraction(1)] * len(source.shards)))

    def take(self, count: int, partial: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, member and key of the next `count` samples; fewer at the end of the last pass when `partial`."""
        shard_ = np.empty(count, np.int64)
        member = np.empty(count, np.int64)
        key = np.empty(count, np.uint64)
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
                raise DataError(f"{self.source.name}: no shard holds a sequence")
            step = min(count - done, len(order) - self.offset)
            shard_[done : done + step] = shard
            member[done : done + step] = order[self.offset : self.offset + step]
            key[done : done + step] = self._key()
            done += step
            self.offset += step
            if self.offset == len(order):
                self.visit, self.offset = self.visit + 1, 0
        self.samples += done
        return shard_[:done], member[:done], key[:done]

    @property
    def _is_last_pass(self) -> bool:
        return self.order.max_passes is not None and self.pass_number + 1 >= self.order.max_passes

    def _start_pass(self, used: int, missing: int) -> None:
        if self._is_last_pass:
            raise DataError(
                f"{self.source.name}: its {used} sequences are used up and {missing} more are needed; "
                "give --multiple-data-passes, more data, or a smaller --train-num-samples or --epochs"
            )
        self.pass_number, self.visit, self.offset = self.pass_number + 1, 0, 0

    def _key(self) -> int:
        return hash_key(self.seed, self.stream, self.pass_number, self.visit)

    def _shard_at(self, visit: int) -> int | None:
        """The shard of a visit of this pass (or of a draw), None past the end of the pass."""
        if self.order.resampled:
            draw = hash_key(self.seed, self.stream, visit, 1) % int(self._chances[-1])
            return int(np.searchsorted(self._chances, draw, side="right"))
        shards = self._shards_of_pass()
        return int(shards[visit]) if visit < len(shards) else None

    def _shards_of_pass(self) -> np.ndarray:
        if self._pass_order is None or self._pass_order[0] != self.pass_number:
            shards = np.repeat(np.arange(len(self.source.shards)), copies_in_pass(self.source, self.pass_number))
            if self.order.shuffle_shards:
                shards = shards[permutation(hash_key(self.seed, self.stream, self.pass_number, -1), len(shards))]
            self._pass_order = (self.pass_number, shards)
        return self._pass_order[1]

    def _order_of_visit(self, shard: int) -> np.ndarray:
        """The indices (n,) of the current visit in reading order."""
        place = (self.pass_number, self.visit)
        if self._visit_order is None or self._visit_order[0] != place:
            known = self.source.sizes[shard]
            size = self.size_of(self.number, shard) if known is None else known
            order = permutation(self._key(), size) if self.order.shuffle_samples else np.arange(size)
            self._visit_order = (place, order)
        return self._visit_order[1]

    def upcoming(self, count: int) -> list[int]:
        """The shards of the next `count` visits, as far as they are in this pass."""
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


class Plan:
    """The order of samples from a position on.

    `size_of(source, shard)` tells sizes that the sources leave open. With a `state` the plan goes on from there, under
    that state's seed; a state of other data or of another order is a DataError, or with `allow_changed` a `notice` that
    tells what has changed and from where each source goes on.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        order: Order | None = None,
        *,
        size_of: SizeOf | None = None,
        state: dict[str, Any] | None = None,
        allow_changed: bool = False,
    ) -> None:
        self.order = order or Order()
        self.seed = int(state["seed"]) if state else seed
        size_of = size_of or _unknown_size
        self._cursors = [_Cursor(n, source, self.seed, self.order, size_of) for n, source in enumerate(sources)]
        self._weights = integer_weights([source.weight for source in sources])
        self.notice = ""
        if state:
            names = [source.name for source in sources]
            accepted, self.notice = continued(state, self.state(), names, allow_changed)
            for cursor, place in zip(self._cursors, accepted["sources"], strict=True):
                cursor.restore(place)
        self._interleaving = Interleaving(self._weights, [cursor.samples for cursor in self._cursors])

    @property
    def position(self) -> int:
        """Samples taken since the beginning, or since the data was changed."""
        return sum(cursor.samples for cursor in self._cursors)

    def take(self, count: int, partial: bool = False) -> Samples:
        """The next `count` samples; at the end of a single source's last pass fewer, when `partial`, else DataError."""
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
        """(source, shard) of the visits that follow the current ones, to be fetched ahead: of each source the next one,
        or more where that makes no more than `count` together; first the next of all sources, then those after them.
        """
        cursors = [cursor for cursor in self._cursors if self._weights[cursor.number]]
        shards = [cursor.upcoming(max(1, count // len(cursors))) for cursor in cursors]
        places = [(cursor.number, row) for cursor, row in zip(cursors, shards, strict=True)]
        depth = max(map(len, shards))
        return [(source, row[number]) for number in range(depth) for source, row in places if number < len(row)]

    def state(self) -> dict[str, Any]:
        """Where the plan stands: plain integers and strings, fit for JSON."""
        return {
            "seed": self.seed,
            "resampled": self.order.resampled,
            "shuffled": self.order.shuffle_samples,
            "sources": [
                {**cursor.state(), "weight": weight}
                for cursor, weight in zip(self._cursors, self._weights, strict=True)
            ],
        }


def _unknown_size(source: int, shard: int) -> int:
    raise DataError(f"the size of shard {shard} of source {source} is not known")
