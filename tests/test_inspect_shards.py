"""The command that shows, samples and checks data sets of token shards, and makes their manifests anew."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from datapreprocess_helpers import small_tokenizer

from open_lm import storage
from open_lm.data.shard_format import ManifestEntry, ShardWriter, read_manifest, write_manifest
from open_lm.errors import ConfigError, DataError
from open_lm.utils.inspect_shards import BrokenDataSet, command, main
from open_lm.utils.shard_samples import choose
from open_lm.utils.shard_survey import progress_line, survey_shard

__all__ = ["small_tokenizer"]

EOT = 3
# seq_len 7. Pieces by end-of-text: 3 2 3 | 8 | 1 7 | 4 1, three pads.
SEQUENCES = [
    [10, 11, 3, 12, 3, 13, 14, 15],
    [16, 17, 18, 19, 10, 11, 12, 13],
    [3, 20, 21, 22, 23, 24, 25, 26],
    [27, 28, 29, 3, 99, -1, -1, -1],
]
HISTOGRAM = {"1": 2, "2": 3, "4": 2, "8": 1}


def make_folder(
    folder: Path | str, shards: dict[str, list[list[int]]], source: str | None = None, kind: str = "npy"
) -> list[ManifestEntry]:
    entries = []
    for name, sequences in shards.items():
        with ShardWriter(storage.join(folder, f"{name}.tar"), kind) as writer:
            for number, ids in enumerate(sequences):
                writer.write(f"{number:06d}", np.array(ids, dtype=np.int32))
        info = writer.info
        extra: dict[str, Any] = {
            "num_tokens": info.num_tokens,
            "num_bytes": info.num_bytes,
            "sha256": info.sha256,
        }
        if source:
            extra["sources"] = {source: info.num_tokens}
        entries.append(ManifestEntry(name, info.num_sequences, extra))
    write_manifest(storage.join(folder, "manifest.jsonl"), entries)
    return entries


def record(entries: list[ManifestEntry], **changes: Any) -> dict[str, Any]:
    tokens = sum(entry.extra["num_tokens"] for entry in entries)
    settings = {
        "tokenizer": None, "tokenizer_fingerprint": "ab" * 32, "eot_id": EOT, "vocab_size": 100, "seq_len": 7,
        "format": "npy", "content_key": "text", "seed": 5, "shuffle": True,
    }  # fmt: skip
    return {
        "tool": {"name": "open_lm", "version": "1.2"},
        "settings": settings | changes.pop("settings", {}),
        "inputs": [{"url": "a.jsonl", "num_bytes": 1_500_000}, {"url": "b.jsonl", "num_bytes": 500_000}],
        "counts": {
            "documents": 7, "characters": 1234, "tokens": tokens, "shards": len(entries),
            "sequences": sum(entry.num_sequences for entry in entries),
            "bytes": sum(entry.extra["num_bytes"] for entry in entries), "bad_documents": 2, "pads": 3,
        },
        "sources": {"wiki": {"tokens": tokens}},
        "mixture": None,
        "bad_documents": {"not_json": 2},
        "bad_documents_first": [{"url": "a.jsonl", "line": 4, "kind": "not_json", "detail": "cut"}],
        "broken_files": [],
        "tail": {"fate": "padded", "tokens": 5, "pads": 3, "shard": "s1", "key": "000001"},
    } | changes  # fmt: skip


def make_set(folder: Path | str, **changes: Any) -> None:
    entries = make_folder(folder, {"s0": SEQUENCES[:2], "s1": SEQUENCES[2:]}, "wiki")
    storage.write_bytes(storage.join(folder, "dataset.json"), orjson.dumps(record(entries, **changes)))


def facts(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    main([*args, "--json", "--num-workers", "1"])
    return json.loads(capsys.readouterr().out)


def problems(*args: str) -> str:
    with pytest.raises(BrokenDataSet) as caught:
        main([*args, "--num-workers", "1"])
    return str(caught.value)


def edit_manifest(folder: Path, **changes: Any) -> None:
    first, *others = read_manifest(str(folder / "manifest.jsonl"))
    count = changes.pop("num_sequences", first.num_sequences)
    write_manifest(folder / "manifest.jsonl", [ManifestEntry(first.shard, count, first.extra | changes), *others])


def test_the_overview_tells_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    main([str(tmp_path), "--num-workers", "1"])
    text = capsys.readouterr().out
    squeezed = " ".join(text.split())
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert f"2 4 29 {num_bytes / 1000:.1f} kB yes" in squeezed
    for part in (
        "made by open_lm 1.2", "fingerprint abababababab…, 100 ids, end of text 3", "2 files, 2.0 MB",
        "seq_len 7, members npy, seed 5, shuffled: yes", "7 documents, 1,234 characters, 29 tokens, 2 shards",
        "padded, 5 tokens and 3 pads in member 000001 of s1", "2 not_json", "- a.jsonl line 4: not_json cut",
        "wiki 29 100.00% ##############################", "8 in 4 members", "pads 3",
        "22 distinct of 100 in the vocabulary, largest 99", "8: 4 end in an end-of-text id, 4 at a sequence's end",
        "3.6 in the mean piece, 8 in the longest", "cuts is counted as pieces",
        "2 to 3 3 37.50% ##############################",
    ):  # fmt: skip
        assert part in squeezed, part
    assert max(map(len, text.splitlines())) <= 100


def test_json_holds_the_same_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    found = facts(capsys, str(tmp_path), "--verify")
    assert found["total"] == {
        "shards": 2,
        "sequences": 4,
        "tokens": 29,
        "bytes": found["data_sets"][0]["counts"]["bytes"],
    }
    assert found["documents"]["histogram"] == HISTOGRAM
    assert (found["documents"]["pieces"], found["documents"]["ended"]) == (8, 4)
    assert found["sources"] == {"from": "manifest.jsonl", "shares": {"wiki": {"tokens": 29, "share": 1.0}}}
    assert found["verified"]["sequences"] == 4 and found["verified"]["unchecked"] == []
    assert found["problems"] == [] and found["data_sets"][0]["whole"]


def test_folders_of_one_data_set_and_their_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "7-v1"
    entries = make_folder(root / "0", {"s0": SEQUENCES[:2]}) + make_folder(root / "1", {"s0": SEQUENCES[2:]})
    data = orjson.dumps(record(entries, settings={"folders": ["0", "1", "2"]}))
    for name in ("0", "1", "2"):
        storage.write_bytes(root / name / "dataset.json", data)
    found = facts(capsys, str(tmp_path), "--verify")
    rows = [(Path(row["folder"]).name, row["shards"], row["sequences"], row["tokens"]) for row in found["folders"]]
    assert rows == [("0", 1, 2, 16), ("1", 1, 2, 13)]
    assert found["total"]["tokens"] == 29
    assert [(item["root"], item["whole"]) for item in found["data_sets"]] == [(str(root), True)]
    assert found["sources"]["from"] == "dataset.json"
    part = facts(capsys, str(root / "0"), "--verify")
    assert not part["data_sets"][0]["whole"] and any("only a part" in note for note in part["verified"]["unchecked"])
    (root / "1" / "s0.tar").unlink()
    (root / "1" / "manifest.jsonl").unlink()
    assert "the shards hold 16 tokens, dataset.json says 29" in problems(str(tmp_path), "--verify")


def test_a_record_above_the_folders_that_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = make_folder(tmp_path / "a", {"s0": SEQUENCES[:2]}) + make_folder(tmp_path / "b", {"s0": SEQUENCES[2:]})
    make_folder(tmp_path / "other", {"s0": SEQUENCES})
    (tmp_path / "dataset.json").write_bytes(orjson.dumps(record(entries, settings={"folders": ["a", "b"]})))
    found = facts(capsys, str(tmp_path), "--verify")
    (data_set,) = found["data_sets"]
    assert [Path(folder).name for folder in data_set["folders"]] == ["a", "b"] and data_set["whole"]
    assert any("other: no dataset.json" in note for note in found["verified"]["unchecked"])


def test_outputs_of_several_sources_are_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("web", "wiki"):
        make_folder(tmp_path / name, {"s0": SEQUENCES[: 1 if name == "web" else 3]}, name)
    main([str(tmp_path)])
    squeezed = " ".join(capsys.readouterr().out.split())
    assert "web 1 1 8" in squeezed and "wiki 1 3 24" in squeezed and "sum 2 4 32" in squeezed
    assert "wiki 24 75.00%" in squeezed and "web 8 25.00%" in squeezed
    assert "the end-of-text id is not known" in squeezed


def test_shards_without_a_manifest_are_looked_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {f"s{number}": SEQUENCES for number in range(6)}, kind="json.gz")
    (tmp_path / "manifest.jsonl").unlink()
    found = facts(capsys, str(tmp_path), "--sample-shards", "0")
    assert (found["total"]["sequences"], found["total"]["tokens"]) == (24, 174)
    assert found["folders"][0]["manifest"] == "no" and found["members"]["kinds"] == {"json.gz": 24}


def test_a_pattern_shows_the_shards_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    found = facts(capsys, f"{tmp_path}/s{{1..1}}.tar", "--verify")
    assert found["total"]["sequences"] == 2 and found["folders"][0]["part"]
    assert facts(capsys, str(tmp_path / "manifest.jsonl"))["total"]["sequences"] == 4
    with pytest.raises(ConfigError, match="whole folders"):
        main([f"{tmp_path}/s1.tar", "--make-manifest"])


def test_the_sample_of_shards_is_as_large_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {f"s{number}": SEQUENCES for number in range(6)})
    assert facts(capsys, str(tmp_path))["members"]["shards_read"] == 4
    assert facts(capsys, str(tmp_path), "--sample-shards", "all")["members"]["shards_read"] == 6
    assert facts(capsys, str(tmp_path), "--sample-shards", "0")["members"] is None


def test_samples_as_text(tmp_path: Path, small_tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    from open_lm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(small_tokenizer)
    ids = [*tokenizer.encode("the quick\x1b[31m fox"), EOT, *tokenizer.encode("jumps")]
    entries = make_folder(tmp_path, {"s0": [[*ids, -1, -1, -1]]})
    settings = {"tokenizer": small_tokenizer, "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": 400,
                "seq_len": len(ids) + 2}  # fmt: skip
    storage.write_bytes(tmp_path / "dataset.json", orjson.dumps(record(entries, settings=settings)))
    main([str(tmp_path), "--samples", "3"])
    text = capsys.readouterr().out
    shown = "  | the quick\\x1b[31m fox\n  [[end of text]]\n  | jumps\n  [[3 pads]]"
    assert shown in text and f"member 000000, {len(ids)} tokens, 3 pads" in text
    assert "Notes" not in text
    settings["tokenizer_fingerprint"] = "cd" * 32
    storage.write_bytes(tmp_path / "dataset.json", orjson.dumps(record(entries, settings=settings)))
    assert "cdcdcdcdcdcd" in facts(capsys, str(tmp_path), "--samples", "1")["notes"][0]
    assert facts(capsys, str(tmp_path), "--samples", "1", "--tokenizer", small_tokenizer)["samples"][0]["pads"] == 3


def test_samples_without_a_tokenizer_are_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path, settings={"tokenizer": "./gone/tokenizer.json"})
    found = facts(capsys, str(tmp_path), "--samples", "2", "--seed", "1")
    assert "no such file" in found["notes"][0]
    for sample in found["samples"]:
        ids = SEQUENCES[sample["position"] + (2 if sample["shard"].endswith("s1.tar") else 0)]
        joined = [i for piece in sample["pieces"] for i in [*piece["ids"], *([EOT] if piece["ended"] else [])]]
        assert joined + [-1] * sample["pads"] == ids
    assert found["samples"] == facts(capsys, str(tmp_path), "--samples", "2", "--seed", "1")["samples"]
    with pytest.raises(ConfigError, match="no such file"):
        main([str(tmp_path), "--tokenizer", "./gone.json"])


def test_samples_are_drawn_from_all_sequences_by_the_seed() -> None:
    counts = {"a": 3, "b": 0, "c": 5}
    assert choose(counts, 8, 0) == choose(counts, 20, 9) == {"a": [0, 1, 2], "c": [0, 1, 2, 3, 4]}
    drawn = {tuple((url, place) for url, places in choose(counts, 1, seed).items() for place in places)
             for seed in range(60)}  # fmt: skip
    assert len(drawn) == 8


# --- what is wrong -----------------------------------------------------------------------------------------------


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


# --- manifests anew ----------------------------------------------------------------------------------------------


def test_a_manifest_made_anew_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    expected = read_manifest(str(tmp_path / "manifest.jsonl"))
    edit_manifest(tmp_path, num_sequences=9, sources={"kept": 16}, licence="cc")
    old = read_manifest(str(tmp_path / "manifest.jsonl"))
    write_manifest(tmp_path / "manifest.jsonl", [*old, ManifestEntry("gone", 1)])
    make_folder(tmp_path / "x", {"s2": SEQUENCES[:1]})
    (tmp_path / "x" / "s2.tar").rename(tmp_path / "s2.tar")
    (tmp_path / "x" / "manifest.jsonl").unlink()
    with pytest.raises(BrokenDataSet, match=r"37 tokens, dataset\.json says 29"):  # the new shard is not in the record
        main([str(tmp_path), "--make-manifest"])
    text = capsys.readouterr().out
    assert "gone: no longer there" in text and "s2: new" in text and "s0: num_sequences 9 -> 2" in text
    first, second, third = read_manifest(str(tmp_path / "manifest.jsonl"))
    assert first.num_sequences == 2 and first.extra["sources"] == {"kept": 16} and first.extra["licence"] == "cc"
    assert second == expected[1]
    assert third.extra["num_tokens"] == 8 and third.extra["sources"] == {"wiki": 8}


def test_a_manifest_made_anew_the_first_and_the_second_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    path = tmp_path / "manifest.jsonl"
    before = path.read_bytes()
    assert facts(capsys, str(tmp_path), "--make-manifest")["manifests"][0]["changes"] == ["nothing changed"]
    assert path.read_bytes() == before
    path.unlink()
    found = facts(capsys, str(tmp_path), "--make-manifest")["manifests"][0]
    assert found == {"manifest": str(path), "shards": 2, "sequences": 4, "changes": ["there was none before"]}
    assert path.read_bytes() == before
    path.write_text("junk")
    assert "not JSON" in facts(capsys, str(tmp_path), "--make-manifest")["manifests"][0]["changes"][0]
    write_manifest(path, [ManifestEntry("s0", 2), ManifestEntry("s1", 2)])
    assert facts(capsys, str(tmp_path), "--make-manifest")["manifests"][0]["changes"] == [
        f"{name} added to 2 shards" for name in ("num_bytes", "num_tokens", "sha256", "sources")
    ]
    assert path.read_bytes() == before


def test_no_manifest_is_made_of_broken_shards(tmp_path: Path) -> None:
    make_set(tmp_path / "a")
    make_set(tmp_path / "b")
    for name in ("a", "b"):
        (tmp_path / name / "s1.tar").write_bytes(b"")
    (tmp_path / "a" / "manifest.jsonl").unlink()
    told = problems(str(tmp_path), "--make-manifest")
    assert "No manifest was written" in told and "a/s1.tar" in told and "b/s1.tar" in told
    assert not (tmp_path / "a" / "manifest.jsonl").exists()


def test_a_data_set_in_s3(s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"s3://{s3_bucket}/set"
    make_set(f"{root}/x")
    found = facts(capsys, root, "--verify", "--samples", "1", "--tmp-dir", str(tmp_path / "tmp"))
    assert found["total"]["tokens"] == 29 and found["documents"]["histogram"] == HISTOGRAM
    assert found["data_sets"][0]["root"] == f"{root}/x" and found["samples"][0]["tokens"] in (5, 8)
    assert facts(capsys, f"{root}/x/*1.tar")["total"]["sequences"] == 2
    storage.remove(f"{root}/x/manifest.jsonl")
    assert facts(capsys, root, "--make-manifest")["manifests"][0]["manifest"] == f"{root}/x/manifest.jsonl"
    storage.write_bytes(f"{root}/x/s0.tar", storage.read_bytes(f"{root}/x/s0.tar")[:1000])
    assert f"{root}/x/s0.tar: cut short" in problems(root, "--verify", "--tmp-dir", str(tmp_path / "tmp"))
    assert list((tmp_path / "tmp").iterdir()) == []


# --- parts -------------------------------------------------------------------------------------------------------


def test_a_survey_of_old_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, text in {"0.txt": '[5, "<|endoftext|>", 7]', "1.txt": "[-5, 8, 99999999999]"}.items():
            (tmp_path / "member").write_text(text)
            tar.add(tmp_path / "member", name)
    survey = survey_shard(str(tmp_path / "a.tar"), eot_id=0)
    assert (survey.min_id, survey.max_id, survey.num_tokens, survey.ended_pieces) == (-5, 99999999999, 6, 1)
    assert len(survey.used_ids) == 5 and survey.longest_piece == 3


def test_the_line_of_progress() -> None:
    assert progress_line(1, 4, 50_000_000, 200_000_000, 2.0) == "1 of 4 shards (25%), 50 MB, 25.0 MB/s, 0:00:06 left"
    assert progress_line(1, 2, 50_000_000, 0, 3700.0).startswith("1 of 2 shards (50%)")
    assert progress_line(1, 2, 50_000_000, 0, 3700.0).endswith("1:01:40 left")


def test_help_is_light_and_nothing_imports_torch(tmp_path: Path) -> None:
    make_set(tmp_path)
    code = "import sys; from open_lm.utils.inspect_shards import main, make_parser; make_parser().format_help(); "
    code += "assert 'numpy' not in sys.modules; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command_line = [sys.executable, "-c", code, str(tmp_path), "--samples", "1", "--num-workers", "1"]
    assert "Sample: sequence" in subprocess.run(command_line, capture_output=True, text=True, check=True).stdout
