"""The data order: each sequence once, exact shares, the same from any state and for any split."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_helpers import SIZES, listed, places, source

from open_lm.data.epochs import check_enough_data, epoch_end_step, run_remainder
from open_lm.data.hashing import hash_key, hash_range, permutation
from open_lm.data.mixture import Interleaving, integer_weights, parse_fraction, samples_per_source
from open_lm.data.order import (
    DataOrder,
    OrderSettings,
    copies_in_pass,
)
from open_lm.errors import DataError


# --- numbers ---------------------------------------------------------------------------------------------------------
def test_random_numbers_never_change() -> None:
    """Runs resume on other machines and versions: these values are part of the format."""
    assert int(hash_range(0, 1)[0]) == 0xE220A8397B1DCDAF  # splitmix64's first number of seed 0, as published
    assert hash_key(1, 2, 3) == 0xD0734750FDE362B3
    assert permutation(7, 10).tolist() == [1, 8, 5, 7, 0, 9, 4, 6, 3, 2]


@given(st.integers(0, 2**64 - 1), st.integers(0, 300))
def test_permutation_holds_every_number_once(key: int, count: int) -> None:
    assert sorted(permutation(key, count).tolist()) == list(range(count))


def test_hashes_spread_evenly() -> None:
    counts = np.bincount(hash_range(hash_key(3), 80_000) % np.uint64(8), minlength=8)
    assert abs(counts - 10_000).max() < 500


# --- token accounting ------------------------------------------------------------------------------------------------
@given(st.integers(1, 10**12), st.integers(1, 4096), st.integers(1, 5000), st.integers(1, 50))
def test_epoch_end_steps(tokens: int, seq_len: int, batch: int, epochs: int) -> None:
    ends = [epoch_end_step(e, epoch_tokens=tokens, seq_len=seq_len, global_batch_size=batch) for e in range(epochs + 1)]
    sequences = tokens // seq_len
    assert ends[0] == 0
    assert ends == sorted(ends)
    for epoch, end in enumerate(ends):
        assert end * batch <= epoch * sequences < (end + 1) * batch


@given(st.integers(1, 10**12), st.integers(1, 4096), st.integers(1, 5000), st.integers(1, 50))
def test_remainder_of_a_run(tokens: int, seq_len: int, batch: int, epochs: int) -> None:
    sizes = {"epoch_tokens": tokens, "seq_len": seq_len, "global_batch_size": batch}
    remainder = run_remainder(epochs, **sizes)
    assert remainder.sequences < batch
    trained = epoch_end_step(epochs, **sizes) * batch
    assert (trained + remainder.sequences) * seq_len + remainder.tokens == epochs * tokens


# --- shares ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("typed", "expected"),
    [(0.1, Fraction(1, 10)), ("1", Fraction(1)), (1 / 3, Fraction(1, 3)), (0.123456789, Fraction("0.123456789"))],
)
def test_parse_fraction_finds_the_number_the_user_meant(typed: float | str, expected: Fraction) -> None:
    assert parse_fraction(typed) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any), st.integers(0, 900), st.integers(0, 50))
def test_shares_are_exact_to_within_one_sample(weights: list[int], count: int, first: int) -> None:
    numbers = integer_weights([Fraction(weight) for weight in weights])
    total, split = sum(numbers), min(first, count)
    interleaving = Interleaving(numbers, [0] * len(numbers))
    early = interleaving.take(split)
    resumed = Interleaving(numbers, np.bincount(early, minlength=len(numbers)).tolist())
    late = interleaving.take(count - split)
    assert late.tolist() == resumed.take(count - split).tolist()
    counts = np.cumsum(np.append(early, late)[:, None] == np.arange(len(numbers)), axis=0)
    shares = np.arange(1, count + 1)[:, None] * np.array(numbers)
    assert (abs(counts * total - shares) < total).all()
    assert (counts[total - 1 :: total] * total == shares[total - 1 :: total]).all()
    if count:
        assert counts[-1].tolist() == samples_per_source([Fraction(weight) for weight in weights], count)


def test_uneven_weights_that_a_greedy_choice_fails() -> None:
    """A greedy choice of the source that is furthest behind lets one of these fall 1.2 samples behind."""
    weights = [3, 15, 2, 3, 143, 1701, 631, 2388]
    counts = np.cumsum(Interleaving(weights, [0] * 8).take(4886)[:, None] == np.arange(8), axis=0)
    assert abs(counts - np.arange(1, 4887)[:, None] * np.array(weights) / 4886).max() < 1


def test_samples_per_source_is_an_upper_bound_for_large_counts() -> None:
    weights = [Fraction("0.123456789123"), Fraction("0.876543210877")]
    assert samples_per_source(weights, 10**9) == [123456790, 876543211]


# --- without replacement ---------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(SIZES, st.integers(0, 5), st.integers(1, 7), st.booleans(), st.integers(1, 9))
def test_every_sequence_once_in_each_pass(sizes: list[int], seed: int, step: int, known: bool, lanes: int) -> None:
    settings = OrderSettings(lanes=lanes)
    order = DataOrder([source(sizes, known=known)], seed, settings, size_of=lambda _, shard: sizes[shard])
    everything = sorted((0, shard, member) for shard, size in enumerate(sizes) for member in range(size))
    passes = []
    for _ in range(3):
        taken: list[tuple[int, ...]] = []
        while len(taken) < len(everything):
            taken += places(order.take(min(step, len(everything) - len(taken))))
        assert sorted(taken) == everything
        passes.append(taken)
    assert order.position == 3 * len(everything)


def test_passes_and_shards_are_shuffled_unless_switched_off() -> None:
    first, second = (places(order.take(200)) for order in [DataOrder([source([40] * 5)], 1)] for _ in range(2))
    assert first != second
    assert places(DataOrder([source([40] * 5)], 2).take(200)) != first
    stored = DataOrder([source([40] * 5)], 1, OrderSettings(shuffle_shards=False, shuffle_samples=False))
    assert places(stored.take(200)) == sorted(first)
    only_shards = places(DataOrder([source([40] * 5)], 1, OrderSettings(shuffle_samples=False)).take(200))
    assert [member for _, _, member in only_shards] == list(range(40)) * 5
    assert only_shards != sorted(first)


@settings(deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_one_pass_over_all_ranks_and_workers_is_every_sequence_once(
    sizes: list[int], ranks: int, workers: int, rows: int, seed: int
) -> None:
    """All ranks have the same number of batches of a finite set, although the last global batch may be smaller."""
    taken, batches = [], Counter[int]()
    for rank in range(ranks):
        for worker in range(workers):
            order = DataOrder([source(sizes)], seed, OrderSettings(max_passes=1))
            number = 0
            while len((samples := order.take(ranks * rows, partial=True)).source):
                if number % workers == worker:
                    taken += places(samples.slice(rank * rows, (rank + 1) * rows))
                    batches[rank] += 1
                number += 1
    assert sorted(taken) == [(0, shard, member) for shard, size in enumerate(sizes) for member in range(size)]
    assert set(batches.values()) == {-(-sum(sizes) // (ranks * rows))}


def test_neighbors_do_not_stay_neighbors() -> None:
    order = np.concatenate([DataOrder([source([2000])], seed).take(2000).member for seed in range(20)])
    together = np.count_nonzero(np.diff(order) == 1)
    assert together < 45  # 20 expected, as in any random permutation


def test_every_visit_of_a_shard_has_a_different_order() -> None:
    order = DataOrder([source([200], repeats=(Fraction(2),))], 0)
    orders = [tuple(order.take(200).member.tolist()) for _ in range(6)]
    assert len(set(orders)) == 6
    assert all(sorted(order) == list(range(200)) for order in orders)


def test_the_last_pass_ends_with_an_error_or_a_partial_result() -> None:
    once = OrderSettings(max_passes=1)
    order = DataOrder([source([3, 4])], 0, once)
    order.take(5)
    with pytest.raises(DataError, match=r"all 7 sequences are used up, but 1 more are needed.*--multiple-data-passes"):
        order.take(3)
    order = DataOrder([source([3, 4])], 0, once)
    assert len(places(order.take(10, partial=True))) == 7
    assert places(order.take(10, partial=True)) == []


def test_a_source_without_sequences_is_an_error() -> None:
    with pytest.raises(DataError, match="all of its shards are empty"):
        DataOrder([source([0, 0])], 0).take(1)
    with pytest.raises(DataError, match="all of its shards are empty"):
        DataOrder([source([0, 0])], 0, OrderSettings(resampled=True)).take(1)


@pytest.mark.parametrize("factor", [Fraction(2), Fraction(3, 2), Fraction(1, 2), Fraction(7, 3)])
def test_upsampling_repeats_each_shard_by_its_factor_on_average(factor: Fraction) -> None:
    upsampled = source([1] * 5, repeats=(factor,) * 5)
    for shard in range(5):
        copies = [int(copies_in_pass(upsampled, number)[shard]) for number in range(factor.denominator)]
        assert sum(copies) == factor.numerator
        assert max(copies) - min(copies) <= 1
    order = DataOrder([upsampled], 0)
    seen = Counter(place[1] for place in places(order.take(5 * factor.numerator)))
    assert sum(seen.values()) == 5 * factor.numerator
    if factor.denominator == 1:
        assert set(seen.values()) == {factor.numerator}


def test_each_shard_of_a_source_keeps_its_own_factor() -> None:
    factors = (Fraction(1, 2), Fraction(2), Fraction(3, 2), Fraction(1))
    passes = [copies_in_pass(source([1] * 4, repeats=factors), number) for number in range(4)]
    assert sum(passes).tolist() == [2, 8, 6, 4]
    shifts = [hash_key(shard) % factor.denominator for shard, factor in enumerate(factors)]  # part of the format
    for number, copies in enumerate(passes):
        for shard, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
            start = factor.numerator * number + shift
            assert copies[shard] == (start + factor.numerator) // factor.denominator - start // factor.denominator


# --- with replacement ------------------------------------------------------------------------------------------------
def test_drawn_shards_are_read_completely_and_about_equally_often() -> None:
    order = DataOrder([source([3] * 10)], 5, OrderSettings(resampled=True))
    taken = places(order.take(30_000))
    visits = [taken[start : start + 3] for start in range(0, 30_000, 3)]
    assert all({shard for _, shard, _ in visit} == {visit[0][1]} for visit in visits)
    assert all(sorted(member for _, _, member in visit) == [0, 1, 2] for visit in visits)
    counts = Counter(visit[0][1] for visit in visits)
    assert len(counts) == 10
    assert all(850 < number < 1150 for number in counts.values())


def test_draws_are_unbiased_and_the_same_for_a_seed() -> None:
    """Chi-square test over 50 shards: 49 degrees of freedom, with 0.1 % and 99.9 % points of 23.98 and 85.35."""
    drawn = [DataOrder([source([1] * 50)], 11, OrderSettings(resampled=True)).take(20_000) for _ in range(2)]
    assert listed(drawn[0]) == listed(drawn[1])
    counts = np.bincount(drawn[0].shard, minlength=50)
    assert 23.98 < ((counts - 400) ** 2 / 400).sum() < 85.35
    pairs = np.bincount(drawn[0].shard[:-1] * 50 + drawn[0].shard[1:], minlength=2500)  # draws are independent
    expected = 19_999 / 2500
    assert 2290 < ((pairs - expected) ** 2 / expected).sum() < 2730  # 2499 degrees of freedom, 0.1 % and 99.9 %


def test_factors_are_relative_chances_when_shards_are_drawn() -> None:
    drawn = source([1] * 2, repeats=(Fraction(3), Fraction(1)))
    counts = Counter(shard for _, shard, _ in places(DataOrder([drawn], 0, OrderSettings(resampled=True)).take(8000)))
    assert 5800 < counts[0] < 6200


# --- enough data -----------------------------------------------------------------------------------------------------
def test_too_little_data_lists_every_short_source() -> None:
    sources = [source([10], "a"), source([100], "b"), source([20], "c")]
    with pytest.raises(DataError) as caught:
        check_enough_data(sources, 90, seq_len=4)
    text = str(caught.value)
    assert "a has 10 sequences (40 tokens), 30 (120 tokens) are needed" in text
    assert "c has 20" in text
    assert "b has" not in text
    assert "--multiple-data-passes" in text


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
def test_the_check_agrees_with_the_order(sizes: list[int], data: st.DataObject) -> None:
    sources = [source([size], f"s{n}", weight=Fraction(data.draw(st.integers(1, 4)))) for n, size in enumerate(sizes)]
    count = data.draw(st.integers(1, 60))
    order = DataOrder(sources, 0, OrderSettings(max_passes=1))
    try:
        check_enough_data(sources, count, seq_len=1)
    except DataError:
        with pytest.raises(DataError):
            order.take(count)
    else:
        order.take(count)
