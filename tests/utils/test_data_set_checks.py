"""Test the checks of data sets and the exit codes of inspect_shards."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from data_set_helpers import SEQUENCES, edit_manifest, facts, make_folder, make_set, problems

from open_lm.data.shard_format import ManifestEntry, write_manifest
from open_lm.errors import ConfigError, DataError
from open_lm.utils.inspect_shards import command, main


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    """Truncated, missing, unlisted and modified shards appear in one message."""
    make_folder(tmp_path, dict.fromkeys(("cut", "gone", "good", "junk", "changed"), SEQUENCES))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:900])
    (tmp_path / "gone.tar").unlink()
    (tmp_path / "junk.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    data = bytearray((tmp_path / "changed.tar").read_bytes())
    data[data.index(b"000002.npy") + 512 + 130] ^= 1
    (tmp_path / "changed.tar").write_bytes(data)
    message = problems(str(tmp_path), "--verify")
    assert "gone.tar is missing" in message
    assert "cut.tar: cut short" in message and "cut.tar: num_bytes is 900" in message
    assert "junk.tar: no valid tar header" in message
    assert "empty.tar: the file is empty" in message and "empty.tar: manifest.jsonl does not list" in message
    assert f"changed.tar: sha256 is {hashlib.sha256(data).hexdigest()}, expected " in message
    assert "good.tar" not in message
    # Without --verify, only problems of the file list are found.
    message = problems(str(tmp_path), "--sample-shards", "0")
    assert "gone.tar is missing" in message and "cut.tar: num_bytes" in message and "changed.tar" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sequences": 3}, "s0.tar: num_sequences is 2, expected 3 by manifest.jsonl"),
        ({"num_tokens": 15}, "s0.tar: num_tokens is 16, expected 15 by manifest.jsonl"),
        ({"num_bytes": 1}, "expected 1 by manifest.jsonl"),
        ({"sources": {"a": 1}}, "the sources in manifest.jsonl sum to 1 tokens"),
        ({"sources": ["a"]}, '"sources" in manifest.jsonl must be'),
    ],
)
def test_manifest_line_that_differs_from_its_shard(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make_set(tmp_path)
    edit_manifest(tmp_path, **change)
    assert message in problems(str(tmp_path), "--verify")


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"settings": {"vocab_size": 99}}, ["s1.tar: the token id 99 is outside the vocabulary of 99 ids"]),
        ({"settings": {"seq_len": 8}}, ["s0.tar: 2 members have 8 token ids, expected 9"]),
        ({"settings": {"format": "txt"}}, ["s0.tar: 2 members have the format npy, expected txt by dataset.json"]),
        ({"sources": {"a": {"tokens": 20}, "b": {"tokens": 8}}}, ["sum to 28 tokens, but its counts have 29"]),
        (
            {"counts": {"tokens": 30, "sequences": 5, "shards": 3, "bytes": 7, "pads": 0}, "sources": {}},
            ["29 tokens, expected 30 by dataset.json", "4 sequences, expected 5 by dataset.json",
             "2 shards, expected 3 by dataset.json", "expected 7 by dataset.json",
             "3 pads, expected 0 by dataset.json"],
        ),
        (
            {"tail": {"fate": "dropped", "tokens": 4}},
            ["33 tokens (including 4 dropped ones), expected 29 by dataset.json"],
        ),
    ],
)  # fmt: skip
def test_shards_that_differ_from_the_record(tmp_path: Path, changes: dict[str, Any], messages: list[str]) -> None:
    make_set(tmp_path, **changes)
    reported = problems(str(tmp_path), "--verify")
    for message in messages:
        assert message in reported


def test_broken_members_are_listed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(8):
            (tmp_path / "member").write_bytes(b"[1, 2]" if number == 0 else b"[1, oops")
            tar.add(tmp_path / "member", f"{number}.json")
    message = problems(str(tmp_path), "--verify")
    assert "a.tar: member 1.json: not a valid json member" in message and "and 2 more members cannot be read" in message
    assert "member 0.json" not in message


def test_broken_manifests_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"shard": "s0"}\n')
    (tmp_path / "dataset.json").write_text("{")
    message = problems(str(tmp_path))
    assert '"num_sequences" of shard' in message and "dataset.json: not JSON" in message
    assert "broken" in capsys.readouterr().out
    (tmp_path / "dataset.json").write_text("[]")
    assert "expected an object, found list" in problems(str(tmp_path))


def test_sample_position_beyond_the_shard_is_a_problem(tmp_path: Path) -> None:
    make_set(tmp_path)
    edit_manifest(tmp_path, num_sequences=100)
    assert "contains 2 sequences, fewer than its manifest says" in problems(
        str(tmp_path), "--samples", "90", "--sample-shards", "0"
    )


def test_unchecked_values_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "a", {"s0": SEQUENCES})
    write_manifest(tmp_path / "a" / "manifest.jsonl", [ManifestEntry("s0", 4)])
    make_folder(tmp_path / "b", {"s0": SEQUENCES})
    (tmp_path / "b" / "manifest.jsonl").unlink()
    found = " ".join(facts(capsys, str(tmp_path), "--verify")["verified"]["unchecked"])
    assert "a: no dataset.json" in found and "b: no manifest.jsonl" in found
    assert "sha256 of 1 shards" in found and "vocabulary size is unknown" in found


def test_invalid_arguments(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        main([str(tmp_path), str(tmp_path / "*.tar"), str(tmp_path / "manifest.jsonl")])
    assert str(caught.value).count(str(tmp_path)) == 3
    with pytest.raises(ConfigError) as config_error:
        main([str(tmp_path), "--samples", "-1", "--num-workers", "0", "--sample-shards", "some"])
    for flag in ("--samples", "--num-workers", "--sample-shards"):
        assert flag in str(config_error.value)


@pytest.mark.processes
def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    assert command([str(tmp_path), "--verify"]) == 0  # two shards, read by two processes on two cores
    assert "no problems found" in capsys.readouterr().out
    assert command([str(tmp_path / "none")]) == 2
    (tmp_path / "s1.tar").unlink()
    assert command([str(tmp_path), "--verify", "--json"]) == 1
    output = capsys.readouterr()
    assert "s1.tar is missing" in output.err and "s1.tar is missing" in json.loads(output.out)["problems"][0]
