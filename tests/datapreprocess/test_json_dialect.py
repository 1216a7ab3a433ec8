"""Test that lines, arrays, objects and tar members accept the same JSON: strict, or what Python also accepts."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import pytest
from datapreprocess_helpers import make, record_of, rejects_of
from readers_helpers import COMPRESS, full_piece

from open_lm.datapreprocess.readers import ChunkReader, FileChunks, PieceReader, ReadOptions

STRICT = [b'{"text": "plain", "score": 1.5}', b'{"text": "unchecked", "x": "\xff"}']
LENIENT = [
    b'{"text": "not a number", "score": NaN}',
    b'{"score": -Infinity, "more": [{"deep": Infinity}], "text": "infinite"}',
    b'{"text": "surrogate elsewhere", "x": "\\ud800", "y": NaN}',
    b'{"text": "bytes elsewhere", "x": "\xff", "y": NaN}',
]
BAD = {
    b'{"text": NaN}': "wrong type",
    b'{"body": "x", "score": NaN}': "missing key",
    b'{"text": "\\ud800", "score": NaN}': "lone surrogate",
    b'{"text": "\xff", "score": NaN}': "invalid UTF-8",
}
OBJECTS = [STRICT[0], *LENIENT, *BAD, STRICT[1]]
TEXTS = ["plain", "not a number", "infinite", "surrogate elsewhere", "bytes elsewhere", "unchecked"]


def tar_of(objects: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, data in enumerate(objects):
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


FILES = {
    "lines.jsonl": b"\n".join(OBJECTS),
    "lines.jsonl.zst": COMPRESS[".zst"](b"\n".join(OBJECTS)),
    "lines.json": b"\n".join(OBJECTS),
    "array.json": b"[" + b", ".join(OBJECTS) + b"]",
    "array.json.gz": COMPRESS[".gz"](b"[\n" + b",\n".join(OBJECTS) + b"]\n"),
    "objects.json": b"\n".join(item.replace(b"{", b"{\n", 1) for item in OBJECTS),
    "members.tar": tar_of(OBJECTS),
}


@pytest.mark.parametrize("key", ["text", "json:text"])
@pytest.mark.parametrize("name", FILES)
def test_all_formats_accept_the_same_json(tmp_path: Path, name: str, key: str) -> None:
    if ".tar" in name:
        key = "json:text"
    path = tmp_path / name
    path.write_bytes(FILES[name])
    blocks = list(PieceReader(full_piece(path), ReadOptions(key)))
    assert [document for block in blocks for document in block.documents] == TEXTS
    assert [bad.kind for block in blocks for bad in block.bad] == list(BAD.values())
    assert sum(block.lenient for block in blocks) == len(LENIENT)


def test_streamed_lines_accept_the_same_json(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl.zst"
    path.write_bytes(FILES[path.name])
    chunks = list(FileChunks(full_piece(path), 60))
    blocks = [block for chunk in chunks for block in ChunkReader(chunk, str(path))]
    assert len(chunks) > 3 and [document for block in blocks for document in block.documents] == TEXTS
    assert sum(block.lenient for block in blocks) == len(LENIENT)


def test_nested_keys_accept_the_same_json(tmp_path: Path) -> None:
    objects = [b'{"a": {"b": "one"}}', b'{"a": {"b": "two", "c": NaN}}']
    for name, data in {"a.jsonl": b"\n".join(objects), "a.json": b"[" + b",".join(objects) + b"]"}.items():
        (tmp_path / name).write_bytes(data)
        blocks = list(PieceReader(full_piece(tmp_path / name), ReadOptions("a.b")))
        assert [document for block in blocks for document in block.documents] == ["one", "two"]
        assert sum(block.lenient for block in blocks) == 1


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["lines.jsonl", "array.json"])
def test_documents_of_lenient_json_are_used_and_counted(
    tmp_path: Path, small_tokenizer: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / name).write_bytes(FILES[name])
    counts = record_of(make(tmp_path / name, tmp_path / "out", small_tokenizer, "--skip-bad-lines") / "0")["counts"]
    assert (counts["documents"], counts["bad_documents"], counts["lenient_json"]) == (6, 4, 4)
    assert [kind for _, _, kind in rejects_of(tmp_path / "out" / "32-v1")] == list(BAD.values())
    assert "4 documents from JSON that is not strict (NaN or the like)" in caplog.text
