"""Tests of make_2048 with bad lines, wrong keys, and empty or broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datapreprocess_helpers import (
    EOT_ID,
    documents,
    expected_tokens,
    make,
    read_shards,
    record_of,
    tokens_of,
    tree,
    write_jsonl,
)

from open_lm.datapreprocess import engine
from open_lm.errors import ConfigError, DataError


@pytest.mark.usefixtures("local_ray")
def test_bad_lines_are_reported_together_or_skipped_and_counted(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    folder, texts = raw
    (folder / "bad1.jsonl").write_text('{"text": "fine"}\n{"text": broken\n{"body": "no text"}\n')
    (folder / "bad2.jsonl").write_text('\n{"text": 7}\n{"text": "fine"}\n')
    with pytest.raises(DataError) as caught:
        make(folder, tmp_path / "out", small_tokenizer)
    message = str(caught.value)
    for part in ("bad1.jsonl line 2: invalid JSON", "bad1.jsonl line 3: missing key", "bad2.jsonl line 2: wrong type"):
        assert part in message
    assert f"3 of {len(texts) + 5} documents" in message and "--max-bad-fraction" in message
    assert not list((tmp_path / "out").rglob("*.tar"))
    rejects = tmp_path / "out" / "32-v1" / "rejects.jsonl"
    entries = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(Path(entry["url"]).name, entry["line"], entry["content"]) for entry in entries] == [
        ("bad1.jsonl", 2, '{"text": broken'), ("bad1.jsonl", 3, '{"body": "no text"}'), ("bad2.jsonl", 2, '{"text": 7}')
    ]  # fmt: skip
    make(folder, tmp_path / "out", small_tokenizer, "--max-bad-fraction", "0.02")
    output = tmp_path / "out" / "32-v1" / "0"
    assert tokens_of(read_shards(output)) == expected_tokens([*texts, "fine", "fine"], small_tokenizer, EOT_ID)
    record = record_of(output)
    assert record["bad_documents"] == {"invalid JSON": 1, "missing key": 1, "wrong type": 1}
    assert [Path(line).name for line in record["bad_documents_first"]] == [
        "bad1.jsonl line 2", "bad1.jsonl line 3", "bad2.jsonl line 2"
    ]  # fmt: skip
    assert len(rejects.read_text().splitlines()) == 3
    make(folder, tmp_path / "all", small_tokenizer, "--skip-bad-lines")
    assert tree(tmp_path / "all") == tree(tmp_path / "out")


@pytest.mark.usefixtures("local_ray")
def test_a_wrong_key_is_an_error_before_all_input_is_read(
    tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        write_jsonl(tmp_path / "raw" / f"{number}.jsonl", documents(3000, seed=number))
    read: list[int] = []
    original = engine.Monitor.finished_unit
    monkeypatch.setattr(engine.Monitor, "finished_unit", lambda self, report: (read.append(1), original(self, report)))
    with pytest.raises(DataError, match=r'missing key: found no key "body"; the object has id, text'):
        make(tmp_path / "raw", tmp_path / "out", small_tokenizer, "--content-key", "body", "--num-workers", "1")
    assert len(read) == 1


@pytest.mark.usefixtures("local_ray")
def test_lines_of_a_split_file_are_counted_from_the_start_of_the_file(tmp_path: Path, small_tokenizer: str) -> None:
    lines = [json.dumps({"text": text}) for text in documents(12_000, seed=3)]
    lines[11_000] = "{"
    path = tmp_path / "large.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"large\.jsonl line 11001: invalid JSON"):
        make(path, tmp_path / "out", small_tokenizer, "--max-bad-fraction", "0")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_a_truncated_zst_loses_an_unknown_number_of_bytes_and_not_0(
    tmp_path: Path, small_tokenizer: str, suffix: str
) -> None:
    path = write_jsonl(tmp_path / f"a.jsonl.{suffix}", documents(6000))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"1 of 1 file broken, an unknown number of bytes missing") as caught:
        make(path, tmp_path / "out", small_tokenizer)
    assert "bytes lost" not in str(caught.value)


@pytest.mark.usefixtures("local_ray")
def test_errors_for_empty_and_broken_inputs(tmp_path: Path, small_tokenizer: str) -> None:
    for name in ("a.jsonl.zst", "b.jsonl.gz"):
        path = write_jsonl(tmp_path / "raw" / name, documents(300))
        path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "raw" / "c.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"(?s)a\.jsonl\.zst: trunc.*b\.jsonl\.gz: trunc.*c\.jsonl line 1: inval"):
        make(tmp_path / "raw", tmp_path / "out", small_tokenizer)
    make(tmp_path / "raw", tmp_path / "out", small_tokenizer, "--max-bad-fraction", "1")
    record = record_of(tmp_path / "out" / "32-v1" / "0")
    assert len(record["broken_files"]) == 2 and record["bad_documents"] == {"invalid JSON": 1}
    assert 0 < record["counts"]["documents"] < 600  # documents before the broken position are used
    tars = list(tmp_path.rglob("*.tar"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="found no documents in"):
        make(tmp_path / "empty.jsonl", tmp_path / "out2", small_tokenizer)
    with pytest.raises(DataError, match="no file matches"):
        make(tmp_path / "missing", tmp_path / "out3", small_tokenizer)
    with pytest.raises(ConfigError, match=r"--seqlen must be at least 1.*\n.*shard must hold|shard must hold"):
        make(path, tmp_path / "out4", small_tokenizer, "--shard-size", "0")
    assert list(tmp_path.rglob("*.tar")) == tars
