"""Tests of memory limits: parsing sizes, and dividing a limit among workers and their buffers."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from open_lm.datapreprocess import memory
from open_lm.datapreprocess.memory import Budget, machine_memory_bytes, plan_budget
from open_lm.errors import ConfigError
from open_lm.storage import parse_bytes

GIB = 1 << 30
MIN_LIMIT = memory._DRIVER_BYTES + memory._WORKER_BYTES + memory.BUFFERS_PER_WORKER * memory._MIN_BUFFER_BYTES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0), ("1000", 1000), ("4GB", 4 * 10**9), ("4g", 4 * 10**9), ("4GiB", 4 << 30), ("512MiB", 512 << 20),
        ("1.5g", 1_500_000_000), (" 2 TB ", 2 * 10**12), ("0.5KiB", 512), ("7b", 7), ("3tib", 3 << 40), ("1k", 1000),
    ],
)  # fmt: skip
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "4 G B", "4PB", "1e9", "4,5GB", "nan", "inf", "4i", "4iB", "0x10", "."]
)
def test_parse_bytes_rejects_invalid_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 4GB or 512MiB, found"):
        parse_bytes(text)


def total_bytes(budget: Budget) -> int:
    """Return the maximum memory of a run with this budget."""
    per_worker = memory._WORKER_BYTES + memory.BUFFERS_PER_WORKER * budget.buffer_bytes
    return memory._DRIVER_BYTES + budget.workers * per_worker


@given(
    limit=st.integers(MIN_LIMIT, 1 << 45), workers=st.integers(1, 512), spill_bytes=st.integers(0, 1 << 50)
)  # fmt: skip
@example(MIN_LIMIT, 1, 0)
@example(MIN_LIMIT, 64, 1 << 50)
def test_a_budget_does_not_exceed_its_limit(limit: int, workers: int, spill_bytes: int) -> None:
    budget = plan_budget(limit, workers, spill_bytes)
    assert 1 <= budget.workers <= workers
    assert budget.buffer_bytes >= memory._MIN_BUFFER_BYTES
    assert total_bytes(budget) <= limit
    if budget.workers < workers:  # one more would not fit, even with the smallest buffers
        assert total_bytes(Budget(budget.workers + 1, memory._MIN_BUFFER_BYTES)) > limit


@given(limit=st.integers(MIN_LIMIT, 1 << 40), workers=st.integers(1, 64), spill_bytes=st.integers(0, 1 << 45))
def test_more_memory_never_gives_fewer_workers_or_smaller_buffers(limit: int, workers: int, spill_bytes: int) -> None:
    small, large = plan_budget(limit, workers, spill_bytes), plan_budget(2 * limit, workers, spill_bytes)
    assert large.workers >= small.workers
    if large.workers == small.workers:
        assert large.buffer_bytes >= small.buffer_bytes


@given(limit=st.integers(-(1 << 40), MIN_LIMIT - 1), workers=st.integers(1, 64))
def test_a_limit_too_small_for_one_worker_is_an_error(limit: int, workers: int) -> None:
    with pytest.raises(
        ConfigError, match=f"--memory-limit {limit:,} bytes is too small: one worker needs {MIN_LIMIT:,}"
    ):
        plan_budget(limit, workers)


def test_the_default_limit_is_half_of_the_machine_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for total, workers in ((64 * GIB, 16), (4 * GIB, 3), (GIB, 1), (1, 1)):
        monkeypatch.setattr(memory, "machine_memory_bytes", lambda total=total: total)
        budget = plan_budget(None, 16, 1 << 50)
        assert budget.workers == workers
        assert total_bytes(budget) <= max(total // 2, MIN_LIMIT)  # even a machine with less memory tries one worker
    assert budget == Budget(1, memory._MIN_BUFFER_BYTES)


def test_buffers_grow_with_the_spilled_bytes() -> None:
    sizes = [plan_budget(1 << 40, 4, spill_bytes).buffer_bytes for spill_bytes in (0, 1 << 30, 1 << 40, 1 << 45)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_machine_memory() -> None:
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < machine_memory_bytes() <= total
