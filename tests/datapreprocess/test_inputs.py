"""Tests of finding input files and dividing them into units of work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy

from open_lm import storage
from open_lm.datapreprocess import inputs
from open_lm.datapreprocess.inputs import InputFile, Unit, find_inputs, plan_units, unit_size
from open_lm.datapreprocess.readers import ReadOptions
from open_lm.datapreprocess.sampling import Sampling
from open_lm.errors import DataError, StorageError, UserError

OPTIONS = ReadOptions()
MIB = 1 << 20


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return [str(folder / name) for name in names]


def find_urls(*patterns: object, suffixes: Sequence[str] | None = None) -> list[str]:
    return [item.url for item in find_inputs([str(pattern) for pattern in patterns], suffixes)]


# --- finding -----------------------------------------------------------------------------------------------------


def test_names_globs_and_folders(tmp_path: Path) -> None:
    a, b, parquet, c = touch(tmp_path, "a.jsonl", "b.jsonl.zst", "deep/d.parquet", "deep/er/c.txt")
    touch(tmp_path, "README.md", "deep/notes.csv", "dataset.json", ".hidden.jsonl", "deep/.work/unit-0.json")
    (hidden,) = touch(tmp_path / ".cache", "x.jsonl")
    assert find_urls(tmp_path / ".cache") == [hidden], "a hidden folder is read if it is named"
    assert find_urls(a) == [a]
    assert find_urls(tmp_path) == [a, b, parquet, c] == find_urls(f"{tmp_path}/")
    assert find_urls(tmp_path / "*.jsonl") == [a]
    assert find_urls(tmp_path / "?.jsonl*", tmp_path / "d[ef]ep") == [a, b, parquet, c]
    assert find_urls(tmp_path / "**" / "*.txt") == [c]
    assert find_urls(tmp_path / "de*") == [parquet, c], "a glob may match folders"
    assert find_urls(tmp_path, suffixes=[".zst", ".txt"]) == [b, c]
    assert find_urls(a, tmp_path / "*.jsonl", suffixes=[".txt"]) == [a], "suffixes apply only to folders"
    (item,) = find_inputs([a])
    assert item.num_bytes == os.path.getsize(a) and item.mtime_s == os.path.getmtime(a) and not item.etag


def test_a_file_named_in_many_ways_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (a,) = touch(tmp_path, "raw/a.jsonl")
    monkeypatch.chdir(tmp_path)
    patterns = ["raw", "raw/", "./raw/a.jsonl", "raw/../raw/a.jsonl", "raw//a.jsonl", "raw/*.jsonl", a, f"file://{a}"]
    assert find_urls(*patterns) == [a]
    for pattern in patterns:
        assert find_urls(pattern) == [a]


def test_lists_of_inputs(tmp_path: Path) -> None:
    a, b, c = touch(tmp_path, "a.jsonl", "b.jsonl", "more/c.jsonl")
    names = tmp_path / "inputs.list"
    names.write_text(f"# a comment\n\n  {a}  \r\n\t# another\n{tmp_path}/more/*.jsonl\n{a}\n")
    assert find_urls(f"@{names}") == [a, c]
    assert find_urls(f"@{names}", b) == [a, b, c]


def test_unusable_lists(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.txt"):
        find_urls(f"@{tmp_path}/nowhere.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n")
    with pytest.raises(DataError, match=r"@.*empty\.txt: this list contains no inputs"):
        find_urls(f"@{empty}")
    empty.write_bytes(b"\xff\xfe")
    with pytest.raises(StorageError, match=r"empty\.txt: expected UTF-8"):
        find_urls(f"@{empty}")


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    good, unknown = touch(tmp_path, "a.jsonl", "b.csv")
    (tmp_path / "names").write_text(f"{tmp_path}/*.parquet\n{good}\n")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError) as caught:
        find_urls(
            unknown, tmp_path / "missing.jsonl", tmp_path / "void", f"@{tmp_path}/names", f"@{tmp_path}/no.txt", good
        )
    message = str(caught.value)
    for part in ("b.csv: no reader for .csv", "missing.jsonl: no file matches", "void: no file matches",
                 "*.parquet: no file matches", "no.txt"):  # fmt: skip
        assert part in message
    assert "a.jsonl" not in message
    with pytest.raises(DataError, match="no input is given"):
        find_inputs([])
    with pytest.raises(DataError, match="an input is an empty string"):  # does not read the working folder
        find_urls("", good)
    with pytest.raises(DataError, match=r"b\.csv: no reader for \.csv files; supported suffixes are \.arrow"):
        find_urls(tmp_path / "*.csv")


def test_a_glob_on_s3_needs_no_request_per_file(faulty_s3: FaultyProxy) -> None:
    root = f"s3://{faulty_s3.bucket}/raw"
    for number in range(40):
        storage.write_bytes(f"{root}/{number:02d}.jsonl", b'{"text": "x"}\n' * (number + 1))
    storage.write_bytes(f"{root}/other.csv", b"x")
    etag = hashlib.md5(b'{"text": "x"}\n' * 40).hexdigest()
    for pattern in (f"{root}/*.jsonl", f"{root}/", root):
        before = faulty_s3.requests.total()
        items = find_inputs([pattern])
        assert [item.url for item in items] == [f"{root}/{number:02d}.jsonl" for number in range(40)]
        assert [item.num_bytes for item in items] == [14 * (number + 1) for number in range(40)]
        assert items[39].etag.strip('"') == etag
        assert faulty_s3.requests.total() - before <= 4, "one lookup of a file of that name, and the listing"


# --- dividing into units -----------------------------------------------------------------------------------------


def plan(*files: tuple[str, int], sampling: Sampling | None = None, keep_order: bool = False) -> list[Unit]:
    items = [InputFile(name, size, 1.0) for name, size in files]
    return plan_units(items, sampling or Sampling(), OPTIONS, keep_order=keep_order)


def by_letter(**factors: float) -> Sampling:
    return Sampling({"A": ["/a"], "B": ["/b"]}, factors)


def test_a_large_file_is_split_by_bytes() -> None:
    units = plan(("/a.jsonl", 500 * MIB))
    spans = [(piece.start, piece.end) for unit in units for piece in unit.pieces]
    assert spans[0][0] == 0 and all(end == start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] >= 500 * MIB
    assert sum(unit.num_bytes for unit in units) == 500 * MIB
    assert len(units) > 100 and max(unit.num_bytes for unit in units) <= 2 * unit_size([InputFile("", 500 * MIB)])
    assert not any(unit.streamed for unit in units)


def test_a_large_compressed_file_is_streamed() -> None:
    units = plan(("/a.jsonl.zst", 5 * MIB), ("/b.jsonl", 10), ("/c.jsonl", 10), ("/d.parquet.zst", 5 * MIB))
    shapes = [([piece.url for piece in unit.pieces], unit.streamed) for unit in units]
    assert shapes == [(["/a.jsonl.zst"], True), (["/b.jsonl", "/c.jsonl", "/d.parquet.zst"], False)]
    assert [unit.streamed for unit in plan(("/a.jsonl.zst", 4 * MIB))] == [False]


def test_many_small_files_share_units() -> None:
    for size in (50_000, 1500, 0):
        files = [(f"/{number:05d}.jsonl", size) for number in range(10_000)]
        units = plan(*files)
        assert [piece.url for unit in units for piece in unit.pieces] == [name for name, _ in files]
        unit_bytes = unit_size([InputFile("", size * 10_000)])
        cost = max(size, 16 << 10)  # opening a file takes time too
        assert {len(unit.pieces) for unit in units[:-1]} == {-(-unit_bytes // cost)}


def test_the_unit_size_grows_with_the_inputs_within_bounds() -> None:
    totals = [0, 1, *(1 << power for power in range(20, 60))]
    sizes = [unit_size([InputFile("/a", total)]) for total in totals]
    assert sizes == sorted(sizes) and all(size & (size - 1) == 0 for size in sizes)
    assert (sizes[0], sizes[-1]) == (inputs._MIN_UNIT_BYTES, inputs._MAX_UNIT_BYTES)
    counts = [total // size for total, size in zip(totals, sizes, strict=True) if size < sizes[-1]]
    assert max(counts) <= inputs._TARGET_UNITS, "the target number of units is exceeded only at the maximum unit size"


def test_units_are_ordered_by_source_or_by_name() -> None:
    files = (("/a1.jsonl", 10), ("/b1.jsonl", 10), ("/a2.jsonl", 10), ("/c.jsonl", 10))
    ordered = sorted(files)
    shuffled = plan(*ordered, sampling=by_letter())
    assert [(unit.source, [piece.url for piece in unit.pieces]) for unit in shuffled] == [
        ("A", ["/a1.jsonl", "/a2.jsonl"]), ("B", ["/b1.jsonl"]), ("UNKNOWN", ["/c.jsonl"])
    ]  # fmt: skip
    kept = plan(("/a1.jsonl", 10), ("/b1.jsonl", 10), ("/x/a2.jsonl", 10), sampling=by_letter(), keep_order=True)
    assert [unit.source for unit in kept] == ["A", "B", "A"]
    assert [unit.index for unit in kept] == [0, 1, 2]


def test_each_pass_over_a_source_has_its_own_units() -> None:
    units = plan(("/a.jsonl", 10), ("/b.jsonl", 10), ("/c.jsonl", 10), sampling=by_letter(A=2.5, B=0.0))
    assert [(unit.source, unit.copy, unit.group) for unit in units] == [
        ("A", 0, 0), ("A", 1, 0), ("A", 2, 0), ("UNKNOWN", 0, 2)
    ]  # fmt: skip
    assert len({unit.digest for unit in units}) == 4


def test_a_changed_file_changes_only_the_digest_of_its_unit() -> None:
    files = [InputFile(f"/{number}.jsonl", 900_000, 1.0, "e") for number in range(6)]
    before = plan_units(files, Sampling(), OPTIONS)
    assert len(before) > 2
    for change in ({"mtime_s": 2.0}, {"etag": "f"}, {"num_bytes": 900_001}):
        changed = [InputFile(**{**vars(item), **change}) if item.url == "/2.jsonl" else item for item in files]
        after = plan_units(changed, Sampling(), OPTIONS)
        differing = [old.index for old, new in zip(before, after, strict=True) if old.digest != new.digest]
        assert differing == [unit.index for unit in before if "/2.jsonl" in [piece.url for piece in unit.pieces]]
    assert plan_units(files, Sampling(), OPTIONS) == before


def test_a_small_change_of_size_keeps_the_units() -> None:
    before = plan(("/a.jsonl", 300 * MIB), ("/b.jsonl", 100))
    after = plan(("/a.jsonl", 300 * MIB), ("/b.jsonl", 250_000))
    assert [unit.digest for unit in before[:-1]] == [unit.digest for unit in after[:-1]]
