"""Sampling: the source of each file, and how often its documents are used."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_lm.datapreprocess.sampling import ALL_FILES, UNKNOWN, Sampling, log_sampling, selection_mask
from open_lm.errors import ConfigError

# Documents in [100, 132) of group 3, seed 7, whose random number is below 0.3.
FROZEN = [5, 6, 9, 14, 15, 25, 28, 29, 30]


def copies(count: int, factor: float, batch: int, seed: int = 7, group: int = 3) -> np.ndarray:
    """Return how often each of `count` documents is used in all passes, reading `batch` of them at a time."""
    passes = range(Sampling(factors={"a": factor}).passes("a"))
    starts = range(0, count, batch)
    masks = [
        np.concatenate(
            [selection_mask(seed, group, first, min(batch, count - first), factor, copy) for first in starts]
        )
        for copy in passes
    ]
    return np.sum(masks, axis=0) if masks else np.zeros(count, int)


def test_factor_of_two_and_a_half() -> None:
    taken = copies(10_000, 2.5, 10_000)
    assert set(taken.tolist()) == {2, 3}
    assert abs(np.sum(taken == 3) - 5000) < 4 * 50  # four standard deviations of 10,000 fair draws
    for batch in (1, 17, 1024, 9_999):
        assert np.array_equal(copies(10_000, 2.5, batch), taken)
    assert not np.array_equal(copies(10_000, 2.5, 10_000, seed=8), taken)
    assert not np.array_equal(copies(10_000, 2.5, 10_000, group=4), taken)


@given(st.floats(0, 5), st.integers(0, 2**63), st.integers(0, 1 << 40), st.integers(1, 300))
def test_copies_are_the_factor_rounded_down_or_up(factor: float, seed: int, group: int, batch: int) -> None:
    taken = copies(300, factor, batch, seed, group)
    assert taken.min() >= int(factor) and taken.max() <= int(np.ceil(factor))
    if factor == int(factor):
        assert set(taken.tolist()) == {int(factor)}


def test_selection_is_frozen() -> None:
    assert np.flatnonzero(selection_mask(7, 3, 100, 32, 0.3, 0)).tolist() == FROZEN
    assert np.flatnonzero(selection_mask(7, 3, 100, 32, 2.3, 2)).tolist() == FROZEN
    assert set(FROZEN) < set(np.flatnonzero(selection_mask(7, 3, 100, 32, 0.9, 0)).tolist())


def test_three_sources_reach_their_factors() -> None:
    factors = {"a": 0.25, "b": 1.0, "c": 3.5}
    counts = {"a": 40_000, "b": 10_000, "c": 2_000}
    taken = {name: copies(count, factors[name], 1024, group=ord(name)).sum() for name, count in counts.items()}
    assert taken["b"] == 10_000
    assert abs(taken["a"] - 10_000) < 4 * (40_000 * 0.25 * 0.75) ** 0.5
    assert abs(taken["c"] - 7_000) < 4 * (2_000 * 0.25) ** 0.5


def test_source_of_a_file() -> None:
    assert Sampling().source_of("x/wiki.jsonl") == ALL_FILES == "all"
    by_marker = Sampling({"wiki": ["wikipedia", "wiki-"], "rest": ["x/"]}, {"wiki": 2.5})
    assert [by_marker.source_of(url) for url in ("x/wiki-1", "x/y", "s3://b/wikipedia/0")] == ["wiki", "rest", "wiki"]
    assert by_marker.source_of("y") == UNKNOWN
    assert (by_marker.factor("wiki"), by_marker.passes("wiki")) == (2.5, 3)
    assert (by_marker.factor("rest"), by_marker.passes("rest")) == (1.0, 1)


def test_patterns_take_precedence_over_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listing = {"web": ["a/wiki-mirror.jsonl", "s3://b/0.jsonl"], "code": ["file:///data/c.jsonl"], "none": []}
    sampling = Sampling.from_listing(listing, {"wiki": ["wiki"]})
    assert sampling.source_of("a/wiki-mirror.jsonl") == sampling.source_of(f"{tmp_path}/a/wiki-mirror.jsonl") == "web"
    assert sampling.source_of("s3://b/0.jsonl") == "web" and sampling.source_of("/data/c.jsonl") == "code"
    assert sampling.source_of("a/wiki.jsonl") == "wiki" and sampling.source_of("s3://b/1.jsonl") == UNKNOWN
    monkeypatch.chdir(os.sep)
    copy = pickle.loads(pickle.dumps(sampling))
    assert copy == sampling and copy.source_of(f"{tmp_path}/a/wiki-mirror.jsonl") == "web"


def test_file_of_two_sources_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling.from_listing({"a": ["x/1", "x/2", "x/2"], "b": ["x/3", "./x/2", "x/1"]})
    text = str(caught.value)
    assert "x/1 belongs to a and to b" in text and "x/2 belongs to a and to b" in text and "x/3" not in text
    with pytest.raises(ConfigError, match="and 15 more"):
        Sampling.from_listing({"a": [f"x/{n}" for n in range(20)], "b": [f"x/{n}" for n in range(20)]})


def test_record_of_the_sampling() -> None:
    markers, factors = {"a": ("x", "y")}, {"a": 0.5}
    one = Sampling.from_listing({"b": ["s3://b/1", "s3://b/2"]}, markers, factors)
    same = Sampling.from_listing({"b": ["s3://b/2", "s3://b/1", "s3://b/1"]}, markers, factors)
    other = Sampling.from_listing({"b": ["s3://b/1", "s3://b/3"]}, markers, factors)
    assert json.loads(json.dumps(one.record())) == one.record() == same.record() != other.record()
    assert one.record()["files"]["b"]["count"] == 2 and one.record()["factors"] == {"a": 0.5}


def test_files_without_a_source_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_sampling(Sampling({"wiki": ["wiki"]}, {"wiki": 2.5}), ["wiki-0", "wiki-1", "other/0"])
    assert "2 files of wiki, factor 2.5" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "other/0" in warnings[0] and "wiki-0" not in warnings[0]


def test_no_factor_is_logged_where_nothing_is_sampled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_sampling(Sampling({"wiki": ["wiki"], "web": ["web"]}), ["wiki-0", "wiki-1", "web-0"])
    assert [record.getMessage() for record in caplog.records] == ["source web: 1 files", "source wiki: 2 files"]
