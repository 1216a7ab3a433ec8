"""Tests of finding input files, dividing them into units of work, and all input formats end to end."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datapreprocess_helpers import (
    documents,
    expected_tokens,
    in_process,
    make,
    read_shards,
    record_of,
    small_tokenizer,
    tokens_of,
    write_jsonl,
)
from faulty_proxy import FaultyProxy
from readers_helpers import COMPRESS

from open_lm import storage
from open_lm.datapreprocess import inputs
from open_lm.datapreprocess.inputs import InputFile, Unit, find_inputs, plan_units, unit_size
from open_lm.datapreprocess.readers import ReadOptions
from open_lm.datapreprocess.sampling import Sampling
from open_lm.errors import ConfigError, DataError, StorageError, UserError

__all__ = ["in_process", "small_tokenizer"]
EOT_ID = 3
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


# --- input formats, end to end -----------------------------------------------------------------------------------

TEXTS = [text for text in documents(60, seed=11) if text]


def json_rows(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_arrow(path: Path, texts: Sequence[str]) -> None:
    table = pa.table({"text": list(texts)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def save_to_disk(path: Path, texts: Sequence[str]) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": list(texts)}).save_to_disk(path, num_shards=2)


def write_nested(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"meta": {"body": text}, "text": "wrong"}) + "\n" for text in texts))


def write_many_texts(path: Path, texts: Sequence[str]) -> None:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}{'.md' if number % 2 else '.txt'}").write_bytes(text.encode())


def write_separated(separator: str) -> Callable[[Path, Sequence[str]], Any]:
    return lambda path, texts: path.write_bytes(separator.join(texts).encode())


def write_lines(compression: str) -> Callable[[Path, Sequence[str]], Any]:
    return lambda path, texts: path.write_bytes(COMPRESS[compression](json_rows(texts)))


def as_members(suffix: str, content: Callable[[str], bytes]) -> Callable[[Path, Sequence[str]], Any]:
    return lambda path, texts: write_tar(path, {f"{n:04d}{suffix}": content(text) for n, text in enumerate(texts)})


KINDS: dict[str, tuple[str, Callable[[Path, Sequence[str]], Any], list[str]]] = {
    "parquet": ("a.parquet", lambda path, texts: pq.write_table(pa.table({"text": texts}), path, row_group_size=9), []),
    "arrow": ("a.arrow", write_arrow, []),
    "saved data set": ("saved", save_to_disk, []),
    "texts": ("texts", write_many_texts, []),
    "an array": ("a.json", lambda path, texts: path.write_text(json.dumps([{"text": text} for text in texts])), []),
    "nested key": ("a.jsonl", write_nested, ["--content-key", "meta.body"]),
    "tar of texts": ("a.tar", as_members(".txt", str.encode), ["--content-key", "txt"]),
    "tar of json": (
        "a.tar", as_members(".json", lambda text: json.dumps({"body": text}).encode()), ["--content-key", "json:body"]
    ),
    "separated by lines": ("a.txt", write_separated("\n\n"), ["--separator", r"\n\n"]),
    "separated by real newlines": ("a.txt", write_separated("\n\n"), ["--separator", "\n\n"]),
    "separated by ß": ("a.txt", write_separated("ß"), ["--separator", "ß"]),
    "separated by U+2028": ("a.md", write_separated("\u2028"), ["--separator", "\u2028"]),
    "separated by escaped U+2028": ("a.md", write_separated("\u2028"), ["--separator", r"\u2028"]),
    "separated by a mixture": ("a.txt", write_separated("\t§数\\"), ["--separator", r"\t§数\\"]),
    "separated by a lookalike of an escape": ("a.txt", write_separated(r"\d\x"), ["--separator", r"\d\x"]),
    **{f"lines{suffix}": (f"a.jsonl{suffix}", write_lines(suffix), []) for suffix in COMPRESS},
    "a zst": ("00.zst", write_lines(".zst"), []),
    "an xz": ("a.txt.xz", lambda p, t: p.write_bytes(COMPRESS[".xz"]("|".join(t).encode())), ["--separator", "|"]),
}  # fmt: skip


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", KINDS)
def test_input_formats(tmp_path: Path, small_tokenizer: str, kind: str) -> None:
    name, write, flags = KINDS[kind]
    write(tmp_path / name, TEXTS)
    output = make(tmp_path / name, tmp_path / "out", small_tokenizer, *flags) / "0"
    assert tokens_of(read_shards(output)) == expected_tokens(TEXTS, small_tokenizer, EOT_ID)
    record = record_of(output)
    assert record["counts"]["documents"] == len(TEXTS)
    assert record["counts"]["characters"] == sum(map(len, TEXTS))
    for item in record["inputs"]:  # columnar files are not read sequentially, so they have no digest
        columns = item["url"].endswith((".parquet", ".arrow"))
        digest = None if columns else hashlib.sha256(Path(item["url"]).read_bytes()).hexdigest()
        assert item.get("sha256") == digest and item["num_bytes"] == os.path.getsize(item["url"])


@pytest.mark.usefixtures("in_process")
def test_documents_of_ids_larger_than_16_bits(tmp_path: Path) -> None:
    from open_lm.datapreprocess.ray.tokenize_shuffle import main

    rng = np.random.default_rng(0)
    arrays = [rng.integers(60_000, 90_000, rng.integers(1, 90)) for _ in range(30)]
    members = {}
    for number, array in enumerate(arrays):
        buffer = io.BytesIO()
        np.save(buffer, array.astype([np.uint32, np.int64][number % 2]))
        members[f"{number:03d}.npy"] = buffer.getvalue()
    write_tar(tmp_path / "a.tar", members)
    command = ["--input", str(tmp_path / "a.tar"), "--content-key", "npy", "--vocab-size", "90000", "--seqlen", "32"]
    main([*command, "--output", str(tmp_path / "out"), "--no-shuffle", "--format", "npy"])
    stream = [value for array in arrays for value in [*array.tolist(), 0]]
    shards = read_shards(tmp_path / "out")
    assert [value for _, _, ids in shards for value in ids if value != -1] == stream
    for flags, message in (
        (["--add-bos"], "no begin-of-text token"), (["--eot-token", "x"], "--eot-token x: needs a --tokenizer")
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            main([*command, "--output", str(tmp_path / "no"), *flags])


@pytest.mark.usefixtures("in_process")
def test_a_slice_of_a_local_data_set(tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    texts = documents(100, seed=4)
    write_jsonl(tmp_path / "data" / "train-0.jsonl", texts[:50])
    write_jsonl(tmp_path / "data" / "train-1.jsonl", texts[50:])
    url = f"hf-dataset://{tmp_path}/data?split=train"
    for slice_, part in (("[:10%]", texts[:10]), ("[45:55]", texts[45:55]), ("", texts)):
        out = tmp_path / f"out{len(part)}{slice_[1:3]}".replace(":", "_").replace("%", "")
        output = make([url + slice_], out, small_tokenizer) / "0"
        assert tokens_of(read_shards(output)) == expected_tokens(part, small_tokenizer, EOT_ID), slice_
        has_digest = ["sha256" in item for item in record_of(output)["inputs"]]
        assert has_digest == [not slice_] * len(has_digest), "a partially read file has no digest"


@pytest.mark.usefixtures("in_process")
def test_files_read_in_pieces(tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_MIN_UNIT_BYTES", 1 << 12)
    texts = documents(300, seed=6)
    path = write_jsonl(tmp_path / "large.jsonl", texts)
    write_jsonl(tmp_path / "large.jsonl.zst", texts)
    write_jsonl(tmp_path / "small.jsonl", texts[:2])
    output = make([tmp_path / "*.jsonl*"], tmp_path / "out", small_tokenizer) / "0"
    assert tokens_of(read_shards(output)) == expected_tokens([*texts * 2, *texts[:2]], small_tokenizer, EOT_ID)
    large, streamed, small = record_of(output)["inputs"]
    data = path.read_bytes()
    assert len(large["pieces"]) > 5 and "sha256" not in large
    assert large["pieces"][0][0] == 0 and large["pieces"][-1][1] >= len(data)
    digests = [hashlib.sha256(data[start:end]).hexdigest() for start, end in large["pieces"]]
    assert large["sha256_of_pieces"] == hashlib.sha256("".join(digests).encode()).hexdigest()
    for item in (streamed, small):
        assert item["sha256"] == hashlib.sha256(Path(item["url"]).read_bytes()).hexdigest()


@pytest.mark.usefixtures("in_process")
def test_inputs_on_s3_are_recorded_with_their_etags(tmp_path: Path, small_tokenizer: str, s3_bucket: str) -> None:
    data = json_rows(TEXTS)
    storage.write_bytes(f"s3://{s3_bucket}/raw/a.jsonl", data)
    output = make([f"s3://{s3_bucket}/raw/*.jsonl"], tmp_path / "out", small_tokenizer) / "0"
    assert tokens_of(read_shards(output)) == expected_tokens(TEXTS, small_tokenizer, EOT_ID)
    (item,) = record_of(output)["inputs"]
    assert item["url"] == f"s3://{s3_bucket}/raw/a.jsonl" and item["num_bytes"] == len(data)
    assert item["etag"].strip('"') == hashlib.md5(data).hexdigest()
    assert item["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.usefixtures("in_process")
def test_ten_thousand_small_files(tmp_path: Path, small_tokenizer: str) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in random.Random(0).sample(range(10_000), 10_000):
        (folder / f"{number:05d}.jsonl").write_text(f'{{"text": "the {number}"}}\n')
    output = make(folder, tmp_path / "out", small_tokenizer, "--no-shuffle") / "0"
    texts = [f"the {number}" for number in range(10_000)]
    assert tokens_of(read_shards(output)) == expected_tokens(texts, small_tokenizer, EOT_ID)
    assert len(record_of(output)["inputs"]) == 10_000
