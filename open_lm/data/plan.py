"""Which sample comes next: a pure function of (sources, seed, position), the same for any number of ranks and workers.

    one source     visits of shards, one after the other; a visit reads each sequence of its shard once, in an order
                   fixed by (seed, source, pass, visit). Without replacement a pass visits every shard (an upsampling
                   factor f visits it f times, on average over the passes), in an order of its own for each pass;
                   with replacement every visit draws a shard.
    all sources    interleaved sample by sample: the next sample comes from the source that is furthest behind its
                   share. After n samples a source has given at most ceil(n * share), and exactly its share in each
                   full period.
    global batch   batch k is samples [k * G, (k + 1) * G) of that order; ranks and workers only split the work.

The state after any sample is four integers for each source and is all that is needed to go on from there.
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

from open_lm.data.mixture import integer_weights, most_samples, next_source
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
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
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


# --- sources ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Source:
    """One stream of shards, with its share of the samples.

    `sizes` are the sequences of each shard, None where they are not known before the shard is read. `repeats` is how
    often each shard counts in a pass (or its relative chance to be drawn); empty means once each. `num_bytes` and
    `sha256` (hex) are what a manifest says of each shard's file; None and "" where none does.
    """

    name: str
    shards: tuple[str, ...]
    sizes: tuple[int | None, ...]
    weight: Fraction = Fraction(1)
    repeats: tuple[Fraction, ...] = ()
    num_bytes: tuple[int | None, ...] = ()
    sha256: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_bytes", self.num_bytes or (None,) * len(self.shards))
        object.__setattr__(self, "sha256", self.sha256 or ("",) * len(self.shards))

    @cached_property
    def num_sequences(self) -> int | None:
        """Sequences of the first pass, None where a size is not known."""
        total = 0
        for shard, size in enumerate(self.sizes):
            if size is None:
                return None
            total += size * copies_in_pass(self, shard, 0)
        return total

    @cached_property
    def fingerprint(self) -> str:
        """Names the shards and their order, wherever the folder lies."""
        stems = "\n".join(url.rpartition("/")[2] for url in self.shards)
        repeats = ",".join(map(str, self.repeats)) if any(factor != 1 for factor in self.repeats) else ""
        return hashlib.sha256(f"{stems}\n{repeats}".encode()).hexdigest()[:16]


def copies_in_pass(source: Source, shard: int, pass_number: int) -> int:
    """How often a shard is visited in a pass: its factor exactly, in the long run; once without one."""
    if not source.repeats:
        return 1
    factor = source.repeats[shard]
    shift = hash_key(shard) % factor.denominator
    parts = factor.numerator * pass_number + shift
    return (parts + factor.numerator) // factor.denominator - parts // factor.denominator


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
    """The position in one source: (pass, visit in the pass or draw, offset in the visit, samples so far)."""

    def __init__(self, number: int, source: Source, seed: int, order: Order, size_of: SizeOf) -> None:
        self.number, self.source, self.seed, self.order, self.size_of = number, source, seed, order, size_of
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
        return hash_key(self.seed, self.number, self.pass_number, self.visit)

    def _shard_at(self, visit: int) -> int | None:
        """The shard of a visit of this pass (or of a draw), None past the end of the pass."""
        if self.order.resampled:
            draw = hash_key(self.seed, self.number, visit, 1) % int(self._chances[-1])
            return int(np.searchsorted(self._chances, draw, side="right"))
        shards = self._shards_of_pass()
        return int(shards[visit]) if visit < len(shards) else None

    def _shards_of_pass(self) -> np.ndarray:
        if self._pass_order is None or self._pass_order[0] != self.pass_number:
            count = len(self.source.shards)
            copies = [copies_in_pass(self.source, shard, self.pass_number) for shard in range(count)]
            shards = np.repeat(np.arange(count), copies)
            if self.order.shuffle_shards:
                shards = shards[permutation(hash_key(self.seed, self.number, self.pass_number, -1), len(shards))]
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

    def upcoming(self) -> int | None:
        """The shard of the next visit, where it is in this pass."""
        return self._shard_at(self.visit + 1)

    def state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.source.fingerprint,
            "num_sequences": self.source.num_sequences,
            "pass": self.pass_number,
            "visit": self.visit,
            "offset": self.offset,
            "samples": self.samples,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.pass_number, self.visit, self.offset, self.samples = (
            int(state[name]) for name in ("pass", "visit", "offset", "samples")
        )


class Plan:
    """The order of samples from a position on.

    `size_of(source, shard)` tells sizes that the sources leave open. With a `state` the plan goes on from there, under
    that state's seed; a state of other sources or of another order is a DataError.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        order: Order | None = None,
        *,
        size_of: SizeOf | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.order = order or Order()
        self.seed = int(state["seed"]) if state else seed
        size_of = size_of or _unknown_size
        self._cursors = [_Cursor(n, source, self.seed, self.order, size_of) for n, source in enumerate(sources)]
        self._weights = integer_weights([source.weight for source in sources])
        self._total = sum(self._weights)
        if state:
            _check_state(state, sources, self.order)
            for cursor, saved in zip(self._cursors, state["sources"], strict=True):
                cursor.restore(saved)
        position = self.position
        self._credits = [
            weight * position - self._total * cursor.samples
            for weight, cursor in zip(self._weights, self._cursors, strict=True)
        ]

    @property
    def position(self) -> int:
        """Samples taken since the beginning."""
        return sum(cursor.samples for cursor in self._cursors)

    def take(self, count: int, partial: bool = False) -> Samples:
        """The next `count` samples; at the end of a single source's last pass fewer, when `partial`, else DataError."""
        if len(self._cursors) == 1:
            shard, member, key = self._cursors[0].take(count, partial)
            return Samples(np.zeros(len(shard), np.int64), shard, member, key)
        source = np.array(
            [next_source(self._credits, self._weights, self._total) for _ in range(count)], dtype=np.int64
        )
        samples = Samples(source, np.empty_like(source), np.empty_like(source), np.empty(count, np.uint64))
        for number, cursor in enumerate(self._cursors):
            places = np.flatnonzero(source == number)
            for array, values in zip(samples[1:], cursor.take(len(places)), strict=True):
                array[places] = values
        return samples

    def upcoming(self) -> list[tuple[int, int]]:
        """(source, shard) of the visits that follow the current ones, to be fetched ahead."""
        found = [(cursor.number, cursor.upcoming()) for cursor in self._cursors if self._weights[cursor.number]]
        return [(source, shard) for source, shard in found if shard is not None]

    def state(self) -> dict[str, Any]:
        """Where the plan stands: plain integers and strings, fit for JSON."""
        return {
            "seed": self.seed,
            "resampled": self.order.resampled,
            "shuffled": self.order.shuffle_samples,
            "sources": [cursor.state() for cursor in self._cursors],
        }


def _unknown_size(source: int, shard: int) -> int:
    raise DataError(f"the size of shard {shard} of source {source} is not known")


def _check_state(state: dict[str, Any], sources: Sequence[Source], order: Order) -> None:
    """A position only means something on the data it was taken from: DataError with everything that has changed."""
    problems = []
    if bool(state["resampled"]) != order.resampled:
        problems.append(f"--dataset-resampled was {bool(state['resampled'])}, now it is {order.resampled}")
    if bool(state["shuffled"]) != order.shuffle_samples:
        problems.append(f"--disable-buffer was {not state['shuffled']}, now it is {not order.shuffle_samples}")
    if len(state["sources"]) != len(sources):
        problems.append(f"there were {len(state['sources'])} sources, now there are {len(sources)}")
    else:
        for source, saved in zip(sources, state["sources"], strict=True):
            before, now = saved["num_sequences"], source.num_sequences
            if saved["fingerprint"] != source.fingerprint:
                problems.append(f"{source.name}: the names, order or upsampling of its shards differ")
            elif None not in (before, now) and before != now:
                problems.append(f"{source.name}: it held {before} sequences, now it holds {now}")
    if problems:
        raise DataError(
            join_problems(
                problems,
                "The training data is not that of the checkpoint; restore it, or begin a new run from its weights",
            )
        )
