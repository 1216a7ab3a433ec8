"""Readers of JSON documents, texts and tars; names of files, S3."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from datapreprocess_helpers import documents
from readers_helpers import COMPRESS, collect, full_piece, json_lines, read, read_good, read_until_break, sha256

from open_lm.datapreprocess.readers import (
    TO_END,
    ChunkReader,
    FileChunks,
    Piece,
    PieceReader,
    ReadOptions,
    can_stream,
    is_data_name,
    split,
    split_suffixes,
)
from open_lm.errors import ConfigError, DataError

# --- JSON documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_array(tmp_path: Path, indent: int | None, suffix: str) -> None:
    texts = [*documents(300), "x" * 3_000_000, "] , [", '\\" ü 🙂', ""]
    path = tmp_path / f"a.json{suffix}"
    data = json.dumps([{"text": text, "n": 1.5} for text in texts], indent=indent, ensure_ascii=bool(indent)).encode()
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf \n" + data))
    reader = PieceReader(full_piece(path))
    assert collect(reader) == (texts, [])
    assert reader.lines == len(texts) and reader.digest == sha256(path.read_bytes())
    assert split(str(path), path.stat().st_size, 1000) == [Piece(str(path), 0, TO_END, path.stat().st_size)]


def test_other_layouts_of_json_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    forms = {
        json.dumps({"text": "one"}, indent=2): ["one"],
        json.dumps({"text": "one"}, indent=2) + "\n" + json.dumps({"text": "two"}, indent=2): ["one", "two"],
        '{"text": "line"}\n{"text": "line 2"}\n': ["line", "line 2"],
        '{"text": "line"}': ["line"],
        " [ ] \n": [],
        '{ \r\n "text": "x"}': ["x"],
    }
    for content, texts in forms.items():
        path.write_text(content, newline="")
        assert read_good(path) == texts
    path.write_bytes(json_lines(documents(100)))
    pieces = split(str(path), path.stat().st_size, 1000)
    assert len(pieces) > 5
    assert [text for piece in pieces for text in collect(PieceReader(piece))[0]] == documents(100)


def test_bad_elements_of_a_json_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(
        b'[{"text": "ok"}, 5, {"text": "\xff"}, {"text": "\\ud800"}, {"text": null}, {"\xff": 1}, {"text": "ok too"}]'
    )
    found, bad = read(path)
    assert found == ["ok", "ok too"]
    kinds = ["not an object", "invalid UTF-8", "lone surrogate", "null", "missing key"]
    assert [(item.kind, item.line) for item in bad] == list(zip(kinds, range(2, 7), strict=True))
    assert all(item.content.encode() and item.detail.encode() for item in bad)


@pytest.mark.parametrize("end", ['{"text": "y', "5", "{'text'", ', {"text": "z"}', "]]", '] {"text": 1}', "tru"])
def test_elements_before_the_end_of_a_broken_array_are_read(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "x"}, {"text": "y"}' + (", " if end[0] in "{5t" else "") + end)
    found, error = read_until_break(path)
    assert found[:2] == ["x", "y"] and error.kind == "invalid JSON"


# --- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.text.gz", "a.MD", "a.txt.zst"])
def test_text_file_with_and_without_separator(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = "First ü\r\n\n\n\nSecond<|end|> third\n"
    path.write_bytes(COMPRESS[split_suffixes(name)[0]](b"\xef\xbb\xbf" + content.encode()))
    assert read_good(path) == [content]
    assert read_good(path, separator="<|end|>") == ["First ü\r\n\n\n\nSecond", " third\n"]
    reader = PieceReader(full_piece(path), ReadOptions(separator="\n\n"))
    assert collect(reader)[0] == ["First ü\r", "Second<|end|> third\n"]
    assert reader.lines == 3 and reader.digest == sha256(path.read_bytes())
    options = ReadOptions(separator="\n\n")
    for chunk_bytes in (1, 5, 1000):
        parts = list(FileChunks(full_piece(path), chunk_bytes, options))
        assert [text for part in parts for text in collect(ChunkReader(part, str(path), options))[0]] == [
            "First ü\r",
            "Second<|end|> third\n",
        ]


def test_text_with_invalid_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good|b\xe4d|good")
    assert [item.kind for item in read(path)[1]] == ["invalid UTF-8"]
    found, bad = read(path, separator="|")
    assert found == ["good", "good"] and [(item.kind, item.line) for item in bad] == [("invalid UTF-8", 2)]


# --- tars --------------------------------------------------------------------------------------------------------


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def test_tar_members(tmp_path: Path) -> None:
    members = {
        "1.txt": "wörd".encode(), "1.json": b'{"body": {"x": "json text"}}', "x" * 150 + ".json": b'{"body": 1}',
        "1.npy": npy(np.array([[5, 6], [7, 8]], np.uint16)), "2.txt": b"\xff", "2.npy": b"junk",
        "3.npy": npy(np.array([1.5])), "4.npy": npy(np.array([{}]), allow_pickle=True), "5.text": b"more",
    }  # fmt: skip
    plain = make_tar(tmp_path / "a.tar", members)
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        for key in ("text", "txt"):
            reader = PieceReader(full_piece(path), ReadOptions(key))
            found, bad = collect(reader)
            assert found == ["wörd", "more"] and [item.kind for item in bad] == ["invalid UTF-8"]
            assert "2.txt" in bad[0].detail and reader.lines == 3
            assert reader.digest == sha256(path.read_bytes()) and reader.bytes_read == path.stat().st_size
        found, bad = read(path, content_key="json:body.x")
        assert found == ["json text"] and [item.kind for item in bad] == ["missing key"]
        found, bad = read(path, content_key="npy")
        assert [ids.tolist() for ids in found] == [[5, 6, 7, 8]]
        assert [item.kind for item in bad] == ["invalid npy"] * 3
    with pytest.raises(ConfigError, match="--content_key"):
        read(plain, content_key="body")


def test_broken_tars(tmp_path: Path) -> None:
    data = make_tar(tmp_path / "a.tar", {f"{n}.txt": b"x" * 700 for n in range(5)}).read_bytes()
    path = tmp_path / "d.tar"
    path.write_bytes(data[:4000])
    found, error = read_until_break(path)
    assert len(found) == 2 and error.kind == "damaged" and "cut short" in str(error)
    path.write_bytes(b"no tar at all" * 100)
    assert read_until_break(path)[1].kind == "damaged"
    assert read_until_break(make_tar(path, {"a.jpg": b""}))[1].kind == "no documents"
    packed = tmp_path / "e.tar.gz"
    packed.write_bytes(gzip.compress(data, 0)[:4000])
    found, error = read_until_break(packed)
    assert len(found) == 2 and error.kind == "cut short"


# --- names -------------------------------------------------------------------------------------------------------


def test_suffixes() -> None:
    assert split_suffixes("x/00.zst") == (".zst", ".jsonl")
    assert split_suffixes("x/c4.00000-of-01024.json.gz") == (".gz", ".json")
    assert split_suffixes("x/A.JSONL?rows=3:5") == ("", ".jsonl")
    for name in ("a.csv", "a.pdf.gz", "README"):
        with pytest.raises(DataError, match=r"no reader for .*\.jsonl.*\.zst"):
            split_suffixes(name)
    assert is_data_name("x/a.txt") and is_data_name("s3://b/a.parquet")
    assert not any(map(is_data_name, ["x/README.md", "x/dataset_info.json", "x/.hidden.txt", "x/a.csv"]))


def test_row_ranges(tmp_path: Path) -> None:
    texts = documents(30)
    for name, data in {
        "a.jsonl.gz": b"\n" + json_lines(texts),
        "b.json": json.dumps([{"text": t} for t in texts]).encode(),
    }.items():
        path = tmp_path / name
        path.write_bytes(COMPRESS[split_suffixes(name)[0]](data))
        for first, last in ((0, 3), (5, 30), (29, 99), (4, 4)):
            reader = PieceReader(full_piece(f"{path}?rows={first}:{last}"))
            assert collect(reader) == (texts[first:last], []) and reader.digest is None
        assert split(f"{path}?rows=2:9", 1 << 30, 1) == [Piece(f"{path}?rows=2:9", 0, TO_END, 1 << 30)]
        assert not can_stream(f"{path}?rows=2:9")


def test_read_from_s3(tmp_path: Path, s3_bucket: str) -> None:
    from open_lm import storage

    texts = documents(200)
    tar = make_tar(tmp_path / "a.tar", {f"{number}.txt": text.encode() for number, text in enumerate(texts)})
    contents = {
        "a.jsonl": json_lines(texts),
        "a.jsonl.zst": zstandard.compress(json_lines(texts)),
        "a.tar": tar.read_bytes(),
    }
    for name, data in contents.items():
        url = f"s3://{s3_bucket}/x/{name}"
        storage.write_bytes(url, data)
        readers = [PieceReader(piece) for piece in split(url, len(data), 5000)]
        assert [text for reader in readers for text in collect(reader)[0]] == texts
        assert len(readers) > 1 or readers[0].digest == sha256(data)


def test_incomplete_read_has_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["x" * 1_000_000] * 5))
    reader = PieceReader(full_piece(path))
    next(iter(reader))
    assert reader.digest is None
