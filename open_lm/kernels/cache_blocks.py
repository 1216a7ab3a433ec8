"""Cutting elementwise work on a CPU into pieces that stay in the cores' caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_BLOCK_BYTES = 2**19  # of one buffer, for each thread: a core's second-level cache holds three or four of them


def row_blocks(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Neighbouring slices of `rows` rows, `row_bytes` bytes each in a buffer; one slice of all on other devices.

    A chain of elementwise operations on a large tensor goes through memory with each of them; block by block only the
    first one reads it and the last one writes it.
    """
    size = rows
    if device.type == "cpu":
        size = _BLOCK_BYTES * torch.get_num_threads() // row_bytes
    size = max(1, size)
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))
