"""Tests of the progress display: its text, its frequency, the resulting terminal content, and process memory."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from open_lm.datapreprocess import progress
from open_lm.datapreprocess.progress import (
    TOKENIZING,
    WRITING,
    Display,
    Pace,
    Snapshot,
    format_block,
    format_bytes,
    format_duration,
    format_line,
    memory_in_use,
)

SNAPSHOT = Snapshot(
    stage=TOKENIZING,
    done_bytes=2_500_000,
    total_bytes=10_000_000,
    files_done=3,
    files=12,
    tokens=1_234_567,
    sources={"wiki": 234_567, "web": 1_000_000},
    spilled_bytes=2_400_000,
    memory_bytes=1_250_000_000,
    workers=2,
)
PACE = Pace(elapsed_s=5.0, done_per_s=500_000.0, tokens_per_s=246_913.4)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self, columns: int) -> list[str]:
        """Return the lines that a terminal of this width shows after everything that was written."""
        rows, row = [""], 0
        for part in re.findall(r"\x1b\[\d*[A-Z]|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if match := re.fullmatch(r"\x1b\[(\d+)A", part):
                row = max(0, row - int(match[1]))
            elif part == "\x1b[J":
                del rows[row:]
                rows.append("")
            elif part == "\n":
                row += 1
                rows += [""] * (row + 1 - len(rows))
            elif part != "\r":
                pieces = [part[first : first + columns] for first in range(0, len(part), columns)]
                rows[row : row + 1] = pieces
                row += len(pieces) - 1
        return rows


@pytest.fixture
def terminal_size(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    sizes = {"columns": 80, "rows": 24}
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((sizes["columns"], sizes["rows"])))
    monkeypatch.setenv("TERM", "xterm")
    return sizes


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_plain_line() -> None:
    assert format_line(SNAPSHOT, PACE) == (
        "tokenizing: 25%, 3/12 files, 2.5 MB of 10.0 MB, 0.5 MB/s, 1,234,567 tokens, 246,913 tokens/s, "
        "web 1,000,000 tokens, wiki 234,567 tokens, 2.4 MB spilled, 1.2 GB memory, 2 workers, "
        "0:00:05 elapsed, 0:00:15 left"
    )
    writing = Snapshot(WRITING, tokens=1_000, shards_done=3, shards=12, bad_documents=1)
    assert format_line(writing, Pace(6.0, 0.5)) == (
        "shuffling and writing: 25%, 3/12 shards, 0.5 shards/s, 1,000 tokens, 1 bad document, "
        "0:00:06 elapsed, 0:00:18 left"
    )
    assert "? left" in format_line(SNAPSHOT, Pace())
    assert format_line(Snapshot(TOKENIZING), Pace()).startswith("tokenizing: 100%")
    assert format_duration(3725) == "1:02:05"
    assert [format_bytes(count) for count in (10, 3_210_000, 5e9, 7.25e12)] == ["0.0 kB", "3.2 MB", "5.0 GB", "7.2 TB"]


def test_a_terminal_gets_a_bar_and_a_line_for_each_source() -> None:
    assert format_block(SNAPSHOT, PACE, 100) == [
        "tokenizing [#######.......................]  25%  0:00:05 elapsed, 0:00:15 left",
        "  3/12 files, 2.5 MB of 10.0 MB, 0.5 MB/s, 1,234,567 tokens, 246,913 tokens/s",
        "    web 1,000,000 tokens",
        "    wiki 234,567 tokens",
        "  2.4 MB spilled, 1.2 GB memory, 2 workers",
    ]


def test_many_sources_are_summed() -> None:
    many = replace(SNAPSHOT, sources={f"s{number:02d}": number for number in range(20)})
    rows = [row.strip() for row in format_block(many, PACE, 80) if row.startswith("    ")]
    assert rows == [*(f"s{number} {number} tokens" for number in range(19, 12, -1)), "13 more 78 tokens"]


@pytest.mark.parametrize("width", [1, 12, 40, 56, 79])
def test_lines_fit_a_narrow_terminal(width: int) -> None:
    rows = format_block(SNAPSHOT, PACE, width)
    assert max(map(len, rows)) <= width
    if width >= 40:
        assert "246,913 tokens/s" in " ".join(map(str.strip, rows))
    if width >= 56:
        assert re.fullmatch(r"tokenizing \[#+\.+\]  25%  0:00:05 elapsed, 0:00:15 left", rows[0])


@pytest.mark.parametrize(("stream", "seconds"), [(io.StringIO(), 10.0), (Terminal(), 0.2)])
def test_the_display_limits_its_frequency(stream: io.StringIO, seconds: float, terminal_size: dict[str, int]) -> None:
    now = Clock()
    display = Display(stream, now)
    for _ in range(21):
        display.show(SNAPSHOT)
        now.seconds += seconds * 0.26
    shows_first = stream.isatty()  # a terminal shows the first snapshot at once
    assert stream.getvalue().count("tokenizing") == 5 + shows_first
    display.show(SNAPSHOT, final=True)
    assert stream.getvalue().count("tokenizing") == 6 + shows_first
    assert stream.getvalue().endswith("\n")


def test_the_rate_covers_the_last_minute_and_finally_the_full_stage() -> None:
    now, stream = Clock(), io.StringIO()
    display = Display(stream, now)
    done = 50_000_000  # work of an earlier run does not count in the rate
    snapshot = Snapshot(TOKENIZING, done, 1_000_000_000)
    display.show(snapshot)
    for second in range(300):
        now.seconds += 1
        done += 4_000_000 if second < 200 else 1_000_000
        snapshot = replace(snapshot, done_bytes=done, tokens=done // 4)
        display.show(snapshot)
    last = stream.getvalue().splitlines()[-1]
    assert " 1.0 MB/s" in last and "250,000 tokens/s" in last and "0:05:00 elapsed, 0:00:50 left" in last
    display.show(snapshot, final=True)
    assert " 3.0 MB/s" in stream.getvalue().splitlines()[-1]


def test_rare_snapshots_still_give_a_rate() -> None:
    now, stream = Clock(), io.StringIO()
    display = Display(stream, now)
    for unit in range(20):
        display.show(Snapshot(TOKENIZING, unit * 64_000_000, 64_000_000_000))
        now.seconds += 100
    display.show(Snapshot(TOKENIZING, 20 * 64_000_000, 64_000_000_000))
    assert " 0.6 MB/s" in stream.getvalue().splitlines()[-1]


def test_a_terminal_shows_only_the_last_block(terminal_size: dict[str, int]) -> None:
    now, stream = Clock(), Terminal()
    stream.write("before\n")
    display = Display(stream, now)
    for sources in ({}, {"web": 5, "wiki": 4}, {"web": 6}):
        display.show(replace(SNAPSHOT, sources=sources))
        now.seconds += 1
    display.show(replace(SNAPSHOT, done_bytes=10_000_000, sources={}), final=True)
    display.show(Snapshot(WRITING, shards=4))
    now.seconds += 1
    display.show(Snapshot(WRITING, shards=4, shards_done=4), final=True)
    stream.write("after")
    shown = stream.screen(80)
    assert [row[:24].strip() for row in shown] == [
        "before",
        "tokenizing [############",
        "3/12 files, 10.0 MB of",
        "2.4 MB spilled, 1.2 GB",
        "shuffling and writing [#",
        "4/4 shards, 4.0 shards",
        "after",
    ]


def test_resizing_a_terminal_leaves_no_old_lines(terminal_size: dict[str, int]) -> None:
    now, stream = Clock(), Terminal()
    display = Display(stream, now)
    display.show(SNAPSHOT)
    terminal_size.update(columns=30, rows=4)
    now.seconds += 1
    display.show(SNAPSHOT)
    shown = stream.screen(30)
    assert len(shown) == 4 and shown[-1] == ""
    assert shown[0].startswith("tokenizing")


def test_no_control_codes_outside_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Display(stream, Clock()).show(SNAPSHOT, final=True)
    assert stream.getvalue() == format_line(SNAPSHOT, Pace()) + "\n"


def test_a_closed_stream_is_not_an_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True) as stream:
        display = Display(stream, Clock())
        display.show(SNAPSHOT, final=True)
        display.show(SNAPSHOT, final=True)


@pytest.mark.processes
@pytest.mark.parametrize("source", ["kernel", "psutil"])
def test_memory_of_a_process_and_its_descendants(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "psutil":
        pytest.importorskip("ray")  # installs psutil
        monkeypatch.setattr(progress, "_PROC", tmp_path)
    code = (
        "import subprocess, sys\n"
        "inner = 'data = b\"x\" * (64 << 20); print(len(data), flush=True); input()'\n"
        "subprocess.run([sys.executable, '-c', inner])"
    )
    before = memory_in_use()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdin
        child.stdout.readline()
        during, of_child = memory_in_use(), memory_in_use([child.pid])
        child.stdin.write(b"\n")
    assert during - before > 60 << 20
    assert 0 < of_child < 60 << 20
    assert memory_in_use([child.pid]) == 0  # it has ended
