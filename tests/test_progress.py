"""The progress line: what it says, and how often, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from open_lm.datapreprocess import progress
from open_lm.datapreprocess.progress import Board, Display, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "seconds"), [(io.StringIO(), 10.0), (Terminal(), 0.2)])
def test_it_speaks_now_and_then(stream: io.StringIO, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = Display("tokenizing", 10_000_000, "MB", stream)
    for _ in range(20):
        now[0] += seconds * 0.26
        display.show(2_500_000, "7 tokens")
    assert stream.getvalue().count("tokenizing") == 5
    display.show(10_000_000, final=True)
    assert stream.getvalue().endswith("\n") and stream.getvalue().count("tokenizing") == 6


def test_rate_and_time_left() -> None:
    line = Display("tokenizing", 10_000_000, "MB", io.StringIO()).line(2_500_000, 5.0, "7 tokens")
    assert line == "tokenizing: 2.5/10.0 MB (25%), 0.5 MB/s, 7 tokens, 0:00:05 gone, 0:00:15 left"
    assert "? left" in Display("writing", 4, "shards", io.StringIO()).line(0, 0.0)
    assert clock(3725) == "1:02:05"


def test_the_board_counts_each_unit_once() -> None:
    board = Board()
    for update in ((0, 10, 1), (1, 5, 2), (0, 20, 3), (0, 20, 3)):
        board.update(*update)
    assert board.totals() == (25, 5)
