"""The former data order, in which a source visits one shard at a time: for runs that started with it.

    one source     visits of shards, one at a time. A visit reads each sequence of its shard once, in an order fixed by
                   (seed, source, pass, visit). Without replacement, a pass visits every shard once, in a new order for
                   each pass; an upsampling factor f means f visits a pass, averaged over the passes. With replacement,
                   every visit draws a shard.
    all sources    interleaved sample by sample (mixture.py): after any n samples, a source has given n times its share,
                   to within one sample.
    global batch   batch k is samples [k * G, (k + 1) * G) of that order.

New runs use order.py, which mixes shards in every batch and lets each rank read its own shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from open_lm.data.hashing import hash_key, permutation
from open_lm.data.mixture import Interleaving, integer_weights
from open_lm.data.order_types import OrderSettings, Piece, Samples, SizeOf, Source, copies_in_pass, unknown_size
from open_lm.data.resume import resume_state
from open_lm.errors import DataError

_MAX_EMPTY_VISITS = 1000


class FormerOrder:
    """The former order of samples, with the interface of `DataOrder`.

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
        self.lanes = 1
        size_of = size_of or unknown_size
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

    def take(self, count: int, rows: np.ndarray | None = None, partial: bool = False) -> Samples:
        """Advance by `count` samples and return them, or only the `rows` (m,) of them: numbers from 0.

        When the last pass of a single source ends: fewer samples with `partial`, else DataError.
        """
        samples = self._take(count, partial)
        return samples if rows is None else Samples(*(array[rows[rows < len(array)]] for array in samples))

    def _take(self, count: int, partial: bool) -> Samples:
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

    def entered(self) -> list[Piece]:
        """Return the shards that must be opened next, in addition to those of the samples: none."""
        return []

    def upcoming(self, count: int = 1) -> list[Piece]:
        """Return the shards of the visits after the current ones, to fetch ahead, the nearest first.

        One visit for each source, or more as long as that is at most `count` in total.
        """
        cursors = [cursor for cursor in self._cursors if self._weights[cursor.number]]
        shards = [cursor.upcoming(max(1, count // len(cursors))) for cursor in cursors]
        visits = [(cursor.number, row) for cursor, row in zip(cursors, shards, strict=True)]
        depth = max(map(len, shards))
        return [Piece(source, row[number]) for number in range(depth) for source, row in visits if number < len(row)]

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
