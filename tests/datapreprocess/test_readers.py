"""Readers of raw files: compression, lines, byte ranges, chunks and bad documents."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import random
from pathlib import Path

import pytest
import zstandard
from datapreprocess_helpers import documents
from hypothesis import given, settings
from hypothesis import strategies as st
from readers_helpers import COMPRESS, collect, full_piece, json_lines, read, read_good, read_until_break, sha256

from open_lm.datapreprocess.readers import (
    TO_END,
    BrokenFile,
    ChunkReader,
    FileChunks,
    Piece,
    PieceReader,
    ReadOptions,
    can_stream,
    input_stream,
    split,
    split_suffixes,
)
from open_lm.datapreprocess.readers.parts import split_parts

# --- compression -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_may_have_several_frames(tmp_path: Path, suffix: str) -> None:
    texts = [*documents(50), "x" * 3_000_000, 'äöü\u2028\x85 \\ " \n end', ""]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](json_lines(texts[:20])) + COMPRESS[suffix](json_lines(texts[20:])))
    reader = PieceReader(full_piece(path))
    assert collect(reader) == (texts, [])
    assert reader.lines == len(texts) and reader.bytes_read == path.stat().st_size
    assert reader.digest == sha256(path.read_bytes())


def test_large_zstandard_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=True)
    path = tmp_path / "a.zst"
    path.write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(json_lines(["far"])))
    assert read_good(path) == ["far"]


def test_highly_compressible_content_is_decompressed_in_blocks(tmp_path: Path) -> None:
    line = json_lines(["x" * 100_000])
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(line * 1000))
    sizes = [sum(map(len, block.documents)) for block in PieceReader(full_piece(path))]
    assert sum(sizes) == 100_000_000 and max(sizes) < 10 << 20


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_documents_before_the_end_of_a_truncated_compressed_file_are_read(tmp_path: Path, suffix: str) -> None:
    texts = [*documents(300), random.Random(1).randbytes(300_000).hex(), *documents(50)]
    data = COMPRESS[suffix](json_lines(texts))
    path = tmp_path / f"a.jsonl{suffix}"
    for part in (0.7, 0.999):
        path.write_bytes(data[: int(len(data) * part)])
        found, error = read_until_break(path)
        assert error.kind == "cut short" and "download the file again" in str(error)
        assert len(found) >= 300 and found == texts[: len(found)]
        given: list[str] = []
        with pytest.raises(BrokenFile):
            for chunk in FileChunks(full_piece(path), 50_000):
                given += collect(ChunkReader(chunk, str(path)))[0]
        assert given == found
    path.write_bytes(b"no such format at all")
    assert read_until_break(path)[1].kind == "cannot be decompressed"


def test_missing_file_raises_broken_file(tmp_path: Path, s3_bucket: str) -> None:
    assert read_until_break(tmp_path / "missing.jsonl")[1].kind == "unreadable"
    for url in (f"s3://{s3_bucket}/missing.jsonl.zst", f"s3://{s3_bucket}-no/missing.txt"):
        with pytest.raises(BrokenFile, match="missing") as caught:
            list(PieceReader(full_piece(url)))
        assert caught.value.kind == "unreadable"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.kind, str(copy)) == (caught.value.kind, str(caught.value))


# --- lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.zst", "a.json", "a.json.gz", "a.txt", "a.md.xz", "a.tar", "a.tar.gz"]
)
def test_empty_file_is_a_bad_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for data in {b"", COMPRESS[split_suffixes(name)[0]](b"")}:
        path.write_bytes(data)
        found, bad = read(path)
        assert found == [] and [(item.kind, item.line) for item in bad] == [("empty file", 0)]
        if can_stream(str(path)):
            streamed = [collect(ChunkReader(chunk, str(path))) for chunk in FileChunks(full_piece(path), 100)]
            assert streamed == [([], bad)]


def test_line_ends_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"text": "first"}\r\n\n  \n{"text": "x"}\r\n\n{"text": "no newline at the end"}'
    for suffix in ("", ".gz"):
        path = tmp_path / f"c.jsonl{suffix}"
        path.write_bytes(COMPRESS[suffix](data))
        reader = PieceReader(full_piece(path))
        assert collect(reader) == (["first", "x", "no newline at the end"], [])
        assert reader.lines == 6
    (tmp_path / "d.jsonl").write_bytes(b"\n \n")
    assert read(tmp_path / "d.jsonl") == ([], [])


BAD_LINES = {
    b'{"text": ': "invalid JSON",
    b'{"body": "x"}': "missing key",
    b"[]": "not an object",
    b'"text"': "not an object",
    b'{"text": 5}': "wrong type",
    b'{"text": ["x"]}': "wrong type",
    b'{"text": null}': "null",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": "\\udc00 x"}': "lone surrogate",
    b'{"text": "a\x01b"}': "invalid JSON",
    b'{"text": "x"} {"text": "y"}': "invalid JSON",
}


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_bad_documents_are_reported_by_kind_and_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\n".join([b'{"text": "ok"}', *BAD_LINES, b"", b'{"text": "ok too"}'])))
    found, bad = read(path)
    assert found == ["ok", "ok too"]
    assert [(item.kind, item.line) for item in bad] == list(zip(BAD_LINES.values(), range(2, 15), strict=True))
    assert all(item.url == str(path) and item.content and item.content.encode() for item in bad)
    assert '"text"' in bad[1].detail and "body" in bad[1].detail
    assert bad[0].content == '{"text": '
    streamed = [collect(ChunkReader(chunk, str(path))) for chunk in FileChunks(full_piece(path), 40)]
    assert len(streamed) > 4
    assert [document for part in streamed for document in part[0]] == found
    assert [item for part in streamed for item in part[1]] == bad


def test_excerpt_of_a_bad_document_is_short_and_encodable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff' + "ü".encode() * 4000)
    (item,) = read(path)[1]
    assert len(item.content) == 500 and item.content.encode().startswith(b'{"text": "\\xff')


def test_content_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a.b": "flat", "a": {"b": "deep"}}\n{"a": {"b": "deep"}}\n')
    assert read_good(path, content_key="a.b") == ["flat", "deep"]
    assert read_good(path, content_key="json:a.b") == ["flat", "deep"]
    path.write_text('{"a": {"b": "deep"}}\n{"a": "text"}\n{"a": null}\n[]\n"a.b"\n')
    found, bad = read(path, content_key="a.b")
    assert found == ["deep"]
    assert [item.kind for item in bad] == ["missing key", "missing key", "not an object", "not an object"]


def test_other_values_of_a_line_are_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"x": "\xff", "text": "a"}',
        b'{"text": "old", "text": "b", "x": {"y": [1e999]}}',
        b'{"te\\u0078t": "c"}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert read_good(path) == ["a", "b", "c"]
    path.write_bytes(b"\n".join([*lines, b"junk"]))
    found, bad = read(path)
    assert found == ["a", "b", "c"] and [item.kind for item in bad] == ["invalid JSON"]
    path.write_bytes(b'{"x": ' + b"[" * 900 + b"]" * 900 + b', "text": "deep"}\n{"x": ' + b"[" * 100_000)
    found, bad = read(path)
    assert found == ["deep"] and [item.kind for item in bad] == ["invalid JSON"]


MIXED_LINES = b'\n{"text": "a"}\r\n\n{"text": "\xc3\xa4"}\n \n{"no": 1}\n{"text": "last"}'


@pytest.mark.parametrize("block_bytes", [1, 3, 8, 1 << 20])
def test_pieces_with_any_byte_boundaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(input_stream, "_PLAIN_BYTES", block_bytes)
    path = tmp_path / "a.jsonl"
    for data in (MIXED_LINES, MIXED_LINES + b"\n"):
        path.write_bytes(data)
        for middle in itertools.combinations(range(1, len(data)), 1 if block_bytes < 8 else 2):
            edges = [0, *middle, len(data)]
            readers = [PieceReader(Piece(str(path), a, b, b - a)) for a, b in itertools.pairwise(edges)]
            parts = [collect(reader) for reader in readers]
            assert [text for part in parts for text in part[0]] == ["a", "ä", "last"]
            assert [item.kind for part in parts for item in part[1]] == ["missing key"]
            assert sum(reader.lines for reader in readers) == 7
            digests = [sha256(data[a:b]) for a, b in itertools.pairwise(edges)]
            assert [reader.digest for reader in readers] == digests


@given(st.lists(st.text(max_size=40), min_size=1, max_size=30), st.lists(st.integers(0, 10_000), max_size=6))
@settings(max_examples=40, deadline=None)
def test_byte_ranges_yield_every_line_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_bytes("\n".join(lines).encode("utf-8", "replace"))
    size = path.stat().st_size
    edges = sorted({0, size, *(cut % (size + 1) for cut in cuts)})
    readers = [PieceReader(Piece(str(path), a, b, b - a)) for a, b in itertools.pairwise(edges)]
    assert [text for reader in readers for text in collect(reader)[0]] == read_good(path)
    assert sum(reader.lines for reader in readers) == len(texts)


def test_lines_longer_than_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_stream, "_PLAIN_BYTES", 1000)
    texts = ["a", "x" * 50_000, "b", "y" * 999, "z" * 20_000]
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(texts))
    size = path.stat().st_size
    pieces = split(str(path), size, 3000)
    assert len(pieces) > 20 and sum(piece.num_bytes for piece in pieces) == size
    assert [text for piece in pieces for text in collect(PieceReader(piece))[0]] == texts


def test_file_of_100_000_lines(tmp_path: Path) -> None:
    texts = [f"line {number}" for number in range(100_000)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(texts))
    reader = PieceReader(full_piece(path))
    assert collect(reader)[0] == texts and reader.lines == 100_000
    pieces = split(str(path), path.stat().st_size, 300_000)
    assert [text for piece in pieces for text in collect(PieceReader(piece))[0]] == texts
    assert split(str(path), 500_000, 300_000) == [Piece(str(path), 0, TO_END, 500_000)]


# --- chunks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 37, 1000, 20_000, 1 << 30])
def test_chunks_of_any_size_give_the_same_documents(tmp_path: Path, chunk_bytes: int) -> None:
    texts = documents(200)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b"\n\r\n" + json_lines(texts)[:-1]))
    cut = FileChunks(full_piece(path), chunk_bytes)
    found = list(cut)
    assert [part.number for part in found] == list(range(len(found)))
    assert [text for part in found for text in collect(ChunkReader(part, str(path)))[0]] == texts
    assert all(len(part.data) >= chunk_bytes - 1 for part in found[:-1])
    assert cut.digest == sha256(path.read_bytes()) and cut.bytes_read == path.stat().st_size
    readers = [ChunkReader(part, str(path)) for part in found]
    assert [collect(reader)[1] for reader in readers] == [[]] * len(readers)
    lines = list(itertools.accumulate((reader.lines for reader in readers), initial=1))
    assert [part.first_line for part in found] == lines[:-1] and lines[-1] == 203


@given(st.lists(st.sampled_from(["a", "\n", "\n\n", "<sep>", "ü", "x<", "sep>"]), max_size=40), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_parts_do_not_depend_on_block_size(pieces: list[str], block_bytes: int) -> None:
    data = "".join(pieces).encode()
    blocks = [data[a : a + block_bytes] for a in range(0, len(data), block_bytes)]
    for separator in (b"\n", b"\n\n", b"<sep>"):
        expected = data.split(separator)
        found = [part for parts in split_parts(iter(blocks), separator) for part in parts]
        assert found == (expected if expected[-1] else expected[:-1])


def test_can_stream(tmp_path: Path) -> None:
    separated = ReadOptions(separator="\n\n")
    assert can_stream("a.jsonl.zst") and can_stream("a.gz") and not can_stream("a.jsonl")
    assert can_stream("a.txt", separated) and can_stream("a.txt.gz", separated) and not can_stream("a.txt.gz")
    assert not can_stream("a.tar.gz") and not can_stream("a.parquet")
    for name, data in {"lines.json.gz": json_lines(["x"]), "array.json.gz": b'[{"text": "x"}]'}.items():
        (tmp_path / name).write_bytes(gzip.compress(data))
        assert can_stream(str(tmp_path / name)) == (name == "lines.json.gz")
