"""The order of one source in lanes if the sizes of its shards are known only after they were opened.

Each lane takes the next visit of the pass when its own is finished; a lane that finds none passes its turns on. Every
process must open every shard, to know when that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from open_lm.data.hashing import hash_key
from open_lm.data.lanes import MAX_EMPTY_PASSES, NO_ROWS, CursorInputs, Rows, raise_used_up
from open_lm.data.order_types import Piece
from open_lm.errors import DataError

_MAX_LANES = 64


class QueueCursor:
    """The position in a source: for each of its lanes, a visit of the pass and an offset in the visit."""

    def __init__(self, inputs: CursorInputs) -> None:
        self.inputs = inputs
        self.stream = inputs.number
        self.samples = 0
        self._num_lanes = max(1, min(_MAX_LANES, inputs.layout.lanes))
        self._sizes: dict[int, int] = {}  # of the visits that lanes are in
        self._orders: dict[int, tuple[np.uint64, np.ndarray]] = {}  # by visit, of lanes that rows were selected from
        self._entered: list[Piece] = []
        self._set_pass(0)

    def _set_pass(self, number: int) -> None:
        self.pass_number, self._turn, self._next_visit = number, 0, 0
        self._lanes: list[list[int]] = []  # [visit, offset] of the lanes that have started and are not finished
        self._sizes, self._orders = {}, {}
        self._shards = self.inputs.visits(self.stream, number)

    def take(self, is_shared: np.ndarray, selected: np.ndarray, partial: bool = False) -> tuple[int, Rows]:
        """Advance by the rows `is_shared` (n,) bool; return their number, and the `selected` ones (m,), sorted.

        Fewer than n with `partial`, if the last pass ends, else DataError. Shared rows come from the lanes as well.
        """
        wanted = set(selected.tolist())
        rows: list[tuple[int, int, np.uint64]] = []
        done = empty_passes = 0
        while done < len(is_shared):
            lane = self._next_lane()
            if lane is None:
                if partial and self._is_last_pass:
                    break
                if self._is_last_pass:
                    raise_used_up(self.inputs.name, self.samples + done, len(is_shared) - done)
                empty_passes += 1
                if empty_passes > MAX_EMPTY_PASSES:
                    raise DataError(f"{self.inputs.name}: all of its shards are empty")
                self._set_pass(self.pass_number + 1)
                continue
            visit, offset = lane
            if done in wanted:
                key, order = self._order(visit)
                rows.append((int(self._shards[visit]), int(order[offset]), key))
            lane[1], done, empty_passes = offset + 1, done + 1, 0
        self.samples += done
        if not rows:
            return done, NO_ROWS
        shard, member, keys = zip(*rows, strict=True)
        return done, (np.array(shard, np.int64), np.array(member, np.int64), np.array(keys, np.uint64))

    def _next_lane(self) -> list[int] | None:
        """Return the lane of the next row, positioned at it; None at the end of the pass."""
        while True:
            if self._turn == len(self._lanes) < self._num_lanes and self._next_visit < len(self._shards):
                self._lanes.append([self._next_visit, 0])
                self._next_visit += 1
            if not self._lanes:
                return None
            self._turn %= len(self._lanes)
            lane = self._lanes[self._turn]
            while lane[1] >= self._size(lane[0]):
                self._sizes.pop(lane[0], None)
                self._orders.pop(lane[0], None)
                if self._next_visit == len(self._shards):
                    del self._lanes[self._turn]
                    break
                lane[:] = [self._next_visit, 0]
                self._next_visit += 1
            else:
                self._turn += 1
                return lane

    def _size(self, visit: int) -> int:
        if visit not in self._sizes:
            shard = int(self._shards[visit])
            known = self.inputs.source.sizes[shard]
            self._sizes[visit] = self.inputs.size_of(self.inputs.number, shard) if known is None else known
        return self._sizes[visit]

    def _order(self, visit: int) -> tuple[np.uint64, np.ndarray]:
        """Return the key of a visit, and the members of its shard in reading order."""
        if visit not in self._orders:
            key = hash_key(self.inputs.seed, self.stream, self.pass_number, visit)
            size = self._size(visit)
            self._orders[visit] = np.uint64(key), self.inputs.reading_order(key, size)
        return self._orders[visit]

    @property
    def _is_last_pass(self) -> bool:
        return self.inputs.is_last(self.pass_number)

    def entered(self) -> list[Piece]:
        """Return the shards that lanes are in after `restore`, once: all must be opened to continue."""
        entered, self._entered = self._entered, []
        return entered

    def upcoming(self, count: int) -> Iterator[tuple[int, Piece]]:
        """Yield the next `count` visits of the pass, and the rounds until they start at the earliest."""
        offsets = (self._size(visit) - offset for visit, offset in self._lanes)
        rounds = [0] * (self._num_lanes - len(self._lanes)) + sorted(offsets)
        visits = self._shards[self._next_visit : self._next_visit + count].tolist()
        for wait, shard in zip(rounds, visits, strict=False):
            yield wait, Piece(self.inputs.number, shard)

    def position(self) -> dict[str, Any]:
        """Return the position as integers, ready for JSON."""
        return {
            "pass": self.pass_number,
            "queue": [list(lane) for lane in self._lanes],
            "num_lanes": self._num_lanes,
            "next_visit": self._next_visit,
            "turn": self._turn,
            "samples": self.samples,
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Move to a result of `position`."""
        self._set_pass(int(position["pass"]))
        self._lanes = [[int(visit), int(offset)] for visit, offset in position["queue"]]
        self._num_lanes, self._next_visit, self._turn, self.samples = (
            int(position[name]) for name in ("num_lanes", "next_visit", "turn", "samples")
        )
        self._entered = [Piece(self.inputs.number, int(self._shards[visit])) for visit, _ in self._lanes]
