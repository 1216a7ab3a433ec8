"""Test the command that writes the manifest of a folder of shards."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from open_lm import storage
from open_lm.data.shard_format import ShardWriter, index_shard, read_manifest
from open_lm.data.shards import Shard, sequence_members
from open_lm.errors import ConfigError, DataError
from open_lm.utils.make_wds_manifest import main, make_manifest
from open_lm.utils.shard_samples import read_samples


def make_shards(folder: Path | str, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        with ShardWriter(storage.join(folder, f"{name}.tar"), "json.gz") as writer:
            for number in range(count):
                writer.write(f"{number:04d}", np.arange(5))


@pytest.mark.processes
def test_command_on_the_golden_shards(shared_dir: Path, tmp_path: Path) -> None:
    for source in (shared_dir / "compat" / "run" / "data").glob("*.tar"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    command = [
        sys.executable,
        "-m",
        "open_lm.utils.make_wds_manifest",
        "--data-dir",
        str(tmp_path),
        "--num-workers",
        "3",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "2,048 sequences" in result.stdout
    entries = read_manifest(str(tmp_path / "manifest.jsonl"))
    assert [(entry.shard, entry.num_sequences) for entry in entries] == [(f"{n:08d}", 256) for n in range(1, 9)]
    for entry in entries:
        data = (tmp_path / f"{entry.shard}.tar").read_bytes()
        assert entry.extra["num_bytes"] == len(data) and entry.extra["sha256"] == hashlib.sha256(data).hexdigest()
        with tarfile.open(tmp_path / f"{entry.shard}.tar") as tar:
            members = [json.loads(gzip.decompress(tar.extractfile(name).read())) for name in tar.getnames()]  # type: ignore[union-attr]
        assert entry.extra["num_tokens"] == sum(map(len, members))


@pytest.mark.processes
def test_broken_shards_are_reported_together_and_nothing_is_written(tmp_path: Path) -> None:
    make_shards(tmp_path, {"a": 3, "b": 2, "c": 1})
    for name in ("a", "c"):
        data = (tmp_path / f"{name}.tar").read_bytes()
        (tmp_path / f"{name}.tar").write_bytes(data[:700])
    with pytest.raises(DataError) as caught:
        main(["--data-dir", str(tmp_path)])
    assert "a.tar" in str(caught.value) and "c.tar" in str(caught.value) and "b.tar" not in str(caught.value)
    assert not (tmp_path / "manifest.jsonl").exists()
    with pytest.raises(DataError, match=r"no \.tar file"):
        make_manifest(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="--num-workers"):
        make_manifest(str(tmp_path), workers=0)


def test_sample_in_several_formats_counts_once(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.json", "0.txt", "1.json", "1.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"[1]"))
    assert make_manifest(str(tmp_path), "other.jsonl") == 2
    (entry,) = read_manifest(str(tmp_path / "other.jsonl"))
    assert (entry.shard, entry.num_sequences, entry.extra["num_tokens"]) == ("a", 2, 2)


@pytest.mark.parametrize("kind", ["npy", "json.gz", "txt"])
def test_the_manifest_of_a_shard_with_a_lone_meta_json_counts_the_sequences_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = str(tmp_path / "a.tar")
    with ShardWriter(path, kind) as writer:
        for number in range(64):
            writer.write(f"{number:04d}", np.arange(5))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("meta.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    assert make_manifest(str(tmp_path)) == 64
    assert f"1 members are not of the kind of its sequences ({kind})" in capsys.readouterr().err
    for data_key in (kind, None):
        with open(path, "rb") as file:
            assert len(Shard(path, file, data_key)) == 64
    (sample,) = read_samples(path, [63], None, None)
    assert (sample["key"], sample["tokens"]) == ("0063", 5)
    with open(path, "rb") as file:
        assert len(sequence_members(index_shard(file, path), "json")) == 1


def test_broken_members_count_as_sequences_and_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, text in {"0.json": b"[1]", "1.json": b"[1"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    assert make_manifest(str(tmp_path)) == 2
    assert "1 members cannot be read" in (stderr := capsys.readouterr().err) and "member 1.json" in stderr
    (entry,) = read_manifest(str(tmp_path / "manifest.jsonl"))
    assert sorted(entry.extra) == ["num_bytes", "sha256"]


def test_additional_keys_of_unchanged_shards_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, {"a": 3, "b": 2})
    (tmp_path / "dataset.json").write_text('{"sources": {"wiki": {}}}')
    make_manifest(str(tmp_path), workers=1)
    first, second = read_manifest(str(tmp_path / "manifest.jsonl"))
    assert (first.extra["sources"], second.extra["sources"]) == ({"wiki": 15}, {"wiki": 10})
    (tmp_path / "dataset.json").write_text("junk")
    make_shards(tmp_path, {"b": 1})
    make_manifest(str(tmp_path), workers=1)
    assert "dataset.json: not JSON" in capsys.readouterr().err
    again, changed = read_manifest(str(tmp_path / "manifest.jsonl"))
    assert again == first and changed.num_sequences == 1 and "sources" not in changed.extra


@pytest.mark.processes
def test_make_manifest_in_s3(s3_bucket: str, tmp_path: Path) -> None:
    folder = f"s3://{s3_bucket}/set"
    make_shards(folder, {"00000001": 4, "00000002": 2})
    assert make_manifest(folder, tmp_dir=str(tmp_path / "tmp")) == 6
    assert [entry.num_sequences for entry in read_manifest(f"{folder}/manifest.jsonl")] == [4, 2]
    assert list((tmp_path / "tmp").iterdir()) == []
