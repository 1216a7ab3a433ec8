"""What the checks of data sets find wrong, and the exit codes that tell it."""

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


def test_all_that_is_wrong_is_told_together(tmp_path: Path) -> None:
    """Shards that are cut, gone, unlisted, changed; all in one message."""
    make_folder(tmp_path, dict.fromkeys(("cut", "gone", "good", "junk", "changed"), SEQUENCES))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:900])
    (tmp_path / "gone.tar").unlink()
    (tmp_path / "junk.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    data = bytearray((tmp_path / "changed.tar").read_bytes())
    data[data.index(b"000002.npy") + 512 + 130] ^= 1
    (tmp_path / "changed.tar").write_bytes(data)
    told = problems(str(tmp_path), "--verify")
    assert "gone.tar is missing" in told
    assert "cut.tar: cut short" in told and "cut.tar: num_bytes is 900" in told
    assert "junk.tar: no valid tar header" in told
    assert "empty.tar: it is empty" in told and "empty.tar: manifest.jsonl does not name" in told
    assert f"changed.tar: sha256 is {hashlib.sha256(data).hexdigest()}, manifest.jsonl says" in told
    assert "good.tar" not in told
    # Without --verify the list of files already tells some of it.
    told = problems(str(tmp_path), "--sample-shards", "0")
    assert "gone.tar is missing" in told and "cut.tar: num_bytes" in told and "changed.tar" not in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sequences": 3}, "s0.tar: num_sequences is 2, manifest.jsonl says 3"),
        ({"num_tokens": 15}, "s0.tar: num_tokens is 16, manifest.jsonl says 15"),
        ({"num_bytes": 1}, "manifest.jsonl says 1"),
        ({"sources": {"a": 1}}, "the sources in manifest.jsonl sum to 1 tokens"),
        ({"sources": ["a"]}, '"sources" in manifest.jsonl must be'),
    ],
)
def test_a_line_that_disagrees_with_its_shard(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make_set(tmp_path)
    edit_manifest(tmp_path, **change)
    assert message in problems(str(tmp_path), "--verify")


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"settings": {"vocab_size": 99}}, ["s1.tar: the id 99 is beyond the vocabulary of 99 ids"]),
        ({"settings": {"seq_len": 8}}, ["s0.tar: 2 members hold 8 ids, expected 9"]),
        ({"settings": {"format": "txt"}}, ["s0.tar: 2 members are of the kind npy, dataset.json says txt"]),
        ({"sources": {"a": {"tokens": 20}, "b": {"tokens": 8}}}, ["sum to 28 tokens, its counts say 29"]),
        (
            {"counts": {"tokens": 30, "sequences": 5, "shards": 3, "bytes": 7, "pads": 0}, "sources": {}},
            ["29 tokens, dataset.json says 30", "4 sequences, dataset.json says 5", "2 shards, dataset.json says 3",
             "dataset.json says 7", "3 pads, dataset.json says 0"],
        ),
        ({"tail": {"fate": "dropped", "tokens": 4}}, ["33 tokens (4 dropped ones included), dataset.json says 29"]),
    ],
)  # fmt: skip
def test_shards_that_do_not_fit_the_record(tmp_path: Path, changes: dict[str, Any], messages: list[str]) -> None:
    make_set(tmp_path, **changes)
    told = problems(str(tmp_path), "--verify")
    for message in messages:
        assert message in told


def test_broken_members_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(8):
            (tmp_path / "member").write_bytes(b"[1, 2]" if number == 0 else b"[1, oops")
            tar.add(tmp_path / "member", f"{number}.json")
    told = problems(str(tmp_path), "--verify")
    assert "a.tar: member 1.json: not a valid json member" in told and "and 2 more members cannot be read" in told
    assert "member 0.json" not in told


def test_broken_manifests_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"shard": "s0"}\n')
    (tmp_path / "dataset.json").write_text("{")
    told = problems(str(tmp_path))
    assert '"num_sequences" of shard' in told and "dataset.json: not JSON" in told
    assert "broken" in capsys.readouterr().out
    (tmp_path / "dataset.json").write_text("[]")
    assert "expected an object, found list" in problems(str(tmp_path))


def test_a_sample_beyond_the_shard_is_a_problem(tmp_path: Path) -> None:
    make_set(tmp_path)
    edit_manifest(tmp_path, num_sequences=100)
    assert "it holds 2 sequences, its manifest says more" in problems(
        str(tmp_path), "--samples", "90", "--sample-shards", "0"
    )


def test_what_cannot_be_checked_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "a", {"s0": SEQUENCES})
    write_manifest(tmp_path / "a" / "manifest.jsonl", [ManifestEntry("s0", 4)])
    make_folder(tmp_path / "b", {"s0": SEQUENCES})
    (tmp_path / "b" / "manifest.jsonl").unlink()
    found = " ".join(facts(capsys, str(tmp_path), "--verify")["verified"]["unchecked"])
    assert "a: no dataset.json" in found and "b: no manifest.jsonl" in found
    assert "sha256 of 1 shards" in found and "vocabulary is not known" in found


def test_nothing_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        main([str(tmp_path), str(tmp_path / "*.tar"), str(tmp_path / "manifest.jsonl")])
    assert str(caught.value).count(str(tmp_path)) == 3
    with pytest.raises(ConfigError) as config_error:
        main([str(tmp_path), "--samples", "-1", "--num-workers", "0", "--sample-shards", "some"])
    for flag in ("--samples", "--num-workers", "--sample-shards"):
        assert flag in str(config_error.value)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    assert command([str(tmp_path), "--verify"]) == 0  # two shards: by two processes where there are two cores
    assert "all is well" in capsys.readouterr().out
    assert command([str(tmp_path / "none")]) == 2
    (tmp_path / "s1.tar").unlink()
    assert command([str(tmp_path), "--verify", "--json"]) == 1
    output = capsys.readouterr()
    assert "s1.tar is missing" in output.err and "s1.tar is missing" in json.loads(output.out)["problems"][0]
