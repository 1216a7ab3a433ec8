"""Tests of packing and the global shuffle: complete, without duplicates, uniform, independent of the memory limit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.shard_format import PAD_ID
from open_lm.datapreprocess.job import Layout
from open_lm.datapreprocess.pack import DocumentPacker, cut, pad
from open_lm.datapreprocess.shuffle import (
    MIXED,
    OrderedRuns,
    OrderedRunWriter,
    Run,
    ShuffledRuns,
    ShuffledRunWriter,
    bucket_counts,
    random_keys,
)
from open_lm.datapreprocess.writer import group_shards, plan_shards

U16 = np.dtype(np.uint16)


@given(st.lists(st.lists(st.integers(0, 60000), max_size=30), min_size=1, max_size=10), st.integers(1, 17))
def test_cutting_keeps_every_id_in_order(parts: list[list[int]], length: int) -> None:
    sequences, tail = cut([np.array(part, U16) for part in parts], length)
    assert sequences.shape[1] == length and len(tail) < length
    assert [*sequences.reshape(-1).tolist(), *tail.tolist()] == [value for part in parts for value in part]
    assert sequences.dtype == tail.dtype == U16


def test_pad_fills_the_last_sequence() -> None:
    assert pad(np.array([5], U16), 4).tolist() == [5, PAD_ID, PAD_ID, PAD_ID]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_packed_documents_never_continue_in_the_next_sequence(
    lengths: list[int], length: int, max_open: int, keep_order: bool
) -> None:
    """All ids of a document equal its number. A sequence may contain only its remainder, or be filled by it."""
    ids = np.repeat(np.arange(len(lengths)), lengths).astype(U16)
    packer = DocumentPacker(length, U16, keep_order=keep_order, max_open=max_open)
    half = len(lengths) // 2
    ends = np.cumsum(lengths)
    split = int(ends[half - 1]) if half else 0
    parts = [packer.add(ids[:split], ends[:half]), packer.add(ids[split:], ends[half:] - split), packer.finish()]
    sequences = np.concatenate(parts)
    assert sequences.shape[1] == length and sequences.dtype == np.int32
    packed = sequences[sequences != PAD_ID]
    assert sorted(packed.tolist()) == ids.tolist() and (not keep_order or packed.tolist() == ids.tolist())
    for sequence in sequences:
        unpadded = sequence[sequence != PAD_ID]
        assert len(unpadded) and sequence[len(unpadded) :].tolist() == [PAD_ID] * (length - len(unpadded))
        for document, count in zip(*np.unique(unpadded, return_counts=True), strict=True):
            remainder = lengths[document] % length
            assert count == remainder or (count == length and lengths[document] >= length)


def test_packing_fills_at_least_97_percent() -> None:
    lengths = np.random.default_rng(0).integers(1, 600, 5000)
    packer = DocumentPacker(512, U16)
    sequences = np.concatenate([packer.add(np.zeros(lengths.sum(), U16), np.cumsum(lengths)), packer.finish()])
    assert lengths.sum() / sequences.size > 0.97


def spill(folder: Path, units: list[int], *, seed: int, run_bytes: int, buckets: int) -> list[Run]:
    """Spill units with the given numbers of sequences; a sequence is its number, repeated three times."""
    runs: list[Run] = []
    number = 0
    for stream, count in enumerate(units):
        writer = ShuffledRunWriter(str(folder / f"{stream}"), stream=stream, seed=seed, source=stream % 3,
                           buckets=buckets, run_bytes=run_bytes)  # fmt: skip
        for start in range(0, count, 7):
            numbers = np.arange(number + start, number + min(start + 7, count), dtype=np.uint32)
            writer.add(np.repeat(numbers[:, None], 3, axis=1))
        writer.flush()
        assert writer.count == count
        runs += writer.runs
        number += count
    return runs


def shuffled(
    folder: Path, units: list[int], *, seed: int, run_bytes: int = 1 << 20, buckets: int = 64,
    block_bytes: int = 1 << 20, parts: int = 1,
) -> np.ndarray:  # fmt: skip
    """Return the numbers of the sequences of `spill` in shuffled order, read in `parts` parts."""
    runs = spill(folder, units, seed=seed, run_bytes=run_bytes, buckets=buckets)
    counts = bucket_counts(runs, buckets)
    shuffled_runs = ShuffledRuns(tuple(runs), counts, 3, np.dtype(np.uint32), {}, block_bytes)
    total = sum(units)
    assert shuffled_runs.num_sequences == total
    edges = [total * part // parts for part in range(parts + 1)]
    blocks = [block for a, b in itertools.pairwise(edges) if b > a for block in shuffled_runs.blocks(a, b - a)]
    sequences = np.concatenate([np.zeros((0, 3), np.uint32), *(block.ids for block in blocks)])
    assert (sequences == sequences[:, :1]).all()
    expected_sources = np.repeat(np.arange(len(units)) % 3, units)
    sources = np.concatenate([np.zeros(0, np.uint16), *(block.sources for block in blocks)])
    assert sources.tolist() == expected_sources[sequences[:, 0]].tolist()
    return sequences[:, 0]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 2**70),
       st.sampled_from([1, 2, 64, 1024]), st.integers(1, 300))  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_shuffled_order_is_a_permutation_independent_of_memory_and_parts(  # noqa: PLR0917 - hypothesis arguments
    tmp_path_factory: pytest.TempPathFactory, units: list[int], parts: int, seed: int, buckets: int, block_bytes: int
) -> None:
    one, two = (tmp_path_factory.mktemp("runs") for _ in range(2))
    small = shuffled(one, units, seed=seed, run_bytes=100, parts=parts, buckets=buckets, block_bytes=block_bytes)
    large = shuffled(two, units, seed=seed)
    assert sorted(small.tolist()) == list(range(sum(units)))
    assert small.tolist() == large.tolist()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 7), st.integers(1, 100), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_ordered_runs_keep_the_order_and_count_tokens_by_source(
    tmp_path_factory: pytest.TempPathFactory, units: list[int], length: int, block_bytes: int, run_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    ids = np.arange(sum(units), dtype=np.uint32)
    runs: list[Run] = []
    start = 0
    for number, count in enumerate(units):
        writer = OrderedRunWriter(str(folder / f"{number}"), source=number, run_bytes=run_bytes)
        for block in np.split(ids[start : start + count], [count // 3, count // 2]):
            writer.add(block)
        writer.flush()
        runs += writer.runs
        start += count
    ordered = OrderedRuns(tuple(runs), length, ids.dtype, block_bytes)
    total = ordered.num_sequences
    assert total == len(ids) // length
    halves = ((0, total // 2), (total // 2, total - total // 2))
    blocks = [block for half in halves for block in ordered.blocks(*half)]
    tail, tokens_by_source = ordered.tail()
    assert [*(value for block in blocks for value in block.ids.reshape(-1).tolist()), *tail.tolist()] == ids.tolist()
    for block in blocks:
        for index, source in enumerate(block.sources.tolist()):
            for number, count in block.mixed_tokens[index].items() if source == MIXED else [(source, length)]:
                tokens_by_source[number] = tokens_by_source.get(number, 0) + count
    assert tokens_by_source == {number: count for number, count in enumerate(units) if count}


def test_keys_differ_between_seeds_and_streams() -> None:
    keys = {tuple(random_keys(seed, stream, 0, 4).tolist()) for seed in range(-3, 30) for stream in range(30)}
    assert len(keys) == 33 * 30
    assert random_keys(1, 2, 5, 3).tolist() == random_keys(1, 2, 0, 8)[5:].tolist()
    assert random_keys(0, 0, 0, 1).dtype == np.uint64


def test_the_shuffle_is_uniform_over_all_units(tmp_path: Path) -> None:
    """The position of a sequence in the output is independent of its position in the input.

    Under a uniform permutation the 20 x 20 table of input and output positions has 361 degrees of freedom: chi-square
    has mean 361 and standard deviation 27. Positions are uncorrelated (standard deviation 1/sqrt(n) = 0.007), and so
    are neighbours in the output.
    """
    order = shuffled(tmp_path, [1000] * 20, seed=11, run_bytes=2000, parts=3, block_bytes=1000)
    n = len(order)
    table = np.zeros((20, 20))
    np.add.at(table, (np.asarray(order, np.int64) * 20 // n, np.arange(n) * 20 // n), 1)
    expected = n / 400
    assert 361 - 5 * 27 < ((table - expected) ** 2 / expected).sum() < 361 + 5 * 27
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / np.sqrt(n)
    assert (np.diff(np.asarray(order, np.int64)) == 1).sum() < 10  # on average one pair of neighbours stays adjacent


def test_sequences_are_divided_evenly_among_folders_and_shards() -> None:
    layout = Layout("out", ("0", "1", "2"), shard_sequences=10)
    shards = plan_shards(layout, layout.folders, 100)
    assert [shard.first for shard in shards] == [0, 10, 20, 30, 33, 43, 53, 63, 66, 76, 86, 96]
    assert sum(shard.count for shard in shards) == 100
    assert [shard.url for shard in shards[3:5]] == ["out/0/shard-0000003.tar", "out/1/shard-0000000.tar"]
    assert [shard.count for shard in plan_shards(Layout("out"), ("",), 100)] == [64, 36]
    assert {shard.count for shard in plan_shards(Layout("out"), ("",), 10**6)} == {8192, 10**6 % 8192}
    groups = group_shards(shards, 2, 50)
    assert [shard for group in groups for shard in group] == shards
    assert all(sum(shard.count for shard in group) * 2 <= 50 for group in groups)
    assert [len(group) for group in group_shards(shards, 2, 1)] == [1] * len(shards)
