"""Token ids to sequences of one fixed length. Pure functions: nothing is lost, nothing comes twice."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

from open_lm.data.shard_format import PAD_ID


def cut(parts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the joined `parts` (1-D, one type) into sequences (n, length) and the shorter tail after them."""
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    whole = len(ids) // length * length
    return ids[:whole].reshape(-1, length), ids[whole:]


def pad(tail: np.ndarray, length: int) -> np.ndarray:
    """The final tail as one sequence, int64 (length,), filled up with PAD_ID at its end."""
    sequence = np.full(length, PAD_ID, np.int64)
    sequence[: len(tail)] = tail
    return sequence


def padded_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The smallest signed type that holds the ids of an unsigned one, and PAD_ID."""
    return np.promote_types(dtype, np.int8)


class DocumentPacker:
    """Packs documents so that none goes from one sequence on into the next.

    A document longer than a sequence is cut at multiples of the length. What is left of it, like every shorter
    document, goes whole into the sequence with the least room that still holds it, or begins a new one (best fit;
    see Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). At most `max_open` sequences wait for more;
    beyond that the fullest is closed. With `keep_order` only one waits, and is closed by the first document that it has
    no room for. Sequences are padded with PAD_ID at their end.
    """

    def __init__(self, length: int, dtype: np.dtype[Any], *, keep_order: bool = False, max_open: int = 512) -> None:
        self._length, self._dtype, self._keep_order, self._max_open = length, padded_dtype(dtype), keep_order, max_open
        self._open: list[tuple[int, int]] = []  # (room, number of the sequence), sorted
        self._parts: dict[int, list[np.ndarray]] = {}
        self._next = 0

    def add(self, ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Take documents ids[ends[i - 1] : ends[i]]; returns the sequences that are full or closed, (n, length)."""
        done: list[np.ndarray] = []
        start = 0
        for end in ends.tolist():
            if self._keep_order and self._open and self._open[0][0] < end - start:
                done += list(self.finish())
            sequences, rest = cut([ids[start:end]], self._length)
            done += list(sequences)
            if len(rest):
                done += self._place(rest)
            start = end
        return self._stack(done)

    def finish(self) -> np.ndarray:
        """The sequences that still waited, (n, length), in the order in which they were begun."""
        rest = [self._close(number) for number in sorted(self._parts)]
        self._open = []
        return self._stack(rest)

    def _place(self, part: np.ndarray) -> list[np.ndarray]:
        at = bisect_left(self._open, (len(part), -1))
        if at < len(self._open):
            room, number = self._open.pop(at)
        else:
            room, number = self._length, self._next
            self._next += 1
            self._parts[number] = []
        self._parts[number].append(part)
        if room == len(part):
            return [self._close(number)]
        insort(self._open, (room - len(part), number))
        return [self._close(self._open.pop(0)[1])] if len(self._open) > self._max_open else []

    def _close(self, number: int) -> np.ndarray:
        ids = np.concatenate(self._parts.pop(number))
        return np.concatenate([ids, np.full(self._length - len(ids), PAD_ID, self._dtype)])

    def _stack(self, sequences: list[np.ndarray]) -> np.ndarray:
        if not sequences:
            return np.zeros((0, self._length), self._dtype)
        return np.stack(sequences).astype(self._dtype, copy=False)
