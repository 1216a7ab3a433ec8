"""Lanes: each byte fetched about once by all ranks together, every batch mixed, nothing repeated or dropped."""

from __future__ import annotations

from fractions import Fraction

import bench_data_order as bench
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.block_sums import BlockSums
from open_lm.data.mixture import Interleaving, Slots
from open_lm.data.order import DataOrder, OrderSettings, Source, choose_lanes, rows_of_rank


def make_source(sizes: list[int], name: str = "s", known: bool = True, **options: object) -> Source:
    shards = tuple(f"{name}/{number:05d}.tar" for number in range(len(sizes)))
    return Source(name, shards, tuple(sizes) if known else (None,) * len(sizes), **options)  # type: ignore[arg-type]


# --- lanes and slots -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("batch", "lanes"),
    [(1, 1), (8, 8), (512, 512), (1024, 1024), (2048, 1024), (3072, 1024), (1536, 768), (1031, 1031), (2062, 1031)],
)
def test_number_of_lanes(batch: int, lanes: int) -> None:
    assert choose_lanes(batch) == lanes


def test_large_shards_that_are_fetched_whole_get_fewer_lanes() -> None:
    def lanes(
        num_bytes: int | None,
        url: str = "s3://b/0.tar",
        sums: BlockSums | None = None,
        batch: int = 512,
        has_cache: bool = False,
    ) -> int:
        source = Source("s", (url,), (1,), num_bytes=(num_bytes,), block_sums=(sums,))
        return choose_lanes(batch, [source], has_cache)

    assert lanes(None) == lanes(70_000_000) == 512
    assert (lanes(500_000_000), lanes(1 << 40)) == (128, 64)
    blocks = BlockSums(1, 1 << 40, bytes(16))
    assert lanes(1 << 40, "/data/0.tar") == lanes(1 << 40, sums=blocks) == 512
    assert lanes(1 << 30, batch=1500) == 75 and lanes(1 << 30, batch=32) == 32
    for url in ("pipe:cat 0.tar", "https://host/0.tar"):
        assert lanes(1 << 40, url) == lanes(1 << 40, url, blocks) == 64
    assert lanes(1 << 40, sums=blocks, has_cache=True) == 64 and lanes(1 << 40, "/data/0.tar", blocks, 512, True) == 512


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_split_the_rows_of_a_batch_by_slots(rounds: int, slots_of_rank: int, world_size: int) -> None:
    lanes = slots_of_rank * world_size
    parts = [rows_of_rank(lanes, rounds * lanes, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(rounds * lanes))
    for rank, rows in enumerate(parts):
        assert set((rows % lanes).tolist()) == set(range(rank * slots_of_rank, (rank + 1) * slots_of_rank))


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8).filter(any), st.integers(1, 64), st.integers(0, 40))
def test_shares_are_exact_after_every_round(weights: list[int], lanes: int, rounds: int) -> None:
    slots = Slots(weights, lanes)
    shared = lanes - sum(slots.num_fixed)
    assert shared < len(weights) and np.count_nonzero(slots.fixed < 0) == shared
    counts = np.array(slots.num_fixed) * rounds
    counts += np.bincount(Interleaving(slots.shared_weights, [0] * len(weights)).take(shared * rounds),
                          minlength=len(weights))  # fmt: skip
    assert (abs(counts * sum(weights) - rounds * lanes * np.array(weights)) < sum(weights)).all()
    assert slots.shared_counts(counts.tolist()) == (counts - np.array(slots.num_fixed) * rounds).tolist()


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any), st.integers(1, 12), st.integers(1, 9))
def test_lanes_have_equal_lengths_and_follow_each_other(sizes: list[int], lanes: int, passes: int) -> None:
    """Without shuffling, the lanes together are the line of visits, cut into parts equal to within one sequence."""
    options = OrderSettings(lanes=lanes, shuffle_shards=False, shuffle_samples=False)
    order, total = DataOrder([make_source(sizes)], 0, options), sum(sizes)
    everything = [(shard, member) for shard, size in enumerate(sizes) for member in range(size)]
    for _ in range(passes):
        samples = order.take(total)
        rows = list(zip(samples.shard.tolist(), samples.member.tolist(), strict=True))
        parts = [rows[lane::lanes] for lane in range(lanes)]
        assert [row for part in parts for row in part] == everything
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_state_is_a_few_integers_for_each_source_with_any_number_of_lanes_and_shards() -> None:
    sources = [make_source([8] * 5000, f"s{n}", weight=Fraction(n + 1)) for n in range(4)]
    order = DataOrder(sources, 0, OrderSettings(lanes=1024))
    order.take(50_000)
    assert len(str(order.state())) < 1200
    unknown = DataOrder([make_source([8] * 5000, known=False)], 0, OrderSettings(lanes=1024), size_of=lambda *_: 8)
    unknown.take(5000)
    assert len(str(unknown.state())) < 2000


def test_sizes_that_become_known_or_unknown_change_nothing() -> None:
    sizes = [5, 9, 2, 7, 7, 3, 8]
    known, unknown = make_source(sizes), make_source(sizes, known=False)
    for first, second in ((known, unknown), (unknown, known)):
        order = DataOrder([first], 3, OrderSettings(lanes=4), size_of=lambda _, shard: sizes[shard])
        order.take(10)
        state, expected = order.state(), order.take(60)
        resumed = DataOrder([second], 0, state=state, size_of=lambda _, shard: sizes[shard])
        assert [a.tolist() for a in resumed.take(60)] == [a.tolist() for a in expected]


def test_new_weights_or_lanes_in_the_middle_of_a_pass_repeat_and_drop_nothing() -> None:
    sizes = {"a": [5, 9, 2, 7], "b": [30, 12, 20]}
    sources = [make_source(sizes[name], name) for name in sizes]
    order = DataOrder(sources, 3, OrderSettings(lanes=8))
    taken = [order.take(20)]
    now = [make_source(sizes["a"], "a"), make_source(sizes["b"], "b", weight=Fraction(7))]
    order = DataOrder(now, 0, OrderSettings(lanes=4), state=order.state(), allow_changed=True)
    assert "the weights" in order.change_warning and order.lanes == 8
    taken.append(order.take(59))
    rows = [row for part in taken for row in zip(*(a.tolist() for a in part[:3]), strict=True)]
    for number, name in enumerate(sizes):
        first_pass = [row for row in rows if row[0] == number][: sum(sizes[name])]
        assert len(first_pass) == len(set(first_pass))


# --- traffic ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("single", [True, False])
def test_all_ranks_together_fetch_each_byte_about_once(single: bool) -> None:
    """The simulation of bench_data_order.py at a smaller size: 128 lanes for 3,000 shards."""
    sources = bench.make_sources(3000, 6, single)
    sizes = np.concatenate([np.array(source.sizes) for source in sources])
    rows = bench.take_rows(sources, 384, 128, bench.steps_of_pass(sources, 384))
    for world_size, limit in ((1, 1.1), (8, 1.1), (64, 1.1), (3, 1.5), (12, 1.5), (48, 1.5)):
        whole, nodes, ranges = bench.traffic(rows, sizes, world_size, 8, 3)
        assert max(whole, ranges) < limit and not nodes > whole + 0.02


# --- mixing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("shards", "batch"), [(40, 64), (64, 64), (1000, 64), (1000, 512), (300, 512)])
@pytest.mark.parametrize("mode", ["passes", "two sources", "unknown sizes"])
def test_batches_are_mixed_like_independent_draws(shards: int, batch: int, mode: str) -> None:
    """Each shard is one topic. The shards of a batch and the mean of a topic's value are as with independent draws."""
    random = np.random.default_rng(shards + batch)
    size, topics = 40, random.normal(size=shards)
    topics = (topics - topics.mean()) / topics.std()
    half = shards // 2
    parts = [(0, half), (half, shards)] if mode == "two sources" else [(0, shards)]
    sources = [
        make_source([size] * (stop - start), f"s{start}", mode != "unknown sizes", weight=Fraction(stop - start))
        for start, stop in parts
    ]
    order = DataOrder(sources, 1, OrderSettings(lanes=choose_lanes(batch)), size_of=lambda *_: size)
    distinct, means = [], []
    for _ in range(shards * size // batch):
        samples = order.take(batch)
        numbers = samples.shard + np.array([start for start, _ in parts])[samples.source]
        distinct.append(len(np.unique(numbers)))
        means.append(topics[numbers].mean())
    # Without sizes, the last shards of a pass may be fewer than the lanes.
    last = -(-64 * size // batch) if mode == "unknown sizes" else 0
    assert min(distinct[: len(distinct) - last - 1]) >= min(64, shards, batch)
    independent = shards * (1 - (1 - 1 / shards) ** batch)  # expected number of distinct shards
    assert mode == "unknown sizes" or np.mean(distinct) >= 0.95 * independent
    draws = min(64, batch) if mode == "unknown sizes" else batch
    assert np.var(means) < 1.35 / draws  # 1 / batch for independent draws
    assert abs(np.mean(means)) < 0.05
