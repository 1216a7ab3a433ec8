"""Test which checkpoints --resume selects, from several folders and formats, with broken and incomplete ones."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from open_lm import storage
from open_lm.checkpoint import find_candidates
from open_lm.checkpoint.files import file_name, read_meta, read_model_state, write_file
from open_lm.checkpoint.finding import Candidate, candidates_at, newest_candidates
from open_lm.checkpoint.folders import INCOMPLETE, INDEX, step_folder
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import Index, StoredChunk, StoredTensor, checksum_of
from open_lm.config.sections import CheckpointConfig, LoggingConfig
from open_lm.errors import CheckpointError, ConfigError
from open_lm.monitor.run_folder import RunPaths

WEIGHT = torch.arange(6.0).reshape(2, 3)
LATEST = CheckpointConfig(resume="latest")


def interchange(folder: str | Path, epoch: int | str, step: int | None = None, *, optimizer: bool = True) -> str:
    """Write minimal interchange files of one epoch; return epoch_N.pt's path."""
    progress = Progress(epoch=epoch if isinstance(epoch, int) else 7, step=step)
    entries = {**progress.common_entries("run"), **progress.shared_entries()}
    if isinstance(epoch, int):
        if optimizer:
            write_file(storage.join(folder, file_name("optimizer", epoch)), {**entries, "optimizer": {"state": {}}})
        write_file(storage.join(folder, file_name("stats", epoch)), entries)
    path = storage.join(folder, file_name("epoch", epoch))
    write_file(path, {**entries, "state_dict": {"w": WEIGHT}, "optimizer": {}})
    return path


def sharded(root: str | Path, step: int, epoch: int = 0) -> str:
    """Write a step_N folder with one tensor; return its path."""
    folder = storage.join(root, step_folder(step))
    data = WEIGHT.numpy().tobytes()
    storage.write_bytes(storage.join(folder, "a.bin"), data)
    chunk = StoredChunk((0, 0), (2, 3), "a.bin", 0, len(data), checksum_of(data))
    progress = Progress(epoch=epoch, step=step).to_json()
    tensors = {"model/w": StoredTensor(torch.float32, (2, 3), (chunk,))}
    index = Index(step, {"a.bin": len(data)}, tensors, {}, {"progress": progress, "name": "run"})
    storage.write_bytes(storage.join(folder, INDEX), index.to_bytes())
    return folder


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    run_paths = RunPaths(str(tmp_path / "logs"), "run")
    run_paths.prepare(None)
    return run_paths


def urls(candidates: list[Candidate]) -> list[str]:
    return [candidate.url for candidate in candidates]


def test_newest_come_first_and_sharded_before_interchange(paths: RunPaths) -> None:
    folder = paths.checkpoints
    assert find_candidates(LATEST, LoggingConfig(logs=paths.logs), paths) == []
    expected = [
        sharded(folder, 100, 2),
        sharded(folder, 90, 2),
        interchange(folder, 2, 90),
        interchange(folder, 1, 45),
    ]
    os.makedirs(storage.join(folder, step_folder(200) + INCOMPLETE))
    candidates = find_candidates(LATEST, LoggingConfig(logs=paths.logs), paths)
    assert urls(candidates) == expected
    assert candidates[0] == Candidate(expected[0], 100, 2, sharded=True, remote=False)
    assert candidates[2] == Candidate(expected[2], 90, 2, sharded=False, remote=False)


def test_epochs_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    for epoch in (2, 9, 10, 11):
        interchange(tmp_path, epoch)
    assert urls(newest_candidates([str(tmp_path)]))[:2] == [
        str(tmp_path / "epoch_11.pt"),
        str(tmp_path / "epoch_10.pt"),
    ]


def test_epoch_latest_is_ordered_by_its_step(tmp_path: Path) -> None:
    folder = str(tmp_path)
    latest, first = interchange(folder, "latest", 50), interchange(folder, 1, 40)
    assert urls(newest_candidates([folder])) == [latest, first]
    second = interchange(folder, 2, 80)
    assert urls(newest_candidates([folder])) == [second, latest, first]


def break_index(folder: str) -> None:
    data = storage.read_bytes(storage.join(folder, INDEX))
    storage.write_bytes(storage.join(folder, INDEX), data.replace(b'"step":', b'"stop":', 1))


def truncate(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "a.bin"), b"short")


BROKEN: dict[str, tuple[Callable[[str], Any], str]] = {
    "no index": (lambda folder: storage.remove(storage.join(folder, INDEX)), "no complete checkpoint"),
    "changed index": (break_index, "changed since it was written"),
    "missing file": (lambda folder: storage.remove(storage.join(folder, "a.bin")), "a.bin is missing"),
    "truncated file": (truncate, "a.bin has 5 bytes, expected 24"),
}


def test_a_run_with_only_broken_checkpoints_does_not_start_from_scratch(paths: RunPaths) -> None:
    damage, reason = BROKEN["truncated file"]
    for step in (1, 2):
        damage(sharded(paths.checkpoints, step))
    with pytest.raises(CheckpointError, match=rf"all checkpoints of this run are broken(.|\n)*{reason}"):
        find_candidates(LATEST, LoggingConfig(logs=paths.logs), paths)


def test_an_incomplete_checkpoint_is_not_a_broken_one(paths: RunPaths) -> None:
    BROKEN["no index"][0](sharded(paths.checkpoints, 1))
    assert find_candidates(LATEST, LoggingConfig(logs=paths.logs), paths) == []


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("location", ["local", "s3"])
def test_broken_folders_are_skipped_with_a_warning(
    kind: str, location: str, tmp_path: Path, s3_bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(tmp_path) if location == "local" else f"s3://{s3_bucket}/run/checkpoints"
    good, broken = sharded(root, 1), sharded(root, 2)
    damage, reason = BROKEN[kind]
    damage(broken)
    with caplog.at_level(logging.WARNING):
        assert urls(newest_candidates([root])) == [good]
    assert f"skipped checkpoint {broken}: " in caplog.text and reason in caplog.text
    with pytest.raises(CheckpointError, match=f"cannot resume from .*{step_folder(2)}: .*{reason}"):
        candidates_at(broken)


def test_broken_files_are_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epoch in (9, 10, 11):
        interchange(tmp_path, epoch)
    (tmp_path / "epoch_11.pt").write_bytes((tmp_path / "epoch_11.pt").read_bytes()[:500])
    (tmp_path / "optimizer_10.pt").unlink()
    (tmp_path / "epoch_12.pt").touch()
    (tmp_path / ".epoch_13.pt.open-lm-part-x").write_bytes(b"PK")
    (tmp_path / "epoch_latest.pt").write_bytes(b"PK")
    with caplog.at_level(logging.WARNING):
        candidates = newest_candidates([str(tmp_path)])
    assert urls(candidates) == [str(tmp_path / "epoch_9.pt"), str(tmp_path / "epoch_10.pt")], "weights only come last"
    for name in ("epoch_12.pt", "epoch_11.pt", "epoch_10.pt", "epoch_latest.pt"):
        assert f"skipped checkpoint {tmp_path / name}: " in caplog.text


def test_only_the_newest_checkpoints_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run with many checkpoints, only few are read, and no tensors."""
    for step in range(1, 30):
        sharded(tmp_path, step)
        interchange(tmp_path, step, step)
    opened: list[str] = []
    read_bytes, open_file = storage.read_bytes, storage.open_file
    monkeypatch.setattr(storage, "read_bytes", lambda url: opened.append(url) or read_bytes(url))
    monkeypatch.setattr(storage, "open_file", lambda url: opened.append(url) or open_file(url))
    candidates = newest_candidates([str(tmp_path)])
    assert [candidate.step for candidate in candidates] == [29, 29, 28, 28]
    assert not any(url.endswith(".bin") for url in opened)
    assert {int("".join(filter(str.isdigit, os.path.relpath(url, tmp_path)))) for url in opened} <= {27, 28, 29}


# ---------------------------------------------------------------------------------------------- other folders
def test_checkpoint_dir_and_run_folder_are_both_searched(tmp_path: Path, s3_bucket: str) -> None:
    for number, checkpoint_dir in enumerate((str(tmp_path / "big"), f"s3://{s3_bucket}/big")):
        paths = RunPaths(str(tmp_path / f"logs{number}"), "run", checkpoint_dir)
        older = interchange(storage.join(paths.root, "checkpoints"), 1, 10)
        newer = sharded(storage.join(checkpoint_dir, "run", "checkpoints"), 20)
        candidates = find_candidates(LATEST, LoggingConfig(logs=paths.logs), paths)
        assert urls(candidates) == [newer, older]
        assert candidates[0].remote == checkpoint_dir.startswith("s3://")


def test_the_remote_copy_is_used_if_it_is_newer(paths: RunPaths, s3_bucket: str) -> None:
    remote = f"s3://{s3_bucket}/runs"
    copy = f"{remote}/run/checkpoints"
    both = [sharded(paths.checkpoints, 5), sharded(copy, 5), interchange(copy, 1, 5)]
    ahead = sharded(copy, 8, 1)
    for name, remote_text, local_text in (("out.log", "a\nb\n", "a\n"), ("metrics.jsonl", "{}\n", None)):
        storage.write_text(f"{remote}/run/{name}", remote_text)
        if local_text is not None:
            storage.write_text(storage.join(paths.root, name), local_text)
    logging_cfg = LoggingConfig(logs=paths.logs, remote_sync=remote)
    candidates = find_candidates(LATEST, logging_cfg, paths)
    assert urls(candidates) == [ahead, *both]
    assert candidates[0] == Candidate(ahead, 8, 1, sharded=True, remote=True)
    assert storage.read_text(paths.log) == "a\nb\n", "the longer log is continued"
    assert storage.read_text(paths.metrics) == "{}\n"
    other_paths = RunPaths(paths.logs + "-other", "run")
    with pytest.raises(ConfigError, match="already exists at"):
        find_candidates(CheckpointConfig(), logging_cfg, other_paths)


def test_reading_the_step_of_a_remote_model_does_not_download_it(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"s3://{s3_bucket}/run/epoch_latest.pt"
    interchange(f"s3://{s3_bucket}/run", "latest", 44)
    monkeypatch.setattr(storage, "download", lambda *_: pytest.fail("the model was downloaded"))
    assert read_meta(path)["step"] == 44
    assert candidates_at(path) == [Candidate(path, 44, 7, sharded=False, remote=True)]


# ---------------------------------------------------------------------------------------------- a path
def test_a_path_selects_a_checkpoint_or_a_run(tmp_path: Path, paths: RunPaths) -> None:
    folder = paths.checkpoints
    step, epoch = sharded(folder, 30, 2), interchange(folder, 2, 20)
    write_file(str(tmp_path / "bare.pt"), {"w": WEIGHT})
    assert urls(candidates_at(step)) == urls(candidates_at(step + "/")) == [step]
    assert candidates_at(epoch) == [Candidate(epoch, 20, 2, sharded=False, remote=False)]
    assert candidates_at(str(tmp_path / "bare.pt"))[0].step == 0
    assert urls(candidates_at(folder)) == urls(candidates_at(paths.root)) == [step, epoch]
    with pytest.raises(CheckpointError, match=r"epoch_7.pt: no such checkpoint; the folder contains epoch_2.pt"):
        candidates_at(storage.join(folder, "epoch_7.pt"))
    with pytest.raises(CheckpointError, match="a step_N folder, or a run folder"):
        candidates_at(str(tmp_path))


def test_folders_and_files_return_the_same_state(tmp_path: Path) -> None:
    folder, path = sharded(tmp_path, 30, 2), interchange(tmp_path, 2, 30)
    weights, meta = read_model_state(folder)
    assert torch.equal(weights["w"], WEIGHT)
    assert (meta, meta) == (read_model_state(path)[1], read_meta(folder))


def test_checkpoints_of_the_original_openlm_are_found(shared_dir: Path) -> None:
    logs = shared_dir / "compat" / "run" / "logs"
    candidates = find_candidates(LATEST, LoggingConfig(logs=str(logs)), RunPaths(str(logs), "upstream"))
    expected = [(str(logs / "upstream" / "checkpoints" / f"epoch_{n}.pt"), 64 * n, n) for n in (2, 1)]
    assert [(candidate.url, candidate.step, candidate.epoch) for candidate in candidates] == expected


def test_progress_round_trips_through_json() -> None:
    progress = Progress(epoch=2, step=9, seed=3, evaluation_metrics=[{"loss": torch.tensor(2.5).numpy()[()]}])
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json({"step": 4, "of a later version": 1}) == Progress(step=4)
