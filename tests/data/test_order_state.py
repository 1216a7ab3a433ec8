"""States and splits of the data order: resuming, ranks and workers, announced pieces, changed data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import pytest
from data_helpers import jsonable
from hypothesis import given, settings
from hypothesis import strategies as st
from order_helpers import LANES, SIZES, listed, places, source

from open_lm.data.order import (
    DataOrder,
    OrderSettings,
    Piece,
    Source,
    rows_of_rank,
)
from open_lm.errors import DataError


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
