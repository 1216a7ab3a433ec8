"""Packing and the global shuffle: nothing lost, nothing twice, uniform, and the same under any limit of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.shard_format import PAD_ID
from open_lm.datapreprocess.job import Layout
from open_lm.datapreprocess.pack import cut, join_tails, pad
from open_lm.datapreprocess.sampling import load_sampling, takes
from open_lm.datapreprocess.shuffle import Run, RunWriter, gather, random_keys, read_keys, slices
from open_lm.datapreprocess.writer import group_shards, plan_shards
from open_lm.errors import ConfigError

U16 = np.dtype(np.uint16)


@given(st.lists(st.lists(st.integers(0, 60000), max_size=30), min_size=1, max_size=10), st.integers(1, 17))
def test_cutting_keeps_every_id_in_order(parts: list[list[int]], length: int) -> None:
    sequences, tail = cut([np.array(part, U16) for part in parts], length)
    assert sequences.shape[1] == length and len(tail) < length
    assert [*sequences.reshape(-1).tolist(), *tail.tolist()] == [value for part in parts for value in part]
    assert sequences.dtype == tail.dtype == U16


def test_tails_are_joined_and_the_last_one_padded() -> None:
    sequences, tail = join_tails([np.array([1, 2], U16), np.array([], U16), np.array([3, 4, 5], U16)], 4, U16)
    assert sequences.tolist() == [[1, 2, 3, 4]] and tail.tolist() == [5]
    assert pad(tail, 4).tolist() == [5, PAD_ID, PAD_ID, PAD_ID]
    sequences, tail = join_tails([], 4, U16)
    assert sequences.shape == (0, 4) and len(tail) == 0


def shuffled(folder: Path, units: list[int], *, seed: int | None, run_bytes: int, parts: int) -> np.ndarray:
    """The order that units of so many sequences of 3 ids take; a sequence is its number three times."""
    runs: list[Run] = []
    number = 0
    for stream, count in enumerate(units):
        writer = RunWriter(str(folder / f"{stream}-{{:04d}}"), stream, seed, run_bytes)
        for start in range(0, count, 7):
            numbers = np.arange(number + start, number + min(start + 7, count), dtype=np.uint32)
            writer.add(np.repeat(numbers[:, None], 3, axis=1))
        writer.flush()
        assert writer.count == count
        runs += writer.runs
        number += count
    cuts = sorted({number * part // parts for part in range(parts)})
    found = [gather(runs, bounds, 3, np.dtype(np.uint32)) for bounds in slices(read_keys(runs), cuts)]
    whole = np.concatenate(found)
    assert (whole == whole[:, :1]).all()
    assert [len(part) for part in found] == np.diff([*cuts, number]).tolist()
    return whole[:, 0]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 2**70))
@settings(max_examples=25, deadline=None)
def test_the_order_is_a_permutation_that_memory_and_parts_do_not_change(
    tmp_path_factory: pytest.TempPathFactory, units: list[int], parts: int, seed: int
) -> None:
    one, two = (tmp_path_factory.mktemp("runs") for _ in range(2))
    small = shuffled(one, units, seed=seed, run_bytes=100, parts=parts)
    large = shuffled(two, units, seed=seed, run_bytes=1 << 20, parts=1)
    assert sorted(small.tolist()) == list(range(sum(units)))
    assert small.tolist() == large.tolist()


def test_without_a_seed_the_order_is_kept(tmp_path: Path) -> None:
    assert shuffled(tmp_path, [50, 3, 20], seed=None, run_bytes=100, parts=4).tolist() == list(range(73))


def test_seeds_and_streams_give_other_orders() -> None:
    keys = {tuple(random_keys(seed, stream, 0, 4).tolist()) for seed in range(-3, 30) for stream in range(30)}
    assert len(keys) == 33 * 30
    assert random_keys(1, 2, 5, 3).tolist() == random_keys(1, 2, 0, 8)[5:].tolist()
    assert random_keys(0, 0, 0, 1).dtype == np.uint64


def test_the_shuffle_is_uniform_over_all_units(tmp_path: Path) -> None:
    """Where a sequence comes from says nothing of where it goes.

    The 20 x 20 table of origin and destination has 361 degrees of freedom under a uniform permutation: chi-square has
    mean 361 and standard deviation 27. Ranks are uncorrelated (standard deviation 1/sqrt(n) = 0.007) and so are
    neighbours in the output.
    """
    order = shuffled(tmp_path, [1000] * 20, seed=11, run_bytes=2000, parts=3)
    n = len(order)
    table = np.zeros((20, 20))
    np.add.at(table, (np.asarray(order, np.int64) * 20 // n, np.arange(n) * 20 // n), 1)
    expected = n / 400
    assert 361 - 5 * 27 < ((table - expected) ** 2 / expected).sum() < 361 + 5 * 27
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / np.sqrt(n)
    assert (np.diff(np.asarray(order, np.int64)) == 1).sum() < 10  # neighbours stay neighbours once, on average


def test_shards_share_the_sequences_evenly() -> None:
    shards = plan_shards(Layout("out", ("0", "1", "2"), shard_sequences=10), 100)
    assert [shard.first for shard in shards] == [0, 10, 20, 30, 33, 43, 53, 63, 66, 76, 86, 96]
    assert sum(shard.count for shard in shards) == 100
    assert [shard.url for shard in shards[3:5]] == ["out/0/shard-0000003.tar", "out/1/shard-0000000.tar"]
    assert [shard.count for shard in plan_shards(Layout("out"), 100)] == [64, 36]
    assert {shard.count for shard in plan_shards(Layout("out"), 10**6)} == {8192, 10**6 % 8192}
    groups = group_shards(shards, 2, 50)
    assert [shard for group in groups for shard in group] == shards
    assert all(sum(shard.count for shard in group) * 2 <= 50 for group in groups)
    assert [len(group) for group in group_shards(shards, 2, 1)] == [1] * len(shards)


def test_sampling_takes_each_document_as_often_as_its_factor_says() -> None:
    counts = [sum(takes(7, 3, number, 2.5, copy) for copy in range(3)) for number in range(4000)]
    assert set(counts) == {2, 3}
    assert abs(sum(counts) / 4000 - 2.5) < 5 * 0.5 / np.sqrt(4000)
    assert not any(takes(7, 3, number, 0.0, 0) for number in range(100))
    assert all(takes(7, 3, number, 1.0, 0) for number in range(100))
    assert [takes(7, 3, n, 0.5, 0) for n in range(64)] != [takes(8, 3, n, 0.5, 0) for n in range(64)]


def test_sampling_files(tmp_path: Path) -> None:
    from open_lm.datapreprocess.ray.tokenize_shuffle import DEFAULT_SAMPLING

    sampling = load_sampling(str(DEFAULT_SAMPLING))
    assert sampling.source_of("x/stackexchange/0.jsonl") == "STACKEXCHANGE" and sampling.source_of("x/y") == "UNKNOWN"
    assert sampling.factor("BOOKS") == pytest.approx(2.094, abs=0.001) and sampling.passes("BOOKS") == 3
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "sources:\n- {source: A, markers: [a]}\n- {source: A, markers: [b]}\n- {name: C}\n"
        "sampling_frequencies: {B: 1, A: -2}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_sampling(str(bad))
    for part in ("twice", "name", "names B", "found -2"):
        assert part in str(caught.value)
    bad.write_text("sources: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_sampling(str(bad))
