"""Test the command that describes and samples data sets of token shards and rewrites their manifests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import orjson
import pytest
from data_set_helpers import EOT, HISTOGRAM, SEQUENCES, edit_manifest, facts, make_folder, make_set, problems, record

from open_lm import storage
from open_lm.data.shard_format import ManifestEntry, read_manifest, write_manifest
from open_lm.errors import ConfigError
from open_lm.utils.inspect_shards import BrokenDataSet, main
from open_lm.utils.shard_samples import choose_positions
from open_lm.utils.shard_survey import progress_line, survey_shard


def test_text_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    main([str(tmp_path), "--num-workers", "1"])
    text = capsys.readouterr().out
    squeezed = " ".join(text.split())
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert f"2 4 29 {num_bytes / 1000:.1f} kB yes" in squeezed
    for part in (
        "created by open_lm 1.2", "fingerprint abababababab…, 100 ids, end of text 3", "2 files, 2.0 MB",
        "seq_len 7, members npy, seed 5, shuffled: yes", "7 documents, 1,234 characters, 29 tokens, 2 shards",
        "padded, 5 tokens and 3 padding ids in member 000001 of s1", "2 not_json", "- a.jsonl line 4: not_json cut",
        "wiki 29 100.00% ##############################", "8 in 4 members", "padding ids 3",
        "22 distinct of 100 in the vocabulary, largest 99",
        "8: 4 end with an end-of-text id, 4 at the end of a sequence",
        "tokens per piece mean 3.6, maximum 8", "is counted as one piece per sequence",
        "2 to 3 3 37.50% ##############################",
    ):  # fmt: skip
        assert part in squeezed, part
    assert max(map(len, text.splitlines())) <= 100


def test_json_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_several_folders_of_one_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    partial = facts(capsys, str(root / "0"), "--verify")
    assert not partial["data_sets"][0]["whole"] and any(
        "only some of its shards" in note for note in partial["verified"]["unchecked"]
    )
    shutil.copytree(root / "0", tmp_path / "elsewhere" / "copy")
    assert not facts(capsys, str(tmp_path / "elsewhere"))["data_sets"][0]["whole"]
    monkeypatch.chdir(root)
    assert not facts(capsys, "0")["data_sets"][0]["whole"]
    assert facts(capsys, "0", "1", "--verify")["data_sets"][0]["whole"]
    (root / "1" / "s0.tar").unlink()
    (root / "1" / "manifest.jsonl").unlink()
    assert "the shards contain 16 tokens, expected 29 by dataset.json" in problems(str(root), "--verify")


def test_dataset_json_in_the_parent_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = make_folder(tmp_path / "a", {"s0": SEQUENCES[:2]}) + make_folder(tmp_path / "b", {"s0": SEQUENCES[2:]})
    make_folder(tmp_path / "other", {"s0": SEQUENCES})
    (tmp_path / "dataset.json").write_bytes(orjson.dumps(record(entries, settings={"folders": ["a", "b"]})))
    found = facts(capsys, str(tmp_path), "--verify")
    (data_set,) = found["data_sets"]
    assert [Path(folder).name for folder in data_set["folders"]] == ["a", "b"] and data_set["whole"]
    assert any("other: no dataset.json" in note for note in found["verified"]["unchecked"])


@pytest.mark.processes
def test_folders_of_several_sources_are_separate_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("web", "wiki"):
        make_folder(tmp_path / name, {"s0": SEQUENCES[: 1 if name == "web" else 3]}, name)
    main([str(tmp_path)])
    squeezed = " ".join(capsys.readouterr().out.split())
    assert "web 1 1 8" in squeezed and "wiki 1 3 24" in squeezed and "total 2 4 32" in squeezed
    assert "wiki 24 75.00%" in squeezed and "web 8 25.00%" in squeezed
    assert "the end-of-text id is unknown" in squeezed


def test_shards_without_a_manifest_are_scanned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {f"s{number}": SEQUENCES for number in range(6)}, kind="json.gz")
    (tmp_path / "manifest.jsonl").unlink()
    found = facts(capsys, str(tmp_path), "--sample-shards", "0")
    assert (found["total"]["sequences"], found["total"]["tokens"]) == (24, 174)
    assert found["folders"][0]["manifest"] == "no" and found["members"]["kinds"] == {"json.gz": 24}


def test_pattern_selects_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    found = facts(capsys, f"{tmp_path}/s{{1..1}}.tar", "--verify")
    assert found["total"]["sequences"] == 2 and found["folders"][0]["part"]
    assert facts(capsys, str(tmp_path / "manifest.jsonl"))["total"]["sequences"] == 4
    with pytest.raises(ConfigError, match="complete folders"):
        main([f"{tmp_path}/s1.tar", "--make-manifest"])


def test_sample_shards_limits_the_scanned_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    shown = "  | the quick\\x1b[31m fox\n  [[end of text]]\n  | jumps\n  [[3 padding ids]]"
    assert shown in text and f"member 000000, {len(ids)} tokens, 3 padding ids" in text
    assert "Notes" not in text
    settings["tokenizer_fingerprint"] = "cd" * 32
    storage.write_bytes(tmp_path / "dataset.json", orjson.dumps(record(entries, settings=settings)))
    assert "cdcdcdcdcdcd" in facts(capsys, str(tmp_path), "--samples", "1")["notes"][0]
    assert facts(capsys, str(tmp_path), "--samples", "1", "--tokenizer", small_tokenizer)["samples"][0]["pads"] == 3


def test_samples_without_a_tokenizer_are_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_samples_are_drawn_from_all_sequences_with_the_seed() -> None:
    counts = {"a": 3, "b": 0, "c": 5}
    assert choose_positions(counts, 8, 0) == choose_positions(counts, 20, 9) == {"a": [0, 1, 2], "c": [0, 1, 2, 3, 4]}
    drawn = {
        (url, position)
        for seed in range(60)
        for url, positions in choose_positions(counts, 1, seed).items()
        for position in positions
    }
    assert len(drawn) == 8


# --- --make-manifest ---------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_make_manifest_reports_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    expected = read_manifest(str(tmp_path / "manifest.jsonl"))
    edit_manifest(tmp_path, num_sequences=9, sources={"kept": 16}, licence="cc")
    old = read_manifest(str(tmp_path / "manifest.jsonl"))
    write_manifest(tmp_path / "manifest.jsonl", [*old, ManifestEntry("gone", 1)])
    make_folder(tmp_path / "x", {"s2": SEQUENCES[:1]})
    (tmp_path / "x" / "s2.tar").rename(tmp_path / "s2.tar")
    (tmp_path / "x" / "manifest.jsonl").unlink()
    with pytest.raises(
        BrokenDataSet, match=r"37 tokens, expected 29 by dataset\.json"
    ):  # dataset.json does not include the new shard
        main([str(tmp_path), "--make-manifest"])
    text = capsys.readouterr().out
    assert "gone: removed" in text and "s2: added" in text and "s0: num_sequences 9 -> 2" in text
    first, second, third = read_manifest(str(tmp_path / "manifest.jsonl"))
    assert first.num_sequences == 2 and first.extra["sources"] == {"kept": 16} and first.extra["licence"] == "cc"
    assert second == expected[1]
    assert third.extra["num_tokens"] == 8 and third.extra["sources"] == {"wiki": 8}


def test_make_manifest_is_reproducible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path)
    path = tmp_path / "manifest.jsonl"
    before = path.read_bytes()
    assert facts(capsys, str(tmp_path), "--make-manifest")["manifests"][0]["changes"] == ["no changes"]
    assert path.read_bytes() == before
    path.unlink()
    found = facts(capsys, str(tmp_path), "--make-manifest")["manifests"][0]
    assert found == {"manifest": str(path), "shards": 2, "sequences": 4, "changes": ["there was no manifest before"]}
    assert path.read_bytes() == before
    path.write_text("junk")
    assert "not JSON" in facts(capsys, str(tmp_path), "--make-manifest")["manifests"][0]["changes"][0]
    write_manifest(path, [ManifestEntry("s0", 2), ManifestEntry("s1", 2)])
    names = ("block_bytes", "block_sums", "member_bytes", "num_bytes", "num_tokens", "sha256", "sources")
    assert facts(capsys, str(tmp_path), "--make-manifest")["manifests"][0]["changes"] == [
        f"{name} added to 2 shards" for name in names
    ]
    assert path.read_bytes() == before


def test_make_manifest_writes_nothing_for_broken_shards(tmp_path: Path) -> None:
    make_set(tmp_path / "a")
    make_set(tmp_path / "b")
    for name in ("a", "b"):
        (tmp_path / name / "s1.tar").write_bytes(b"")
    (tmp_path / "a" / "manifest.jsonl").unlink()
    message = problems(str(tmp_path), "--make-manifest")
    assert "No manifest was written" in message and "a/s1.tar" in message and "b/s1.tar" in message
    assert not (tmp_path / "a" / "manifest.jsonl").exists()


def test_data_set_in_s3(s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


# --- survey ------------------------------------------------------------------------------------------------------


def test_survey_of_old_member_formats(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, text in {"0.txt": '[5, "<|endoftext|>", 7]', "1.txt": "[-5, 8, 99999999999]"}.items():
            (tmp_path / "member").write_text(text)
            tar.add(tmp_path / "member", name)
    survey = survey_shard(str(tmp_path / "a.tar"), eot_id=0)
    assert (survey.min_id, survey.max_id, survey.num_tokens, survey.ended_pieces) == (-5, 99999999999, 6, 1)
    assert len(survey.used_ids) == 5 and survey.longest_piece == 3


def test_progress_line() -> None:
    assert progress_line(1, 4, 50_000_000, 200_000_000, 2.0) == "1 of 4 shards (25%), 50 MB, 25.0 MB/s, 0:00:06 left"
    assert progress_line(1, 2, 50_000_000, 0, 3700.0).startswith("1 of 2 shards (50%)")
    assert progress_line(1, 2, 50_000_000, 0, 3700.0).endswith("1:01:40 left")


@pytest.mark.processes
def test_help_imports_no_numpy_and_the_command_no_torch(tmp_path: Path) -> None:
    make_set(tmp_path)
    code = "import sys; from open_lm.utils.inspect_shards import main, make_parser; make_parser().format_help(); "
    code += "assert 'numpy' not in sys.modules; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command_line = [sys.executable, "-c", code, str(tmp_path), "--samples", "1", "--num-workers", "1"]
    assert "Sample: sequence" in subprocess.run(command_line, capture_output=True, text=True, check=True).stdout
