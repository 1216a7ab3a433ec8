"""The data order: each sequence once, exact shares, the same from any state and for any split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from data_helpers import jsonable
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.epochs import check_enough_data, epoch_end_step, run_remainder
from open_lm.data.hashing import hash_key, hash_range, permutation
from open_lm.data.mixture import Interleaving, integer_weights, parse_fraction, samples_per_source
from open_lm.data.order import (
    DataOrder,
    OrderSettings,
    Piece,
    Samples,
    Source,
    copies_in_pass,
    rows_of_rank,
)
from open_lm.errors import DataError

LANES = st.sampled_from([1, 2, 4, 8, 16])
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


# --- state, splits ---------------------------------------------------------------------------------------------------
@st.composite
def orders(
    draw: st.DrawFn,
    known: bool | None = None,
) -> Callable[..., DataOrder]:
    """A function (state) -> the same data order."""
    all_sizes = draw(st.lists(SIZES, min_size=1, max_size=3))
    sources = [
        source(sizes, f"s{number}", known or draw(st.booleans()), weight=Fraction(draw(st.integers(1, 5))))
        for number, sizes in enumerate(all_sizes)
    ]
    options = OrderSettings(resampled=draw(st.booleans()), shuffle_samples=draw(st.booleans()), lanes=draw(LANES))
    seed = draw(st.integers(0, 9))

    def make(state: object = None) -> DataOrder:
        return DataOrder(sources, seed, options, size_of=lambda s, shard: all_sizes[s][shard], state=state)  # type: ignore[arg-type]

    return make


@settings(deadline=None)
@given(orders(), st.lists(st.integers(0, 20), max_size=6), st.integers(0, 40))
def test_an_order_resumes_from_its_state_after_any_steps(
    make: Callable[..., DataOrder], steps: list[int], rest: int
) -> None:
    expected = listed(make().take(sum(steps) + rest))
    order = make()
    taken: list[tuple[int, ...]] = []
    for step in steps:
        taken += listed(order.take(step))
        order = make(jsonable(order.state()))
    assert taken + listed(order.take(rest)) == expected


@settings(deadline=None)
@given(orders(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_ranks_and_workers_split_the_same_global_batches(
    make: Callable[..., DataOrder], ranks: int, workers: int, batch_size: int
) -> None:
    size, batches = ranks * batch_size, 6
    expected = listed(make().take(size * batches))
    split = {}
    for rank in range(ranks):
        for worker in range(workers):
            order = make()
            for number in range(batches):
                samples = order.take(size)
                if number % workers == worker:
                    split[number, rank] = listed(samples.slice(rank * batch_size, (rank + 1) * batch_size))
    joined = [sample for number in range(batches) for rank in range(ranks) for sample in split[number, rank]]
    assert joined == expected


@settings(deadline=None, max_examples=40)
@given(orders(), st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4))
def test_global_batches_do_not_change_with_the_number_of_ranks(
    make: Callable[..., DataOrder], world_sizes: list[int]
) -> None:
    """Change the number of ranks in any way: three global batches of 8 each time, with the state through JSON."""
    expected = listed(make().take(8 * 3 * 4))
    taken, state = [], None
    for world_size in world_sizes:
        rows = 8 // world_size
        ranks = [make(state) for _ in range(world_size)]
        for _ in range(3):
            for rank, order in enumerate(ranks):
                taken += listed(order.take(8).slice(rank * rows, (rank + 1) * rows))
        states = [jsonable(order.state()) for order in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert taken == expected


def test_upcoming_returns_the_next_shards() -> None:
    order = DataOrder([source([2, 2, 2])], 4)
    order.take(1)
    (piece,) = order.upcoming()
    order.take(1)
    assert places(order.take(1))[0][:2] == piece[:2]


@settings(deadline=None, max_examples=60)
@given(orders(known=True), st.integers(1, 12))
def test_every_piece_is_announced_before_its_second_row(make: Callable[..., DataOrder], batches: int) -> None:
    """Pieces are announced when they are entered, or before as upcoming ones; each holds the members of its samples."""
    order = make()
    announced: set[Piece] = set()
    for _ in range(batches):
        samples = order.take(8)
        announced.update(order.entered(), order.upcoming(1000))
        for number, shard, member in places(samples):
            assert any(p[:2] == (number, shard) and p.start <= member < (p.stop or 0) for p in announced)


def test_upcoming_pieces_are_those_that_follow_the_nearest_first() -> None:
    order = DataOrder([source([3, 5, 4, 6, 3, 3])], 4, OrderSettings(lanes=2))
    order.take(2)
    upcoming = order.upcoming(2)
    entered = set(order.entered())
    order.take(22)  # to the end of the pass
    followed = [piece for piece in order.entered() if piece not in entered]
    assert upcoming == [piece for piece in followed if piece in upcoming]
    assert len(upcoming) == 2


def test_shards_of_unknown_size_are_announced_before_they_are_opened() -> None:
    """At the start those of the first rows, and after a restart those that lanes were in."""
    opened: list[int] = []

    def size_of(_source: int, shard: int) -> int:
        opened.append(shard)
        return 3

    unknown, lanes = source([3] * 12, known=False), OrderSettings(lanes=4)
    order = DataOrder([unknown], 5, lanes, size_of=size_of)
    first = [piece.shard for piece in order.upcoming(4)]
    order.take(4)
    assert opened == first and len(set(first)) == 4
    state = jsonable(order.state())
    opened.clear()
    order = DataOrder([unknown], 5, lanes, size_of=size_of, state=state)
    assert [piece.shard for piece in order.entered()] == first and not opened
    assert order.entered() == []
    order.take(4)
    assert opened == first


@pytest.mark.parametrize(("weights", "world_size"), [((2, 1), 1), ((2, 1), 2), ((5, 3, 3), 4), ((1,), 4)])
def test_pieces_are_announced_across_the_end_of_a_pass(weights: tuple[int, ...], world_size: int) -> None:
    """Also with shared slots, after which the lanes of the slots shift; none is announced in vain."""
    sources = [source([20] * 24, f"s{number}", weight=weight) for number, weight in enumerate(weights)]
    num_late = num_early = 0
    for rank in range(world_size):
        order = DataOrder(sources, 5, OrderSettings(lanes=64))
        rows = rows_of_rank(64, 64, rank, world_size)
        announced, entered, in_first_pass = set[Piece](), set[Piece](), set[Piece]()
        while order.state()["sources"][0]["pass"] == 0:
            in_first_pass = set(announced)
            order.take(64, rows)
            new = order.entered()
            entered.update(new)
            announced.update(new, order.upcoming(1000))
        early = in_first_pass.intersection(new)
        num_early, num_late = num_early + len(early), num_late + len(set(new) - early)
        for _ in range(3):
            order.take(64, rows)
            entered.update(order.entered())
        assert {piece for piece in in_first_pass if piece.source == 0} <= entered
    # Lanes at the edge of a rank, and shared ones, are not known early.
    assert num_early >= (2 * num_late if world_size < 4 or len(weights) == 1 else num_late // 2), (num_early, num_late)


def test_pieces_that_were_not_known_yet_are_announced_later() -> None:
    sources = [source([20] * 24, f"s{number}", weight=weight) for number, weight in enumerate((2, 1))]
    asked, other = (DataOrder(sources, 5, OrderSettings(lanes=64)) for _ in range(2))
    for _ in range(16):
        asked.take(8)
        other.take(8)
        asked.upcoming(1000)  # while most lanes have not begun
    assert len(asked.upcoming(1000)) == len(other.upcoming(1000)) == 63, "all but the last one, which is shared"


def test_state_of_other_data_is_rejected_with_all_changes() -> None:
    state = DataOrder([source([5, 5], "a"), source([5], "b")], 0).state()
    with pytest.raises(
        DataError, match=r"a differs in .*it had 10, now it has 11[\s\S]*b differs in the names"
    ) as caught:
        DataOrder([source([5, 6], "a"), source([5, 1], "b")], 0, state=state)
    assert "new run" in str(caught.value)
    with pytest.raises(DataError, match=r"number of sources was 2, now it is 1"):
        DataOrder([source([5, 5], "a")], 0, state=state)
    with pytest.raises(DataError, match=r"--dataset-resampled was off[\s\S]*--disable-buffer\) was on"):
        changed = OrderSettings(resampled=True, shuffle_samples=False)
        DataOrder([source([5, 5], "a"), source([5], "b")], 0, changed, state=state)


def test_state_is_valid_for_data_in_another_folder_and_keeps_its_seed() -> None:
    here = DataOrder([source([5, 5], "here")], 3)
    here.take(4)
    there = DataOrder([Source("there", ("x/00000.tar", "x/00001.tar"), (5, 5))], 99, state=here.state())
    assert listed(there.take(6)) == listed(here.take(6))


def test_new_manifest_fields_are_no_change() -> None:
    order = DataOrder([source([5, 5], known=False)], 3, size_of=lambda *_: 5)
    order.take(4)
    counted = source([5, 5], sha256=("aa", "bb"), num_bytes=(1, 2))
    assert listed(DataOrder([counted], 0, state=order.state()).take(6)) == listed(order.take(6))


# --- changed data ----------------------------------------------------------------------------------------------------
def test_unchanged_sources_resume_and_changed_ones_restart() -> None:
    a, b, c = source([6, 6, 6], "a"), source([9, 9], "b"), source([4, 4, 4, 4], "c")
    order = DataOrder([a, b, c], 5)
    order.take(3 * 7)
    state = jsonable(order.state())
    expected = listed(order.take(3 * 6))
    now = [c, source([9, 8], "b"), a, source([3], "new")]
    with pytest.raises(
        DataError, match=r"--allow-changed-data[\s\S]*b differs in the numbers of sequences[\s\S]*new is new"
    ):
        DataOrder(now, 0, state=state)  # type: ignore[arg-type]
    resumed = DataOrder(now, 0, state=state, allow_changed=True)  # type: ignore[arg-type]
    for text in (
        "c resumes in pass 1, after 7 of its sequences", "b starts from the beginning", "a resumes in", "new starts",
        "the order of the sources changed", "new is new",
    ):  # fmt: skip
        assert text in resumed.change_warning
    taken = listed(resumed.take(4 * 6))
    for here, before in ((0, 2), (2, 0)):  # the same samples as without the change
        assert [row[1:] for row in taken if row[0] == here] == [row[1:] for row in expected if row[0] == before]
    assert Counter(row[0] for row in taken) == {0: 6, 1: 6, 2: 6, 3: 6}
    again = DataOrder(now, 0, state=jsonable(resumed.state()))  # type: ignore[arg-type]
    assert again.change_warning == "" and listed(again.take(9)) == listed(resumed.take(9))


def test_a_changed_source_restarts_and_new_shares_count_from_there() -> None:
    order = DataOrder([source([5], "a", weight=Fraction(3)), source([5], "b")], 0)
    order.take(40)
    now = [source([5], "a"), source([6], "b")]
    resumed = DataOrder(now, 0, state=order.state(), allow_changed=True)
    assert "the weights of the sources were 3 : 1, now they are 1 : 1" in resumed.change_warning
    positions = [(s["pass"], s["samples"]) for s in resumed.state()["sources"]]
    assert positions == [(5, 0), (0, 0)]  # a was at the end of its sixth pass
    assert Counter(resumed.take(20).source.tolist()) == {0: 10, 1: 10}


def test_another_order_starts_from_the_beginning() -> None:
    order = DataOrder([source([5, 5])], 0)
    order.take(7)
    resumed = DataOrder([source([5, 5])], 0, OrderSettings(resampled=True), state=order.state(), allow_changed=True)
    assert "--dataset-resampled was off, now it is on" in resumed.change_warning
    assert (resumed.state()["sources"][0]["fixed"], resumed.position) == (0, 0)


def test_another_data_key_is_reported_and_keeps_the_position() -> None:
    order = DataOrder([source([5, 5], data_key="npy")], 0)
    order.take(7)
    with pytest.raises(DataError, match="s: --data-key was npy, now it is txt"):
        DataOrder([source([5, 5], data_key="txt")], 0, state=order.state())
    resumed = DataOrder([source([5, 5], data_key="txt")], 0, state=order.state(), allow_changed=True)
    assert listed(resumed.take(3)) == listed(order.take(3))


def test_two_sources_with_the_same_data_keep_their_positions() -> None:
    """They have different orders."""
    order = DataOrder([source([8]), source([8])], 0)
    order.take(8)
    assert listed(DataOrder([source([8]), source([8])], 0, state=order.state()).take(8)) == listed(order.take(8))


def test_state_is_small_and_does_not_grow() -> None:
    order = DataOrder([source([50] * 20)], 0)
    order.take(123_456)
    assert len(str(order.state())) < 400


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
