"""Token ids to sequences of one fixed length. Pure functions: nothing is lost, nothing comes twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from open_lm.data.shard_format import PAD_ID


def cut(parts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the joined `parts` (1-D, one type) into sequences (n, length) and the shorter tail after them."""
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    whole = len(ids) // length * length
    return ids[:whole].reshape(-1, length), ids[whole:]


def join_tails(tails: Sequence[np.ndarray], length: int, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The same for the tails that units of work left over: sequences (n, length) and the one final tail."""
    return cut([np.zeros(0, dtype), *tails], length)


def pad(tail: np.ndarray, length: int) -> np.ndarray:
    """The final tail as one sequence, int64 (length,), filled up with PAD_ID at its end."""
    sequence = np.full(length, PAD_ID, np.int64)
    sequence[: len(tail)] = tail
    return sequence
