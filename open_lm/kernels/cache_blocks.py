"""Splitting of elementwise work on a CPU into blocks that fit the cores' caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_BLOCK_BYTES = 2**19  # of one buffer, per thread; a core's second-level cache holds three or four of them


def fits_block(num_bytes: int) -> bool:
    """Return whether a buffer of this size needs no splitting on a CPU."""
    return num_bytes <= _BLOCK_BYTES * torch.get_num_threads()


def row_blocks(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Yield consecutive slices of `rows` rows of `row_bytes` bytes each; on other devices, one slice of all rows.

    In a chain of elementwise operations on a large tensor every operation reads and writes memory. Block by block only
    the first one reads memory and only the last one writes it.
    """
    size = rows
    if device.type == "cpu":
        size = _BLOCK_BYTES * torch.get_num_threads() // row_bytes
    size = max(1, size)
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))
