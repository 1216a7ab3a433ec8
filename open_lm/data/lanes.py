"""The order of one source in lanes, computed from its position alone. The sizes of its shards are known.

    pass    shard visits in shuffled order, laid end to end:  | 7 |   2   | 5 | 0 |    3    | 6 |  1  | 4 |
    lanes   F equal parts of this line, and a shared lane:    |  lane 0  |  lane 1  |  lane 2  | shared |

Row t of the source comes from lane t mod F. A lane is read from its start to its end, so it needs one shard at a time.
The part of a visit that is in a lane is a piece; the sequences of a piece are shuffled. All lanes end together, to
within one sequence. The shared lane serves the rows that are beyond a multiple of F in a round (see order.py). Its
length is an estimate, slightly too large: after the last sequence of the other lanes, it also serves their last rows.

`LaneCursor` is the position in a source whose sizes are known: two counters within a pass. For others see
queued_lanes.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from open_lm.data.hashing import hash_key, permutation
from open_lm.data.mixture import SourceLayout
from open_lm.data.order_types import OrderSettings, Piece, SizeOf, Source, visits_of_pass
from open_lm.errors import DataError

MAX_EMPTY_PASSES = 1000
_MAX_NEXT_PIECES = 64
_SPARE_SHARED_ROWS = 2  # the number of shared rows of a pass differs by less from its share
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # shard int64 (n,), member int64 (n,), key uint64 (n,)


@dataclass(frozen=True)
class CursorInputs:
    """What the order of one source depends on, besides its `stream` number. `number` is its index in the mixture."""

    number: int
    source: Source
    seed: int
    settings: OrderSettings
    size_of: SizeOf
    layout: SourceLayout

    @property
    def name(self) -> str:
        return self.source.name

    def is_last(self, pass_number: int) -> bool:
        """Return whether no pass may follow."""
        return self.settings.max_passes is not None and pass_number + 1 >= self.settings.max_passes

    def visits(self, stream: int, pass_number: int) -> np.ndarray:
        """Return the shards that a pass visits, in order: int64 (visits,)."""
        return visits_of_pass(self.source, self.seed, stream, pass_number, self.settings)

    def reading_order(self, key: int, size: int) -> np.ndarray:
        """Return the order in which `size` consecutive members are read: int64 (size,)."""
        return permutation(key, size) if self.settings.shuffle_samples else np.arange(size)


@dataclass(frozen=True)
class Pass:
    """A pass over a source: its visits, and how its sequences are divided among lanes.

    `shards` and `ends` (visits,) int64 are the visited shards and the total size of the visits up to each one. The last
    `shared_size` sequences are the shared lane.
    """

    number: int
    shards: np.ndarray
    ends: np.ndarray
    lanes: int
    shared_size: int

    @cached_property
    def total(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def lanes_size(self) -> int:
        return self.total - self.shared_size

    def start(self, lane: int) -> int:
        """Return the first place of a lane on the line of sequences; the shared lane follows the others."""
        size, rest = divmod(self.lanes_size, self.lanes or 1)
        return lane * size + min(lane, rest)

    def end(self, lane: int) -> int:
        return self.total if lane == self.lanes else self.start(lane + 1)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return lane and place on the line, int64 (n,), of sequences by number: first all of the lanes, then shared.

        The lanes' sequences are numbered in the order of their use: 0 is the first of lane 0, 1 the first of lane 1.
        """
        size, rest = divmod(self.lanes_size, self.lanes or 1)
        index, lane = np.divmod(numbers, self.lanes or 1)
        place = lane * size + np.minimum(lane, rest) + index
        if not self.shared_size:
            return lane, place
        is_shared = numbers >= self.lanes_size
        return np.where(is_shared, self.lanes, lane), np.where(is_shared, numbers, place)

    def piece_at(self, lane: int, place: int) -> tuple[int, int, int, int]:
        """Return the piece of a lane at a place: visit, and first place, end and first member of the piece."""
        visit = int(self.ends.searchsorted(place, side="right"))
        visit_start = int(self.ends[visit - 1]) if visit else 0
        start = max(visit_start, self.start(lane))
        stop = min(int(self.ends[visit]), self.end(lane))
        return visit, start, stop, start - visit_start


class _OpenPiece(NamedTuple):
    """A piece that is being read, and the place of its next row."""

    pass_number: int
    start: int  # place on the line
    stop: int
    piece: Piece
    key: np.uint64
    members: np.ndarray  # (stop - start,) in reading order


class LaneCursor:
    """The position in a source of known sizes: a pass, and the rows taken in it from its lanes and its shared lane.

    `stream` enters every hash, so that each source has its own order: the source's number when it was added to the run.
    A saved pass keeps its division into lanes, even if the layout has changed since.
    """

    def __init__(self, inputs: CursorInputs) -> None:
        self.inputs = inputs
        self.stream = inputs.number
        self.pass_number = self.fixed = self.shared = self.samples = 0
        self._saved_division: tuple[int, int] | None = None
        self._passes: dict[int, Pass] = {}
        self._open: dict[int, _OpenPiece] = {}  # by lane
        self._next: dict[tuple[int, int, int], Piece] = {}  # after the piece of a pass and lane that ends there
        self._entered: list[Piece] = []
        self._ahead: tuple[int, list[tuple[int, Piece]]] | None = None  # until a piece is entered

    def take(self, is_shared: np.ndarray, selected: np.ndarray, partial: bool = False) -> tuple[int, Rows]:
        """Advance by the rows `is_shared` (n,) bool; return their number, and the `selected` ones (m,), sorted.

        Fewer than n with `partial`, if the last pass ends, else DataError.
        """
        count, done, parts = len(is_shared), 0, []
        while done < count:
            current = self._pass(self.pass_number)
            step = min(count - done, current.total - self.fixed - self.shared)
            if step == 0:
                if partial and self._is_last_pass:
                    break
                self._start_pass(self.samples + done, count - done)
                continue
            numbers = self._advance(current, is_shared[done : done + step])
            first, last = np.searchsorted(selected, (done, done + step))
            parts.append(self._rows(current, numbers[selected[first:last] - done]))
            done += step
        self.samples += done
        return done, join_rows(parts)

    def _advance(self, current: Pass, is_shared: np.ndarray) -> np.ndarray:
        """Count rows of the current pass as taken, and return their numbers (see `Pass.locate`)."""
        lanes_size, num_shared = current.lanes_size, int(np.count_nonzero(is_shared))
        fixed, shared = self.fixed, self.shared
        self.fixed, self.shared = fixed + len(is_shared) - num_shared, shared + num_shared
        if self.fixed <= lanes_size and self.shared <= current.shared_size:
            if not num_shared:
                return np.arange(fixed, self.fixed)
            before = np.cumsum(is_shared)
            return np.where(is_shared, lanes_size + shared + before - 1, fixed + np.arange(len(before)) - before)
        numbers = np.empty(len(is_shared), np.int64)  # near the end of the pass: a lane may be finished
        for row, from_shared in enumerate(is_shared.tolist()):
            if shared < current.shared_size and (from_shared or fixed == lanes_size):
                numbers[row], shared = lanes_size + shared, shared + 1
            else:
                numbers[row], fixed = fixed, fixed + 1
        self.fixed, self.shared = fixed, shared
        return numbers

    def _rows(self, current: Pass, numbers: np.ndarray) -> Rows:
        if not len(numbers):
            return NO_ROWS
        lanes, places = current.locate(numbers)
        pieces = [
            self._piece(current, lane, place) for lane, place in zip(lanes.tolist(), places.tolist(), strict=True)
        ]
        shard = np.array([opened.piece.shard for opened in pieces], np.int64)
        key = np.array([opened.key for opened in pieces], np.uint64)
        offsets = (places - np.array([opened.start for opened in pieces])).tolist()
        member = [opened.members[offset] for opened, offset in zip(pieces, offsets, strict=True)]
        return shard, np.array(member, np.int64), key

    def _piece(self, current: Pass, lane: int, place: int) -> _OpenPiece:
        """Return the piece of a lane at a place; the last one of each lane is kept."""
        found = self._open.get(lane)
        if found is None or found.pass_number != current.number or not found.start <= place < found.stop:
            visit, start, stop, first = current.piece_at(lane, place)
            key = hash_key(self.inputs.seed, self.stream, current.number, visit, lane)
            size = stop - start
            order = self.inputs.reading_order(key, size)
            piece = Piece(self.inputs.number, int(current.shards[visit]), first, first + size)
            found = _OpenPiece(current.number, start, stop, piece, np.uint64(key), (order + first).astype(np.uint32))
            self._open[lane] = found
            self._entered.append(piece)
            self._ahead = None
        return found

    @property
    def _is_last_pass(self) -> bool:
        return self.inputs.is_last(self.pass_number)

    def _start_pass(self, used: int, missing: int) -> None:
        if self._is_last_pass:
            raise_used_up(self.inputs.name, used, missing)
        for number in range(self.pass_number + 1, self.pass_number + 2 + MAX_EMPTY_PASSES):
            if self._pass(number).total:
                self.pass_number, self.fixed, self.shared, self._saved_division = number, 0, 0, None
                self._ahead = None
                self._passes = {number: self._passes[number]}
                self._open = {lane: opened for lane, opened in self._open.items() if opened.pass_number == number - 1}
                return
            self._passes.pop(number)
        raise DataError(f"{self.inputs.name}: all of its shards are empty")

    def _pass(self, number: int) -> Pass:
        if number not in self._passes:
            shards = self.inputs.visits(self.stream, number)
            ends = np.cumsum(self._sizes[shards])
            total = int(ends[-1]) if len(ends) else 0
            division = self._saved_division if number == self.pass_number else None
            self._passes[number] = Pass(number, shards, ends, *(division or self._divide(total)))
        return self._passes[number]

    @cached_property
    def _sizes(self) -> np.ndarray:
        sizes = self.inputs.source.sizes
        if not self.inputs.source.has_sizes:  # the position was saved with a manifest, which is missing now
            sizes = tuple(
                self.inputs.size_of(self.inputs.number, n) if size is None else size for n, size in enumerate(sizes)
            )
        return np.array(sizes, np.int64)

    def _divide(self, total: int) -> tuple[int, int]:
        """Return the number of lanes of a pass over `total` sequences, and the size of its shared lane."""
        lanes, shared = self.inputs.layout.lanes, self.inputs.layout.shared
        if not shared:
            return lanes, 0
        if not lanes:
            return 0, total
        return lanes, min(total, int(total * shared / (lanes + shared)) + 1 + _SPARE_SHARED_ROWS)

    def entered(self) -> list[Piece]:
        """Return the pieces whose first row was taken since the last call."""
        entered, self._entered = self._entered, []
        return entered

    def upcoming(self, count: int) -> Iterator[tuple[int, Piece]]:
        """Yield the next pieces of the lanes that rows were selected from, and the rounds until then at the most.

        Those of the `count` lanes whose present piece ends first.
        """
        done = self.fixed // (self._pass(self.pass_number).lanes or 1)
        if self._ahead is None or self._ahead[0] != count:
            self._ahead = count, list(self._pieces_ahead(count, done))
        for end, piece in self._ahead[1]:
            yield max(0, end - done), piece

    def _pieces_ahead(self, count: int, done: int) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces of `upcoming` after `done` rounds, and the rounds of the pass until then."""
        current = self._pass(self.pass_number)
        ends = []
        for lane, opened in self._open.items():
            if opened.pass_number == current.number:
                place = current.start(lane) + (0 if lane < current.lanes else self.shared - done)
                ends.append((opened.stop - place, lane))
        for end, lane in heapq.nsmallest(count, ends):
            piece = self._following(current, lane, self._open[lane].stop)
            if piece is not None:
                yield end, piece

    def _following(self, current: Pass, lane: int, place: int) -> Piece | None:
        """Return the piece that a slot reads after the one of its lane that ends at a place; None if not known yet."""
        key = (current.number, lane, place)
        piece = self._next.get(key)
        if piece is None:
            if place < current.end(lane):
                piece = self._piece_from(current, lane, place)
            elif not self._is_last_pass:
                piece = self._first_of_next_pass(current, lane)
            if piece is not None:
                self._next[key] = piece
            while len(self._next) > 2 * len(self._open) + _MAX_NEXT_PIECES:
                self._next.pop(next(iter(self._next)))
        return piece

    def _first_of_next_pass(self, current: Pass, lane: int) -> Piece | None:
        """Return the piece that the slot of a lane reads first in the next pass; None if another slot may read it.

        The next pass starts at the slot after the last one of this pass, which depends on the number of shared rows. It
        is known to within a few rows, so only lanes are certain to stay whose neighbors are read here as well.
        """
        following, margin = self._pass(current.number + 1), 0
        num_shared = self.shared
        if current.shared_size:
            layout, margin = self.inputs.layout, _SPARE_SHARED_ROWS
            remaining = current.total - self.fixed - self.shared
            num_shared += round(remaining * layout.shared / (layout.lanes + layout.shared))
        if lane == current.lanes or following.lanes != current.lanes:
            return None
        for neighbor in range(lane - margin, lane + margin + 1):
            opened = self._open.get(neighbor % current.lanes)
            if opened is None or opened.pass_number != current.number:
                return None
        next_lane = (lane - current.total + num_shared) % current.lanes
        start = following.start(next_lane)
        return self._piece_from(following, next_lane, start) if start < following.end(next_lane) else None

    def _piece_from(self, pass_: Pass, lane: int, place: int) -> Piece:
        visit, start, stop, first = pass_.piece_at(lane, place)
        return Piece(self.inputs.number, int(pass_.shards[visit]), first, first + stop - start)

    def position(self) -> dict[str, Any]:
        """Return the position as integers, ready for JSON."""
        current = self._pass(self.pass_number) if self.fixed or self.shared else None
        return {
            "pass": self.pass_number,
            "fixed": self.fixed,
            "shared": self.shared,
            "division": [current.lanes, current.shared_size] if current else None,
            "samples": self.samples,
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Move to a result of `position`."""
        self.pass_number, self.fixed, self.shared, self.samples = (
            int(position[name]) for name in ("pass", "fixed", "shared", "samples")
        )
        self._passes, self._open, self._next, self._entered, self._ahead = {}, {}, {}, [], None
        self._saved_division = (
            (int(position["division"][0]), int(position["division"][1])) if position["division"] else None
        )


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Concatenate rows."""
    if len(parts) == 1:
        return parts[0]
    shard, member, key = (np.concatenate([NO_ROWS[column], *(part[column] for part in parts)]) for column in range(3))
    return shard, member, key


NO_ROWS: Rows = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))


def raise_used_up(name: str, used: int, missing: int) -> None:
    """Raise DataError: the last pass over a source has ended."""
    raise DataError(
        f"{name}: all {used} sequences are used up, but {missing} more are needed; use "
        "--multiple-data-passes, more data, or a smaller --train-num-samples or --epochs"
    )
