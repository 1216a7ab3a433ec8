"""Data order: which sample comes next. A pure function of (sources, seed, position).

Batch path: loader.py asks `DataOrder` for the samples of each global batch; next: stream.py reads them.

    round          L consecutive samples of the order, one in each of L slots. L, the number of lanes, divides the
                   global batch (`choose_lanes`), so that a rank always reads the same slots (`rows_of_rank`).
    all sources    a source with the share s of the mixture has floor(L * s) fixed slots, which always belong to it. The
                   few remaining ones, at the end of the round, are shared: the sources alternate in them (mixture.py)
                   so that after any number of rounds, each has given its share to within one sample.
    one source     each fixed slot reads its own lane, an equal part of the pass (lanes.py). So a batch holds sequences
                   of many shards, and a rank reads its own shards. Without replacement, a pass visits every shard once,
                   in a new order for each pass; an upsampling factor f means f visits a pass, averaged over the passes.
                   With replacement, every visit of a pass draws a shard.

The state after any sample is a few integers and a fingerprint for each source, which is all that resuming needs.
There is no I/O here: a callable returns the sizes of shards that have no manifest. Runs that started with the order
before this one continue in it: see former_order.py and `make_order`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from open_lm.data.fetch import is_read_in_blocks, needs_fetch
from open_lm.data.former_order import FormerOrder
from open_lm.data.lanes import CursorInputs, LaneCursor
from open_lm.data.mixture import Interleaving, Slots, integer_weights
from open_lm.data.order_types import OrderSettings, Piece, Samples, SizeOf, Source, copies_in_pass, unknown_size
from open_lm.data.queued_lanes import QueueCursor
from open_lm.data.resume import resume_state

__all__ = [
    "DataOrder", "FormerOrder", "OrderSettings", "Piece", "Samples", "SizeOf", "Source", "choose_lanes",
    "copies_in_pass", "make_order", "rows_of_rank",
]  # fmt: skip

ORDER_NAME = "lanes"
_MAX_LANES = 1024
_MIN_LANES = 64
_MAX_WHOLE_BYTES = 64 << 30  # of one shard of each lane
_UNKNOWN_SHARD_BYTES = 64 << 20


def choose_lanes(global_batch_size: int, sources: Sequence[Source] = (), has_cache: bool = False) -> int:
    """Return the number of lanes of a new run: the largest divisor of the global batch from 64 to 1,024.

    Fewer, but at least 64, if the `sources` have remote shards that are fetched whole (all of them if the run
    `has_cache`), and one of each lane would take more than 64 GiB. If no divisor is in this range, the smallest one
    that is at least 64; a smaller global batch has a lane for each sequence.
    """
    if global_batch_size <= _MIN_LANES:
        return global_batch_size
    largest = max((_whole_shard_bytes(source, has_cache) for source in sources), default=0)
    limit = min(_MAX_LANES, _MAX_WHOLE_BYTES // largest) if largest else _MAX_LANES
    divisors = [lanes for lanes in range(_MIN_LANES, global_batch_size + 1) if global_batch_size % lanes == 0]
    return max((lanes for lanes in divisors if lanes <= limit), default=divisors[0])


def _whole_shard_bytes(source: Source, has_cache: bool) -> int:
    """Return the mean size of the remote shards of a source that are fetched whole; 0 without any."""
    columns = zip(source.shards, source.num_bytes, source.block_sums, strict=True)
    sizes = [
        num_bytes or _UNKNOWN_SHARD_BYTES
        for url, num_bytes, sums in columns
        if needs_fetch(url) and not is_read_in_blocks(url, sums, has_cache)
    ]
    return sum(sizes) // len(sizes) if sizes else 0


def rows_of_rank(lanes: int, global_batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Return the rows of a global batch that a rank reads, int64 (global_batch_size / world_size,).

    Sorted by slot, ranks own consecutive rows, and thus neighboring lanes of each source.
    """
    rounds = global_batch_size // lanes if global_batch_size % lanes == 0 else 1
    size = global_batch_size // world_size
    slot, number = np.divmod(np.arange(rank * size, (rank + 1) * size), rounds)
    return number * (global_batch_size // rounds) + slot


class DataOrder:
    """The order of samples from a position on.

    `size_of(source, shard)` returns the sizes that the sources do not know. With a `state` the order resumes there,
    with that state's seed and lanes. A state of other data or of another order is a DataError, or with `allow_changed`
    a `change_warning` that lists the changes and where each source resumes.
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
        self.lanes = int(state["lanes"]) if state else self.settings.lanes
        self._sources, self._size_of = sources, size_of or unknown_size
        self._weights = integer_weights([source.weight for source in sources])
        self._slots = Slots(self._weights, self.lanes)
        self._cursors = [self._cursor(number, source.has_sizes) for number, source in enumerate(sources)]
        self.change_warning = ""
        if state:
            names = [source.name for source in sources]
            accepted, self.change_warning = resume_state(state, self.state(), names, allow_changed)
            for number, position in enumerate(accepted["sources"]):
                self._cursors[number] = self._cursor(number, "queue" not in position)
                self._cursors[number].stream = position["stream"]
                self._cursors[number].restore(position)
        counts = self._slots.shared_counts([cursor.samples for cursor in self._cursors])
        self._interleaving = Interleaving(self._slots.shared_weights, counts)

    def _cursor(self, number: int, has_sizes: bool) -> LaneCursor | QueueCursor:
        source, layout = self._sources[number], self._slots.layouts[number]
        inputs = CursorInputs(number, source, self.seed, self.settings, self._size_of, layout)
        return LaneCursor(inputs) if has_sizes else QueueCursor(inputs)

    @property
    def position(self) -> int:
        """Samples taken since the beginning, or since the data was changed."""
        return sum(cursor.samples for cursor in self._cursors)

    def take(self, count: int, rows: np.ndarray | None = None, partial: bool = False) -> Samples:
        """Advance by `count` samples and return them, or only the `rows` (m,) of them: numbers from 0, any order.

        When the last pass of a single source ends: fewer samples with `partial`, else DataError.
        """
        slots = self._slots.fixed[(self.position + np.arange(count)) % self.lanes]
        if len(self._cursors) == 1:
            return self._take_single(slots < 0, rows, partial)
        is_shared = slots < 0
        source = slots.copy()
        source[is_shared] = self._interleaving.take(int(np.count_nonzero(is_shared)))
        rows = np.arange(count) if rows is None else rows
        samples = _empty_samples(source[rows])
        for number, cursor in enumerate(self._cursors):
            of_source = np.flatnonzero(source == number)
            places = np.flatnonzero(samples.source == number)
            order = np.argsort(rows[places], kind="stable")
            _, columns = cursor.take(is_shared[of_source], np.searchsorted(of_source, rows[places][order]))
            for array, values in zip(samples[1:], columns, strict=True):
                array[places[order]] = values
        return samples

    def _take_single(self, is_shared: np.ndarray, rows: np.ndarray | None, partial: bool) -> Samples:
        selected = np.arange(len(is_shared)) if rows is None else np.sort(rows)
        done, columns = self._cursors[0].take(is_shared, selected, partial)
        if rows is not None:
            places = np.searchsorted(selected, rows[rows < done])
            columns = (columns[0][places], columns[1][places], columns[2][places])
        return Samples(np.zeros(len(columns[0]), np.int64), *columns)

    def entered(self) -> list[Piece]:
        """Return the pieces of shards whose first row was taken since the last call."""
        return [piece for cursor in self._cursors for piece in cursor.entered()]

    def upcoming(self, count: int = 1) -> list[Piece]:
        """Return the next pieces, to fetch ahead: those of the lanes that rows were taken from, the nearest first."""
        cursors = (cursor for cursor in self._cursors if self._weights[cursor.inputs.number])
        pieces = [item for cursor in cursors for item in cursor.upcoming(count)]
        pieces.sort(key=lambda item: item[0])  # by rounds until then; equal ones stay in the order of their rows
        return [piece for _, piece in islice(pieces, count)]

    def state(self) -> dict[str, Any]:
        """Return the position as integers and strings, ready for JSON."""
        return {
            "order": ORDER_NAME,
            "lanes": self.lanes,
            "seed": self.seed,
            "resampled": self.settings.resampled,
            "shuffled": self.settings.shuffle_samples,
            "sources": [
                {
                    "fingerprint": cursor.inputs.source.fingerprint,
                    "num_sequences": cursor.inputs.source.num_sequences,
                    "data_key": cursor.inputs.source.data_key,
                    "weight": weight,
                    "stream": cursor.stream,
                    **cursor.position(),
                }
                for cursor, weight in zip(self._cursors, self._weights, strict=True)
            ],
        }


def _empty_samples(source: np.ndarray) -> Samples:
    return Samples(source, np.empty_like(source), np.empty_like(source), np.empty(len(source), np.uint64))


def make_order(
    sources: Sequence[Source],
    seed: int,
    settings: OrderSettings,
    *,
    state: dict[str, Any] | None = None,
    **options: Any,
) -> DataOrder | FormerOrder:
    """Return the order of a run: the one that its `state` names, or for a new run the present one."""
    kind = FormerOrder if state and "order" not in state else DataOrder
    return kind(sources, seed, settings, state=state, **options)
