"""Integer hashes and permutations (splitmix64). The values never change: they are part of the data order.

numpy's own random generators may change between numpy versions, so they are not used here.
"""

from __future__ import annotations

import numpy as np

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Scatter uint64 values (n,) evenly with a bijection (SplitMix64; Steele, Lea and Flood 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(_MIX_1)
    values = (values ^ values >> np.uint64(27)) * np.uint64(_MIX_2)
    return values ^ values >> np.uint64(31)


def hash_key(*values: int) -> int:
    """Return a 64-bit hash of integers (chained splitmix64)."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK_64)) + GOLDEN_GAMMA & _MASK_64
        state = (state ^ state >> 30) * _MIX_1 & _MASK_64
        state = (state ^ state >> 27) * _MIX_2 & _MASK_64
        state ^= state >> 31
    return state


def hash_range(key: int, count: int) -> np.ndarray:
    """Return `count` 64-bit random numbers for a key (the splitmix64 generator): uint64 (count,)."""
    return splitmix64(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA) + np.uint64(key))


def hash_each(count: int) -> np.ndarray:
    """Return `hash_key(i)` for each i in 0 … count - 1: uint64 (count,)."""
    return splitmix64(np.arange(count, dtype=np.uint64) + np.uint64(GOLDEN_GAMMA))


def permutation(key: int, count: int) -> np.ndarray:
    """Return a permutation of 0 … count - 1 that depends only on the key: int64 (count,)."""
    return np.argsort(hash_range(key, count), kind="stable")
