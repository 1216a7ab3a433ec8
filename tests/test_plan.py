"""The order of samples: exactly once, exact shares, the same from any state and for any split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from data_helpers import jsonable
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.mixture import Interleaving, integer_weights, most_samples, parse_fraction
from open_lm.data.plan import (
    Order,
    Plan,
    Samples,
    Source,
    check_enough,
    copies_in_pass,
    epoch_end_step,
    hash_key,
    hash_range,
    permutation,
)
from open_lm.errors import DataError

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)


def source(sizes: list[int], name: str = "s", known: bool = True, **options: object) -> Source:
    shards = tuple(f"{name}/{number:05d}.tar" for number in range(len(sizes)))
    return Source(name, shards, tuple(sizes) if known else (None,) * len(sizes), **options)  # type: ignore[arg-type]


def listed(samples: Samples) -> list[tuple[int, ...]]:
    return list(zip(*(array.tolist() for array in samples), strict=True))


def places(samples: Samples) -> list[tuple[int, ...]]:
    return list(zip(*(array.tolist() for array in samples[:3]), strict=True))


# --- numbers ---------------------------------------------------------------------------------------------------------
def test_random_numbers_never_change() -> None:
    """Runs resume on other machines and versions: these values are part of the format."""
    assert int(hash_range(0, 1)[0]) == 0xE220A8397B1DCDAF  # splitmix64's first number of seed 0, as published
    assert hash_key(1, 2, 3) == 0xD0734750FDE362B3
    assert permutation(7, 10).tolist() == [1, 8, 5, 7, 0, 9, 4, 6, 3, 2]


@given(st.integers(0, 2**64 - 1), st.integers(0, 300))
def test_permutation_is_one(key: int, count: int) -> None:
    assert sorted(permutation(key, count).tolist()) == list(range(count))


def test_hashes_spread_evenly() -> None:
    counts = np.bincount(hash_range(hash_key(3), 80_000) % np.uint64(8), minlength=8)
    assert abs(counts - 10_000).max() < 500


# --- token accounting ------------------------------------------------------------------------------------------------
@given(st.integers(1, 10**12), st.integers(1, 4096), st.integers(1, 5000), st.integers(1, 50))
def test_epochs_end_at_their_share_of_all_steps(tokens: int, seq_len: int, batch: int, epochs: int) -> None:
    ends = [epoch_end_step(e, epoch_tokens=tokens, seq_len=seq_len, global_batch_size=batch) for e in range(epochs + 1)]
    sequences = tokens // seq_len
    assert ends[0] == 0
    assert ends == sorted(ends)
    for epoch, end in enumerate(ends):
        assert end * batch <= epoch * sequences < (end + 1) * batch


# --- shares ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("typed", "meant"),
    [(0.1, Fraction(1, 10)), ("1", Fraction(1)), (1 / 3, Fraction(1, 3)), (0.123456789, Fraction("0.123456789"))],
)
def test_weights_are_the_numbers_that_were_typed(typed: float | str, meant: Fraction) -> None:
    assert parse_fraction(typed) == meant


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any), st.integers(0, 900), st.integers(0, 50))
def test_shares_are_exact_and_never_a_whole_sample_away(weights: list[int], count: int, first: int) -> None:
    numbers = integer_weights([Fraction(weight) for weight in weights])
    total, begun = sum(numbers), min(first, count)
    interleaving = Interleaving(numbers, [0] * len(numbers))
    early = interleaving.take(begun)
    resumed = Interleaving(numbers, np.bincount(early, minlength=len(numbers)).tolist())
    late = interleaving.take(count - begun)
    assert late.tolist() == resumed.take(count - begun).tolist()
    counts = np.cumsum(np.append(early, late)[:, None] == np.arange(len(numbers)), axis=0)
    shares = np.arange(1, count + 1)[:, None] * np.array(numbers)
    assert (abs(counts * total - shares) < total).all()
    assert (counts[total - 1 :: total] * total == shares[total - 1 :: total]).all()
    if count:
        assert counts[-1].tolist() == most_samples([Fraction(weight) for weight in weights], count)


def test_uneven_weights_that_a_greedy_choice_would_leave_behind() -> None:
    """Always taking the source that is furthest behind leaves one of these 1.2 samples behind."""
    weights = [3, 15, 2, 3, 143, 1701, 631, 2388]
    counts = np.cumsum(Interleaving(weights, [0] * 8).take(4886)[:, None] == np.arange(8), axis=0)
    assert abs(counts - np.arange(1, 4887)[:, None] * np.array(weights) / 4886).max() < 1


def test_most_samples_bounds_what_it_cannot_count() -> None:
    weights = [Fraction("0.123456789123"), Fraction("0.876543210877")]
    assert most_samples(weights, 10**9) == [123456790, 876543211]


# --- without replacement ---------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(SIZES, st.integers(0, 5), st.integers(1, 7), st.booleans())
def test_every_sequence_once_in_each_pass(sizes: list[int], seed: int, step: int, known: bool) -> None:
    plan = Plan([source(sizes, known=known)], seed, size_of=lambda _, shard: sizes[shard])
    everything = sorted((0, shard, member) for shard, size in enumerate(sizes) for member in range(size))
    passes = []
    for _ in range(3):
        taken: list[tuple[int, ...]] = []
        while len(taken) < len(everything):
            taken += places(plan.take(min(step, len(everything) - len(taken))))
        assert sorted(taken) == everything
        passes.append(taken)
    assert plan.position == 3 * len(everything)


def test_passes_and_shards_are_shuffled_unless_switched_off() -> None:
    first, second = (places(plan.take(200)) for plan in [Plan([source([40] * 5)], 1)] for _ in range(2))
    assert first != second
    assert places(Plan([source([40] * 5)], 2).take(200)) != first
    stored = Plan([source([40] * 5)], 1, Order(shuffle_shards=False, shuffle_samples=False))
    assert places(stored.take(200)) == sorted(first)
    only_shards = places(Plan([source([40] * 5)], 1, Order(shuffle_samples=False)).take(200))
    assert [member for _, _, member in only_shards] == list(range(40)) * 5
    assert only_shards != sorted(first)


def test_the_last_pass_ends_with_an_error_or_with_what_is_left() -> None:
    once = Order(max_passes=1)
    plan = Plan([source([3, 4])], 0, once)
    plan.take(5)
    with pytest.raises(DataError, match=r"its 7 sequences are used up and 1 more are needed.*--multiple-data-passes"):
        plan.take(3)
    plan = Plan([source([3, 4])], 0, once)
    assert len(places(plan.take(10, partial=True))) == 7
    assert places(plan.take(10, partial=True)) == []


def test_a_source_without_sequences_is_an_error() -> None:
    with pytest.raises(DataError, match="no shard holds a sequence"):
        Plan([source([0, 0])], 0).take(1)
    with pytest.raises(DataError, match="no shard holds a sequence"):
        Plan([source([0, 0])], 0, Order(resampled=True)).take(1)


@pytest.mark.parametrize("factor", [Fraction(2), Fraction(3, 2), Fraction(1, 4), Fraction(7, 3)])
def test_upsampling_repeats_each_shard_exactly_in_the_long_run(factor: Fraction) -> None:
    upsampled = source([1] * 5, repeats=(factor,) * 5)
    for shard in range(5):
        copies = [int(copies_in_pass(upsampled, number)[shard]) for number in range(factor.denominator)]
        assert sum(copies) == factor.numerator
        assert max(copies) - min(copies) <= 1
    plan = Plan([upsampled], 0)
    seen = Counter(place[1] for place in places(plan.take(5 * factor.numerator)))
    assert sum(seen.values()) == 5 * factor.numerator
    if factor.denominator == 1:
        assert set(seen.values()) == {factor.numerator}


# --- with replacement ------------------------------------------------------------------------------------------------
def test_drawn_shards_are_read_whole_and_about_equally_often() -> None:
    plan = Plan([source([3] * 10)], 5, Order(resampled=True))
    taken = places(plan.take(30_000))
    visits = [taken[start : start + 3] for start in range(0, 30_000, 3)]
    assert all({shard for _, shard, _ in visit} == {visit[0][1]} for visit in visits)
    assert all(sorted(member for _, _, member in visit) == [0, 1, 2] for visit in visits)
    counts = Counter(visit[0][1] for visit in visits)
    assert len(counts) == 10
    assert all(850 < number < 1150 for number in counts.values())


def test_factors_are_chances_when_shards_are_drawn() -> None:
    drawn = source([1] * 2, repeats=(Fraction(3), Fraction(1)))
    counts = Counter(shard for _, shard, _ in places(Plan([drawn], 0, Order(resampled=True)).take(8000)))
    assert 5800 < counts[0] < 6200


# --- state, splits ---------------------------------------------------------------------------------------------------
@st.composite
def plans(draw: st.DrawFn) -> Callable[..., Plan]:
    """A function (state) -> the same plan."""
    all_sizes = draw(st.lists(SIZES, min_size=1, max_size=3))
    known = draw(st.booleans())
    sources = [
        source(sizes, f"s{number}", known, weight=Fraction(draw(st.integers(1, 5))))
        for number, sizes in enumerate(all_sizes)
    ]
    order = Order(resampled=draw(st.booleans()), shuffle_samples=draw(st.booleans()))
    seed = draw(st.integers(0, 9))

    def make(state: object = None) -> Plan:
        return Plan(sources, seed, order, size_of=lambda s, shard: all_sizes[s][shard], state=state)  # type: ignore[arg-type]

    return make


@settings(deadline=None)
@given(plans(), st.lists(st.integers(0, 20), max_size=6), st.integers(0, 40))
def test_a_plan_goes_on_from_its_state_and_in_any_steps(make: Callable[..., Plan], steps: list[int], more: int) -> None:
    whole = listed(make().take(sum(steps) + more))
    plan = make()
    taken: list[tuple[int, ...]] = []
    for step in steps:
        taken += listed(plan.take(step))
        plan = make(jsonable(plan.state()))
    assert taken + listed(plan.take(more)) == whole


@settings(deadline=None)
@given(plans(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_ranks_and_workers_split_the_same_global_batches(
    make: Callable[..., Plan], ranks: int, workers: int, batch_size: int
) -> None:
    size, batches = ranks * batch_size, 6
    whole = listed(make().take(size * batches))
    split = {}
    for rank in range(ranks):
        for worker in range(workers):
            plan = make()
            for number in range(batches):
                samples = plan.take(size)
                if number % workers == worker:
                    split[number, rank] = listed(samples.rows(rank * batch_size, (rank + 1) * batch_size))
    joined = [sample for number in range(batches) for rank in range(ranks) for sample in split[number, rank]]
    assert joined == whole


def test_upcoming_names_the_shards_that_follow() -> None:
    plan = Plan([source([2, 2, 2])], 4)
    plan.take(1)
    ((number, shard),) = plan.upcoming()
    plan.take(1)
    assert places(plan.take(1))[0][:2] == (number, shard)


def test_state_of_other_data_is_refused_with_all_changes() -> None:
    state = Plan([source([5, 5], "a"), source([5], "b")], 0).state()
    with pytest.raises(DataError, match=r"a: .*it held 10, now it holds 11[\s\S]*b: the names") as caught:
        Plan([source([5, 6], "a"), source([5, 1], "b")], 0, state=state)
    assert "new run" in str(caught.value)
    with pytest.raises(DataError, match=r"were 2 sources, now there are 1"):
        Plan([source([5, 5], "a")], 0, state=state)
    with pytest.raises(DataError, match=r"--dataset-resampled was off[\s\S]*--disable-buffer\) was on"):
        changed = Order(resampled=True, shuffle_samples=False)
        Plan([source([5, 5], "a"), source([5], "b")], 0, changed, state=state)


def test_state_holds_for_data_in_another_folder_and_keeps_its_seed() -> None:
    here = Plan([source([5, 5], "here")], 3)
    here.take(4)
    there = Plan([Source("there", ("x/00000.tar", "x/00001.tar"), (5, 5))], 99, state=here.state())
    assert listed(there.take(6)) == listed(here.take(6))


def test_state_is_small_and_does_not_grow() -> None:
    plan = Plan([source([50] * 20)], 0)
    plan.take(123_456)
    assert len(str(plan.state())) < 300


# --- enough data -----------------------------------------------------------------------------------------------------
def test_too_little_data_lists_every_short_source() -> None:
    sources = [source([10], "a"), source([100], "b"), source([20], "c")]
    with pytest.raises(DataError) as caught:
        check_enough(sources, 90, seq_len=4)
    text = str(caught.value)
    assert "a holds 10 sequences (40 tokens), 30 (120 tokens) are needed" in text
    assert "c holds 20" in text
    assert "b holds" not in text
    assert "--multiple-data-passes" in text


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
def test_the_check_agrees_with_the_plan(sizes: list[int], data: st.DataObject) -> None:
    sources = [source([size], f"s{n}", weight=Fraction(data.draw(st.integers(1, 4)))) for n, size in enumerate(sizes)]
    count = data.draw(st.integers(1, 60))
    plan = Plan(sources, 0, Order(max_passes=1))
    try:
        check_enough(sources, count, seq_len=1)
    except DataError:
        with pytest.raises(DataError):
            plan.take(count)
    else:
        plan.take(count)
