"""How much memory a run may take, and what that leaves for each worker's buffers."""

from __future__ import annotations

import os
from dataclasses import dataclass

from open_lm.errors import ConfigError

# Measured resident sizes: a process with numpy, Ray and the tokenizer with its caches full; the driver beside it.
_WORKER_BYTES, _DRIVER_BYTES = 400 << 20, 400 << 20
_MIN_BUFFER_BYTES, _DEFAULT_BUFFER_BYTES = 8 << 20, 32 << 20
_TARGET_RUNS = 2000
SPILLED_BYTES_PER_INPUT_BYTE = 2  # bytes of ids for a byte of compressed input
_BUFFERS_PER_WORKER = 4  # buffers that a worker holds at once: sequences, their sorted copy, documents with their ids


@dataclass(frozen=True)
class Budget:
    """What a limit comes to: workers at a time, and the bytes of sequences that each may hold before it spills."""

    workers: int
    buffer_bytes: int


def machine_memory_bytes() -> int:
    """The memory of this machine, or what its control group allows of it."""
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


def plan_budget(limit: int | None, workers: int, spill_bytes: int = 0, *, twice: bool = False) -> Budget:
    """Share a limit on the processes of the run (half of the machine's memory by default) among workers.

    Writers read from every run once for each buffer that they fill, so buffers grow with `spill_bytes`, all that will
    be spilled, as far as the limit allows. `twice`: for a while threads of the command work beside the workers. Fewer
    workers are used where the limit is too small for all; ConfigError where it is too small for one.
    """
    total = limit if limit is not None else machine_memory_bytes() // 2
    held_times = _BUFFERS_PER_WORKER * (1 + twice)
    least = _WORKER_BYTES + held_times * _MIN_BUFFER_BYTES
    fitting = min(workers, (total - _DRIVER_BYTES) // least)
    if fitting < 1:
        if limit is None:
            return Budget(1, _MIN_BUFFER_BYTES)
        raise ConfigError(
            f"--memory-limit {limit:,} bytes is too small: one worker needs {_DRIVER_BYTES + least:,} (the tokenizer "
            "and Python included)"
        )
    free = (total - _DRIVER_BYTES) // fitting - _WORKER_BYTES
    wanted = max(_DEFAULT_BUFFER_BYTES, spill_bytes // _TARGET_RUNS)
    return Budget(fitting, min(max(free // held_times, _MIN_BUFFER_BYTES), wanted))
