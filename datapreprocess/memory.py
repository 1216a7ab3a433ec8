"""Divide the memory limit of a run among its workers and their buffers."""

from __future__ import annotations

import os
from dataclasses import dataclass

from open_lm.errors import ConfigError

# Measured resident sizes: a worker with numpy, Ray and the tokenizer with full caches; the driver process.
_WORKER_BYTES, _DRIVER_BYTES = 400 << 20, 400 << 20
_MIN_BUFFER_BYTES, _DEFAULT_BUFFER_BYTES = 8 << 20, 32 << 20
_TARGET_RUNS = 2000
SPILLED_BYTES_PER_INPUT_BYTE = 2  # bytes of token ids per byte of compressed input
BUFFERS_PER_WORKER = 4  # in memory at the same time: sequences, their sorted copy, documents, the ids of documents


@dataclass(frozen=True)
class Budget:
    """The number of concurrent workers, and the bytes of sequences that each may buffer before it spills."""

    workers: int
    buffer_bytes: int


def machine_memory_bytes() -> int:
    """Return the memory of this machine in bytes, or the limit of its control group if that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def plan_budget(limit: int | None, workers: int, spill_bytes: int = 0, *, threads_too: bool = False) -> Budget:
    """Divide a memory limit on all processes of a run (default: half of the machine's memory) among its workers.

    If the limit is too small for all workers, fewer are used. If it is too small for one, raise ConfigError.

    spill_bytes: the expected size of all spilled runs. A writer reads from every run once per buffer that it fills, so
        buffers grow with this size as far as the limit allows.
    threads_too: threads of the driver run tasks at the same time as the workers, so buffers exist twice.
    """
    total = limit if limit is not None else machine_memory_bytes() // 2
    num_buffers = BUFFERS_PER_WORKER * (1 + threads_too)
    min_worker_bytes = _WORKER_BYTES + num_buffers * _MIN_BUFFER_BYTES
    affordable = min(workers, (total - _DRIVER_BYTES) // min_worker_bytes)
    if affordable < 1:
        if limit is None:
            return Budget(1, _MIN_BUFFER_BYTES)
        raise ConfigError(
            f"--memory-limit {limit:,} bytes is too small: one worker needs {_DRIVER_BYTES + min_worker_bytes:,} bytes "
            "(including Python and the tokenizer)"
        )
    free = (total - _DRIVER_BYTES) // affordable - _WORKER_BYTES
    useful = max(_DEFAULT_BUFFER_BYTES, spill_bytes // _TARGET_RUNS)
    return Budget(affordable, min(max(free // num_buffers, _MIN_BUFFER_BYTES), useful))
