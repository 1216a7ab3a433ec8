"""Reading raw files: compressions, formats, byte ranges, bad documents, broken files, and the finding of inputs."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from datapreprocess_helpers import documents, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.datapreprocess.job import InputFile, find_inputs, plan_units
from open_lm.datapreprocess.readers import BadDocument, Piece, PieceReader, split_suffixes
from open_lm.datapreprocess.sampling import Sampling
from open_lm.errors import DataError


def read(path: Path, key: str = "text") -> list[object]:
    return list(PieceReader(Piece(str(path), 0, path.stat().st_size), key))


COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_and_several_frames_in_a_file(tmp_path: Path, suffix: str) -> None:
    texts = [*documents(50), "x" * 700_000, 'äöü\u2028\x85 \\ " \n end', ""]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    halves = "".join(lines[:20]).encode(), "".join(lines[20:]).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](half) for half in halves))
    assert read(path) == texts


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("part", [0.3, 0.99])
def test_a_cut_compressed_file_is_an_error_not_an_end(tmp_path: Path, suffix: str, part: float) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    data = COMPRESS[suffix]("".join(json.dumps({"text": text}) + "\n" for text in documents(500)).encode())
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(DataError, match=r"a\.jsonl.*cut short"):
        read(path)
    path.write_bytes(b"no such format at all")
    with pytest.raises(DataError, match=r"a\.jsonl.*cannot be decompressed"):
        read(path)


def test_an_empty_file_and_blank_lines_hold_no_documents(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        assert read(tmp_path / name) == []
    (tmp_path / "c.jsonl").write_bytes(b'\n  \n{"text": "x"}\r\n\n{"text": "no newline at the end"}')
    assert read(tmp_path / "c.jsonl") == ["x", "no newline at the end"]


def test_bad_documents_are_told_by_kind_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    wrong = [b'{"text": ', b'{"body": "x"}', b"[]", b'{"text": 5}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b""]
    path.write_bytes(b"\n".join([b'{"text": "ok"}', *wrong, b'{"text": "ok too"}']))
    items = read(path)
    assert items[0] == "ok" and items[-1] == "ok too"
    bad = [item for item in items if isinstance(item, BadDocument)]
    kinds = ["invalid JSON", "missing key", "not an object", "wrong type", "invalid JSON", "invalid JSON"]
    assert [(item.kind, item.line) for item in bad] == list(zip(kinds, range(2, 8), strict=True))
    assert '"text"' in bad[1].detail and "body" in bad[1].detail


def test_content_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a.b": "flat", "a": {"b": "deep"}}\n{"a": {"b": "deep"}}\n')
    assert read(path, "a.b") == ["flat", "deep"]
    assert read(path, "json:a.b") == ["flat", "deep"]


@given(st.lists(st.text(max_size=40), min_size=1, max_size=30), st.lists(st.integers(0, 10_000), max_size=6))
@settings(max_examples=60, deadline=None)
def test_byte_ranges_give_every_line_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    path.write_bytes(
        "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode("utf-8", "replace")
    )
    size = path.stat().st_size
    edges = sorted({0, size, *(cut % (size + 1) for cut in cuts)})
    readers = [PieceReader(Piece(str(path), start, end)) for start, end in itertools.pairwise(edges)]
    found = [item for reader in readers for item in reader]
    assert found == read(path)
    assert sum(reader.lines for reader in readers) == len(texts)


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tar_members(tmp_path: Path) -> None:
    ids = io.BytesIO()
    np.save(ids, np.array([[5, 6], [7, 8]], np.uint16))
    members = {"1.txt": "wörd".encode(), "1.json": b'{"body": {"x": "json text"}}', "1.npy": ids.getvalue()}
    path = make_tar(tmp_path / "a.tar", {**members, "2.txt": b"\xff", "2.npy": b"junk"})
    for key in ("text", "txt"):
        found = read(path, key)
        assert found[0] == "wörd" and isinstance(found[1], BadDocument) and "2.txt" in found[1].detail
    assert read(path, "json:body.x") == ["json text"]
    first, second = read(path, "npy")
    assert isinstance(first, np.ndarray) and first.tolist() == [5, 6, 7, 8]
    assert isinstance(second, BadDocument) and second.kind == "invalid npy"
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path / "b.tar.gz", "txt")[0] == "wörd"
    with pytest.raises(DataError, match="--content_key"):
        read(path, "body")
    with pytest.raises(DataError, match="no member ends in"):
        read(make_tar(tmp_path / "c.tar", {"a.jpg": b""}), "txt")
    (tmp_path / "d.tar").write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DataError, match="cut short"):
        read(tmp_path / "d.tar", "txt")


def test_suffixes() -> None:
    assert split_suffixes("x/00.zst") == (".zst", ".jsonl")
    assert split_suffixes("x/c4.00000-of-01024.json.gz") == (".gz", ".json")
    for name in ("a.parquet", "a.txt.gz", "README"):
        with pytest.raises(DataError, match=r"no reader for .*\.jsonl.*\.zst"):
            split_suffixes(name)


def test_inputs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.zst", "deep/er/c.json.gz"):
        write_jsonl(tmp_path / name, ["x"])
    (tmp_path / "notes.md").write_text("not an input")
    everything = [str(tmp_path / name) for name in ("a.jsonl.zst", "b.jsonl", "deep/er/c.json.gz")]
    assert [item.url for item in find_inputs([str(tmp_path), f"{tmp_path}/*.jsonl", everything[1]])] == everything
    assert [item.url for item in find_inputs([f"{tmp_path}/*.jsonl*"])] == everything[:2]
    assert [item.url for item in find_inputs([str(tmp_path)], [".gz"])] == everything[2:]
    assert [item.url for item in find_inputs([f"{tmp_path}/d*"])] == everything[2:]
    with pytest.raises(DataError) as caught:
        find_inputs([f"{tmp_path}/z*", str(tmp_path / "missing.jsonl"), str(tmp_path / "notes.md")])
    assert all(name in str(caught.value) for name in ("z*", "missing.jsonl", "notes.md"))


def test_inputs_in_s3(tmp_path: Path, s3_bucket: str) -> None:
    from open_lm import storage

    path = write_jsonl(tmp_path / "a.jsonl.zst", documents(20))
    for name in ("x/a.jsonl.zst", "x/deep/b.jsonl.zst"):
        storage.upload(path, f"s3://{s3_bucket}/{name}")
    found = find_inputs([f"s3://{s3_bucket}/x"])
    assert [item.url for item in found] == [f"s3://{s3_bucket}/x/a.jsonl.zst", f"s3://{s3_bucket}/x/deep/b.jsonl.zst"]
    assert found[:1] == find_inputs([f"s3://{s3_bucket}/x/*.zst"])
    assert list(PieceReader(Piece(found[1].url, 0, found[1].num_bytes))) == documents(20)


def test_units_cover_every_byte_once() -> None:
    inputs = [InputFile(f"f{number:03d}.jsonl", 1000) for number in range(3000)]
    inputs += [InputFile("huge.jsonl", 50_000_001), InputFile("huge.jsonl.zst", 50_000_000)]
    units = plan_units(inputs, None)
    covered: dict[str, int] = {}
    for unit in units:
        for piece in unit.pieces:
            assert covered.get(piece.url, 0) == piece.start
            covered[piece.url] = piece.end
    assert covered == {item.url: item.num_bytes for item in inputs}
    assert sum(any(piece.url == "huge.jsonl" for piece in unit.pieces) for unit in units) > 10
    assert sum(any(piece.url == "huge.jsonl.zst" for piece in unit.pieces) for unit in units) == 1
    assert [unit.index for unit in units] == list(range(len(units)))


def test_units_hold_one_source_and_repeat_by_its_factor() -> None:
    sampling = Sampling({"WIKI": ["wiki"], "WEB": ["web"]}, {"WIKI": 2.5, "WEB": 0})
    units = plan_units(
        [InputFile(f"{name}-{n}.jsonl", 10) for name in ("other", "web", "wiki") for n in range(2)], sampling
    )
    assert [(unit.source, unit.copy) for unit in units] == [("UNKNOWN", 0), ("WIKI", 0), ("WIKI", 1), ("WIKI", 2)]
    assert len({unit.group for unit in units[1:]}) == 1
