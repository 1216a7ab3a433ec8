"""Runs that started with the former data order continue in it: the values are those of the version that had it only."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from data_helpers import SEQ_LEN, VOCAB_SIZE, jsonable, places, write_source

from open_lm.config.sections import DataConfig
from open_lm.data.former_order import FormerOrder
from open_lm.data.loader import build_train_loader
from open_lm.data.order import DataOrder, OrderSettings, Source, make_order
from open_lm.data.sources import find_sources
from open_lm.errors import DataError

SHUFFLED = (
    "e559eeef586e683e3540047e10764d7e",
    [(0, 2, 1), (0, 2, 2), (0, 2, 0), (1, 1, 5), (0, 2, 6), (0, 2, 3)],
    {"pass": 7, "visit": 1, "offset": 3, "samples": 150},
)
RESAMPLED = (
    "1361446e57ff255c5ce51a09bd2c9bfb",
    [(0, 1, 1), (0, 1, 2), (0, 1, 0), (1, 0, 5), (0, 1, 3), (0, 1, 4)],
    {"pass": 0, "visit": 21, "offset": 3, "samples": 150},
)
STORED = (
    "c043f3063196450c473c74b4af9e6768",
    [(0, 2, 0), (0, 2, 1), (0, 2, 2), (1, 1, 0), (0, 2, 3), (0, 2, 4)],
    {"pass": 7, "visit": 1, "offset": 3, "samples": 150},
)


def source(sizes: list[int], name: str, **options: object) -> Source:
    shards = tuple(f"{name}/{number:05d}.tar" for number in range(len(sizes)))
    return Source(name, shards, tuple(sizes), **options)  # type: ignore[arg-type]


SOURCES = [
    source([7, 5, 8], "a", weight=Fraction(3)),
    source([6, 9, 1, 4], "b", repeats=(Fraction(3, 2),) * 4),
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (OrderSettings(), SHUFFLED),
        (OrderSettings(resampled=True), RESAMPLED),
        (OrderSettings(shuffle_samples=False), STORED),
    ],
)
def test_a_state_of_the_former_order_continues_in_it(settings: OrderSettings, expected: tuple[object, ...]) -> None:
    digest, first, position = expected
    order, parts = FormerOrder(SOURCES, 11, settings), []
    for count in (5, 48, 0, 1, 146):
        parts.append(order.take(count))
        state = jsonable(order.state())
        assert "order" not in state  # type: ignore[operator]
        order = make_order(SOURCES, 0, replace(settings, lanes=64), state=state)  # type: ignore[arg-type, assignment]
        assert isinstance(order, FormerOrder)
    columns = [b"".join(part[n].astype("<u8").tobytes() for part in parts) for n in range(4)]
    assert hashlib.sha256(b"".join(columns)).hexdigest()[:32] == digest
    start = list(itertools.chain(*(zip(*(a.tolist() for a in part[:3]), strict=True) for part in parts)))
    assert start[:6] == first
    saved = order.state()["sources"][0]
    assert {name: saved[name] for name in position} == position  # type: ignore[attr-defined]


def test_a_new_run_uses_the_new_order() -> None:
    order = make_order(SOURCES, 11, OrderSettings(lanes=8))
    assert isinstance(order, DataOrder) and order.state()["order"] == "lanes"


def test_a_state_of_earlier_versions_is_accepted() -> None:
    """Such a state identifies the shards only, and has neither shares nor data key."""
    data = [source([5, 5], "a"), source([3, 4], "b")]
    order = FormerOrder(data, 3)
    order.take(6)
    state = order.state()
    names = ("num_sequences", "pass", "visit", "offset", "samples")
    old = {
        **state,
        "sources": [
            {"fingerprint": s["fingerprint"].partition(":")[0], **{name: s[name] for name in names}}
            for s in state["sources"]
        ],
    }
    assert old["sources"][0]["fingerprint"] == "e7ba0236836c38c5"
    resumed = make_order(data, 0, OrderSettings(), state=jsonable(old))  # type: ignore[arg-type]
    assert resumed.state() == state
    assert [a.tolist() for a in resumed.take(20)] == [a.tolist() for a in order.take(20)]
    with pytest.raises(DataError, match=r"a differs in the number of its sequences \(it had 10, now it has 11\)"):
        make_order([source([5, 6], "a"), data[1]], 0, OrderSettings(), state=old)


def test_changed_data_in_a_run_of_the_former_order() -> None:
    order = FormerOrder([source([6, 6, 6], "a"), source([9, 9], "b")], 5)
    order.take(14)
    now = [source([6, 6, 6], "a"), source([9, 8], "b")]
    resumed = make_order(now, 0, OrderSettings(), state=order.state(), allow_changed=True)
    assert isinstance(resumed, FormerOrder)
    assert "a resumes in pass 1, after 1 of its shards" in resumed.change_warning
    assert "b starts from the beginning" in resumed.change_warning


@pytest.mark.processes
def test_a_loader_continues_a_run_of_the_former_order_on_any_ranks_and_workers(tmp_path: Path) -> None:
    manifest = write_source(tmp_path, [10, 7, 11, 12])
    data = DataConfig(dataset_manifest=[manifest], data_key="npy", multiple_data_passes=True, workers=0)

    def batches(count: int, workers: int, **options: object) -> tuple[list[list[tuple[int, ...]]], dict[str, object]]:
        loader = build_train_loader(replace(data, workers=workers), seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, **options)  # type: ignore[arg-type]
        return [places(batch.inputs.numpy()) for batch, _ in loader.batches(count)], loader.state

    sources = find_sources(data)
    start = FormerOrder(sources, 7)
    start.take(12)
    expected = FormerOrder(sources, 7).take(12 + 60)
    rows = [(0, shard, member) for shard, member in zip(expected.shard.tolist(), expected.member.tolist(), strict=True)]
    whole, state = batches(10, 0, batch_size=6, state=jsonable(start.state()))
    assert list(itertools.chain(*whole)) == rows[12:]
    assert "order" not in state
    parts = [batches(10, 2, batch_size=2, rank=r, world_size=3, state=jsonable(start.state()))[0] for r in range(3)]
    assert list(itertools.chain(*(row for step in zip(*parts, strict=True) for row in step))) == rows[12:]
