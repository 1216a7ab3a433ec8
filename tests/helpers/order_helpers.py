"""Sources of given sizes, and samples as tuples."""

from __future__ import annotations

from hypothesis import strategies as st

from open_lm.data.order import (
    Samples,
    Source,
)

LANES = st.sampled_from([1, 2, 4, 8, 16])
SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)


def source(sizes: list[int], name: str = "s", known: bool = True, **options: object) -> Source:
    shards = tuple(f"{name}/{number:05d}.tar" for number in range(len(sizes)))
    return Source(name, shards, tuple(sizes) if known else (None,) * len(sizes), **options)  # type: ignore[arg-type]


def listed(samples: Samples) -> list[tuple[int, ...]]:
    return list(zip(*(array.tolist() for array in samples), strict=True))


def places(samples: Samples) -> list[tuple[int, ...]]:
    return list(zip(*(array.tolist() for array in samples[:3]), strict=True))
