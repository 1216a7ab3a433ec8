"""Turn token ids into sequences of a fixed length. Pure functions that neither drop nor duplicate ids."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

from open_lm.data.shard_format import PAD_ID


def cut(parts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate `parts` (1-D, one dtype) and cut them into sequences (n, length) and a tail shorter than `length`."""
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    end = len(ids) // length * length
    return ids[:end].reshape(-1, length), ids[end:]


def pad(tail: np.ndarray, length: int) -> np.ndarray:
    """Return the tail as one sequence, int64 (length,), padded at its end with PAD_ID."""
    sequence = np.full(length, PAD_ID, np.int64)
    sequence[: len(tail)] = tail
    return sequence


def padded_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the smallest signed dtype that holds PAD_ID and all ids of an unsigned `dtype`."""
    return np.promote_types(dtype, np.int8)


class DocumentPacker:
    """A packer of documents into sequences, such that a document does not continue in the next sequence.

    A document longer than a sequence is cut at multiples of the length. Its remainder, like every shorter document, is
    placed without a cut into the open sequence with the least free space that still fits it, or opens a new sequence
    (best fit; see Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). At most `max_open` sequences are
    open; beyond that the fullest is closed. With `keep_order` only one sequence is open, and the first document that
    does not fit closes it. Sequences are padded at their end with PAD_ID.
    """

    def __init__(self, length: int, dtype: np.dtype[Any], *, keep_order: bool = False, max_open: int = 512) -> None:
        self._length, self._dtype, self._keep_order, self._max_open = length, padded_dtype(dtype), keep_order, max_open
        self._open: list[tuple[int, int]] = []  # (free ids, sequence number), sorted
        self._parts: dict[int, list[np.ndarray]] = {}
        self._next = 0

    def add(self, ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Add the documents ids[ends[i - 1] : ends[i]]; return the completed sequences, (n, length)."""
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
        """Close all open sequences and return them, (n, length), in the order in which they were opened."""
        remaining = [self._close(number) for number in sorted(self._parts)]
        self._open = []
        return self._stack(remaining)

    def _place(self, part: np.ndarray) -> list[np.ndarray]:
        best = bisect_left(self._open, (len(part), -1))
        if best < len(self._open):
            free, number = self._open.pop(best)
        else:
            free, number = self._length, self._next
            self._next += 1
            self._parts[number] = []
        self._parts[number].append(part)
        if free == len(part):
            return [self._close(number)]
        insort(self._open, (free - len(part), number))
        return [self._close(self._open.pop(0)[1])] if len(self._open) > self._max_open else []

    def _close(self, number: int) -> np.ndarray:
        ids = np.concatenate(self._parts.pop(number))
        return np.concatenate([ids, np.full(self._length - len(ids), PAD_ID, self._dtype)])

    def _stack(self, sequences: list[np.ndarray]) -> np.ndarray:
        if not sequences:
            return np.zeros((0, self._length), self._dtype)
        return np.stack(sequences).astype(self._dtype, copy=False)
