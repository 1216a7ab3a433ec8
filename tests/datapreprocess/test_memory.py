"""Memory limits: words for sizes, and what a limit leaves to workers and their buffers."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from open_lm.datapreprocess import memory
from open_lm.datapreprocess.memory import Budget, machine_memory_bytes, plan_budget
from open_lm.errors import ConfigError
from open_lm.storage import parse_bytes

GIB = 1 << 30
LEAST = memory._DRIVER_BYTES + memory._WORKER_BYTES + memory._BUFFERS_PER_WORKER * memory._MIN_BUFFER_BYTES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0), ("1000", 1000), ("4GB", 4 * 10**9), ("4g", 4 * 10**9), ("4GiB", 4 << 30), ("512MiB", 512 << 20),
        ("1.5g", 1_500_000_000), (" 2 TB ", 2 * 10**12), ("0.5KiB", 512), ("7b", 7), ("3tib", 3 << 40), ("1k", 1000),
    ],
)  # fmt: skip
def test_sizes_in_words(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "4 G B", "4PB", "1e9", "4,5GB", "nan", "inf", "4i", "4iB", "0x10", "."]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 4GB or 512MiB, found"):
        parse_bytes(text)


def taken(budget: Budget) -> int:
    """All that a run takes at most."""
    per_worker = memory._WORKER_BYTES + memory._BUFFERS_PER_WORKER * budget.buffer_bytes
    return memory._DRIVER_BYTES + budget.workers * per_worker


@given(
    limit=st.integers(LEAST, 1 << 45), workers=st.integers(1, 512), spill_bytes=st.integers(0, 1 << 50)
)  # fmt: skip
@example(LEAST, 1, 0)
@example(LEAST, 64, 1 << 50)
def test_a_budget_stays_within_its_limit(limit: int, workers: int, spill_bytes: int) -> None:
    budget = plan_budget(limit, workers, spill_bytes)
    assert 1 <= budget.workers <= workers
    assert budget.buffer_bytes >= memory._MIN_BUFFER_BYTES
    assert taken(budget) <= limit
    if budget.workers < workers:  # one more would not fit, even with the smallest buffers
        assert taken(Budget(budget.workers + 1, memory._MIN_BUFFER_BYTES)) > limit


@given(limit=st.integers(LEAST, 1 << 40), workers=st.integers(1, 64), spill_bytes=st.integers(0, 1 << 45))
def test_more_memory_never_means_less_work(limit: int, workers: int, spill_bytes: int) -> None:
    small, large = plan_budget(limit, workers, spill_bytes), plan_budget(2 * limit, workers, spill_bytes)
    assert large.workers >= small.workers
    if large.workers == small.workers:
        assert large.buffer_bytes >= small.buffer_bytes


@given(limit=st.integers(-(1 << 40), LEAST - 1), workers=st.integers(1, 64))
def test_a_limit_too_small_for_one_worker_is_told(limit: int, workers: int) -> None:
    with pytest.raises(ConfigError, match=f"--memory-limit {limit:,} bytes is too small: one worker needs {LEAST:,}"):
        plan_budget(limit, workers)


def test_by_default_half_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for total, workers in ((64 * GIB, 16), (4 * GIB, 3), (GIB, 1), (1, 1)):
        monkeypatch.setattr(memory, "machine_memory_bytes", lambda total=total: total)
        budget = plan_budget(None, 16, 1 << 50)
        assert budget.workers == workers
        assert taken(budget) <= max(total // 2, LEAST)  # a machine however small can try
    assert budget == Budget(1, memory._MIN_BUFFER_BYTES)


def test_buffers_grow_with_what_is_to_be_spilled() -> None:
    sizes = [plan_budget(1 << 40, 4, spill_bytes).buffer_bytes for spill_bytes in (0, 1 << 30, 1 << 40, 1 << 45)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_the_memory_of_this_machine() -> None:
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < machine_memory_bytes() <= total
