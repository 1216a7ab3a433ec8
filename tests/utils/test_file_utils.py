"""Test the file helpers for existing programs with the golden run and hand-computed intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from open_lm import storage
from open_lm.errors import CheckpointError, ConfigError, DataError
from open_lm.utils.file_utils import check_exists, get_metadata_file, get_string_for_epoch, pt_load


def manifest(folder: Path, sizes: list[int], key: str = "num_sequences", newline: str = "\n") -> str:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"shard": f"{number:08d}", key: size}) for number, size in enumerate(sizes)]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + newline)
    return str(folder / "manifest.jsonl")


def interval(path: str, samples: int, start: int, workers: int = 1, **options: Any) -> tuple[Any, ...]:
    return get_string_for_epoch(samples, [start], [path], None, workers, 1, **options)


def test_shuffled_shard_order_matches_the_golden_run(shared_dir: Path) -> None:
    run = shared_dir / "compat" / "run"
    position = [0]
    for epoch in (1, 2):
        stats = torch.load(run / "logs" / "upstream" / "checkpoints" / f"stats_{epoch}.pt", weights_only=True)
        patterns, counts, position = get_string_for_epoch(
            512, position, [str(run / "data" / "manifest.jsonl")], None, 1, 1, shard_shuffle_seed=3
        )
        assert [Path(pattern).name for pattern in patterns] == [Path(p).name for p in stats["train_data_string"]]
        assert (counts, position) == ([512], stats["next_shard_per_source"])


@pytest.mark.parametrize("key, newline", [("num_sequences", "\n"), ("num_chunks", "")])
def test_intervals_of_one_source(tmp_path: Path, key: str, newline: str) -> None:
    path = manifest(tmp_path / "a", [100] * 6 + [66], key, newline)
    folder = tmp_path / "a"
    assert interval(path, 10, 0) == ([f"{folder}/00000000.tar"], [100], [1])
    assert interval(path, 150, 5) == ([f"{folder}/{{00000005,00000006}}.tar"], [166], [7])
    assert interval(path, 10, 0, workers=2) == ([f"{folder}/{{00000000,00000001}}.tar"], [200], [2])
    # Five shards are needed, but each of two workers gets two.
    names = ",".join(f"{number:08d}" for number in range(4))
    assert interval(path, 450, 0, workers=2) == ([f"{folder}/{{{names}}}.tar"], [400], [4])


def test_too_little_data(tmp_path: Path) -> None:
    path = manifest(tmp_path / "a", [100] * 6 + [66])
    for samples, start, workers in ((1000, 0, 1), (200, 5, 1), (42, 0, 10), (42, 5, 3)):
        with pytest.raises(IndexError, match="shards remain") as error:
            interval(path, samples, start, workers)
        assert isinstance(error.value, DataError)


def test_sources_contribute_equal_numbers_of_shards(tmp_path: Path) -> None:
    paths = [manifest(tmp_path / name, [100] * 8) for name in "ab"]
    patterns, counts, next_starts = get_string_for_epoch(400, [0, 2], paths, [3.0, 1.0], 1, 1)
    assert (counts, next_starts) == ([300, 300], [3, 5])
    assert [pattern.count(",") for pattern in patterns] == [2, 2]
    with pytest.raises(ConfigError, match="found 1 weights and 2 starting points for 2 manifests"):
        get_string_for_epoch(400, [0, 2], paths, [3.0], 1, 1)


def test_multiple_passes(tmp_path: Path) -> None:
    path = manifest(tmp_path / "a", [1000] * 4 + [500] + [1000] * 3)
    folder = tmp_path / "a"
    assert interval(path, 2000, 7, multi_epoch=True) == ([f"{folder}/{{00000000,00000001}}.tar"], [2000], [10])
    assert interval(path, 2000, 11, multi_epoch=True) == (
        [f"{folder}/{{00000003,00000004,00000005}}.tar"],
        [2500],
        [14],
    )
    with pytest.raises(ValueError, match="a full pass has too few shards"):
        interval(path, 10000, 0, multi_epoch=True)
    first = interval(path, 2000, 0, multi_epoch=True, shard_shuffle_seed=5)
    again = interval(path, 2000, 8, multi_epoch=True, shard_shuffle_seed=5)
    assert first[0] != again[0], "each pass must have its own order"


def test_metadata_reports_every_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"shard": "1", "num_sequences": 3}\nnot json\n{"shard": "2"}\n\n')
    with pytest.raises(DataError) as error:
        get_metadata_file(str(path))
    assert "line 2" in str(error.value) and "line 3" in str(error.value)


def test_remote_files(s3_bucket: str, tmp_path: Path) -> None:
    torch.save({"epoch": 4, "state_dict": {"w": torch.ones(3)}}, tmp_path / "epoch_4.pt")
    url = f"s3://{s3_bucket}/runs/epoch_4.pt"
    storage.upload(tmp_path / "epoch_4.pt", url)
    assert check_exists(url) and not check_exists(url + "x") and not check_exists(f"s3://{s3_bucket}/runs")
    for path in (url, str(tmp_path / "epoch_4.pt")):
        content = pt_load(path, map_location="cpu")
        assert content["epoch"] == 4 and torch.equal(content["state_dict"]["w"], torch.ones(3))
    with pytest.raises(CheckpointError, match=r"epoch_9\.pt: no such file"):
        pt_load(f"s3://{s3_bucket}/runs/epoch_9.pt")
