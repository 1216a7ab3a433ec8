"""Which checkpoint --resume means: of several places and forms, with broken and incomplete ones among them."""

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
from open_lm.checkpoint import candidates
from open_lm.checkpoint.files import file_name, read_meta, read_model_state, write_file
from open_lm.checkpoint.finding import Candidate, named, newest
from open_lm.checkpoint.folders import INCOMPLETE, INDEX, step_folder
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import Index, StoredChunk, StoredTensor, checksum_of
from open_lm.config.sections import CheckpointConfig, LoggingConfig
from open_lm.errors import CheckpointError, ConfigError
from open_lm.monitor.run_folder import RunPaths

WEIGHT = torch.arange(6.0).reshape(2, 3)
LATEST = CheckpointConfig(resume="latest")


def interchange(folder: str | Path, epoch: int | str, step: int | None = None, *, optimizer: bool = True) -> str:
    """The files of one epoch, as small as they can be; returns epoch_N.pt's path."""
    progress = Progress(epoch=epoch if isinstance(epoch, int) else 7, step=step)
    said = {**progress.common_entries("run"), **progress.shared_entries()}
    if isinstance(epoch, int):
        if optimizer:
            write_file(storage.join(folder, file_name("optimizer", epoch)), {**said, "optimizer": {"state": {}}})
        write_file(storage.join(folder, file_name("stats", epoch)), said)
    path = storage.join(folder, file_name("epoch", epoch))
    write_file(path, {**said, "state_dict": {"w": WEIGHT}, "optimizer": {}})
    return path


def sharded(root: str | Path, step: int, epoch: int = 0) -> str:
    """A step_N folder with one tensor; returns its path."""
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
    made = RunPaths(str(tmp_path / "logs"), "run")
    made.prepare(None)
    return made


def urls(found: list[Candidate]) -> list[str]:
    return [candidate.url for candidate in found]


def test_the_newest_come_first_and_sharded_ones_before_interchange_files(paths: RunPaths) -> None:
    folder = paths.checkpoints
    assert candidates(LATEST, LoggingConfig(logs=paths.logs), paths) == []
    expected = [
        sharded(folder, 100, 2),
        sharded(folder, 90, 2),
        interchange(folder, 2, 90),
        interchange(folder, 1, 45),
    ]
    os.makedirs(storage.join(folder, step_folder(200) + INCOMPLETE))
    found = candidates(LATEST, LoggingConfig(logs=paths.logs), paths)
    assert urls(found) == expected
    assert found[0] == Candidate(expected[0], 100, 2, sharded=True, remote=False)
    assert found[2] == Candidate(expected[2], 90, 2, sharded=False, remote=False)


def test_numbers_count_not_names(tmp_path: Path) -> None:
    for epoch in (2, 9, 10, 11):
        interchange(tmp_path, epoch)
    assert urls(newest([str(tmp_path)]))[:2] == [str(tmp_path / "epoch_11.pt"), str(tmp_path / "epoch_10.pt")]


def test_epoch_latest_is_one_among_others(tmp_path: Path) -> None:
    folder = str(tmp_path)
    latest, numbered = interchange(folder, "latest", 50), interchange(folder, 1, 40)
    assert urls(newest([folder])) == [latest, numbered]
    later = interchange(folder, 2, 80)
    assert urls(newest([folder])) == [later, latest, numbered]


def break_index(folder: str) -> None:
    data = storage.read_bytes(storage.join(folder, INDEX))
    storage.write_bytes(storage.join(folder, INDEX), data.replace(b'"step":', b'"stop":', 1))


def shorten(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "a.bin"), b"short")


BROKEN: dict[str, tuple[Callable[[str], Any], str]] = {
    "no index": (lambda folder: storage.remove(storage.join(folder, INDEX)), "no complete checkpoint"),
    "an index that was changed": (break_index, "changed since it was written"),
    "a file that is missing": (lambda folder: storage.remove(storage.join(folder, "a.bin")), "a.bin is missing"),
    "a file that is cut short": (shorten, "a.bin has 5 bytes, expected 24"),
}


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(paths: RunPaths) -> None:
    spoil, said = BROKEN["a file that is cut short"]
    for step in (1, 2):
        spoil(sharded(paths.checkpoints, step))
    with pytest.raises(CheckpointError, match=rf"no checkpoint of this run can be read(.|\n)*{said}"):
        candidates(LATEST, LoggingConfig(logs=paths.logs), paths)


def test_what_was_never_completed_is_no_broken_checkpoint(paths: RunPaths) -> None:
    BROKEN["no index"][0](sharded(paths.checkpoints, 1))
    assert candidates(LATEST, LoggingConfig(logs=paths.logs), paths) == []


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("place", ["here", "there"])
def test_broken_folders_are_stepped_over_aloud(
    kind: str, place: str, tmp_path: Path, s3_bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(tmp_path) if place == "here" else f"s3://{s3_bucket}/run/checkpoints"
    good, broken = sharded(root, 1), sharded(root, 2)
    spoil, said = BROKEN[kind]
    spoil(broken)
    with caplog.at_level(logging.WARNING):
        assert urls(newest([root])) == [good]
    assert f"{broken} is stepped over" in caplog.text and said in caplog.text
    with pytest.raises(CheckpointError, match=f"{step_folder(2)} cannot be resumed from: .*{said}"):
        named(broken)


def test_broken_files_are_stepped_over_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epoch in (9, 10, 11):
        interchange(tmp_path, epoch)
    (tmp_path / "epoch_11.pt").write_bytes((tmp_path / "epoch_11.pt").read_bytes()[:500])
    (tmp_path / "optimizer_10.pt").unlink()
    (tmp_path / "epoch_12.pt").touch()
    (tmp_path / ".epoch_13.pt.open-lm-part-x").write_bytes(b"PK")
    (tmp_path / "epoch_latest.pt").write_bytes(b"PK")
    with caplog.at_level(logging.WARNING):
        found = newest([str(tmp_path)])
    assert urls(found) == [str(tmp_path / "epoch_9.pt"), str(tmp_path / "epoch_10.pt")], "weights alone come last"
    for word in ("epoch_12.pt", "epoch_11.pt", "epoch_10.pt", "epoch_latest.pt"):
        assert f"{word} is stepped over" in caplog.text


def test_only_what_is_needed_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run with many checkpoints some are read, and no tensors at all."""
    for step in range(1, 30):
        sharded(tmp_path, step)
        interchange(tmp_path, step, step)
    opened: list[str] = []
    read_bytes, open_file = storage.read_bytes, storage.open_file
    monkeypatch.setattr(storage, "read_bytes", lambda url: opened.append(url) or read_bytes(url))
    monkeypatch.setattr(storage, "open_file", lambda url: opened.append(url) or open_file(url))
    found = newest([str(tmp_path)])
    assert [candidate.step for candidate in found] == [29, 29, 28, 28]
    assert not any(url.endswith(".bin") for url in opened)
    assert {int("".join(filter(str.isdigit, os.path.relpath(url, tmp_path)))) for url in opened} <= {27, 28, 29}


# ---------------------------------------------------------------------------------------------- other places
def test_checkpoints_in_another_folder_and_older_ones_in_the_runs_own(tmp_path: Path, s3_bucket: str) -> None:
    for number, place in enumerate((str(tmp_path / "big"), f"s3://{s3_bucket}/big")):
        paths = RunPaths(str(tmp_path / f"logs{number}"), "run", place)
        older = interchange(storage.join(paths.root, "checkpoints"), 1, 10)
        newer = sharded(storage.join(place, "run", "checkpoints"), 20)
        found = candidates(LATEST, LoggingConfig(logs=paths.logs), paths)
        assert urls(found) == [newer, older]
        assert found[0].remote == place.startswith("s3://")


def test_the_copy_serves_where_it_is_further_on(paths: RunPaths, s3_bucket: str) -> None:
    remote = f"s3://{s3_bucket}/runs"
    copy = f"{remote}/run/checkpoints"
    both = [sharded(paths.checkpoints, 5), sharded(copy, 5), interchange(copy, 1, 5)]
    ahead = sharded(copy, 8, 1)
    for name, there, here in (("out.log", "a\nb\n", "a\n"), ("metrics.jsonl", "{}\n", None)):
        storage.write_text(f"{remote}/run/{name}", there)
        if here is not None:
            storage.write_text(storage.join(paths.root, name), here)
    logging_cfg = LoggingConfig(logs=paths.logs, remote_sync=remote)
    found = candidates(LATEST, logging_cfg, paths)
    assert urls(found) == [ahead, *both]
    assert found[0] == Candidate(ahead, 8, 1, sharded=True, remote=True)
    assert storage.read_text(paths.log) == "a\nb\n", "the longer log is continued"
    assert storage.read_text(paths.metrics) == "{}\n"
    elsewhere = RunPaths(paths.logs + "-elsewhere", "run")
    with pytest.raises(ConfigError, match="exists already at"):
        candidates(CheckpointConfig(), logging_cfg, elsewhere)


def test_a_remote_model_is_not_fetched_to_learn_its_step(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"s3://{s3_bucket}/run/epoch_latest.pt"
    interchange(f"s3://{s3_bucket}/run", "latest", 44)
    monkeypatch.setattr(storage, "download", lambda *_: pytest.fail("the model was downloaded"))
    assert read_meta(path)["step"] == 44
    assert named(path) == [Candidate(path, 44, 7, sharded=False, remote=True)]


# ---------------------------------------------------------------------------------------------- a path
def test_a_path_names_a_checkpoint_or_a_run(tmp_path: Path, paths: RunPaths) -> None:
    folder = paths.checkpoints
    step, epoch = sharded(folder, 30, 2), interchange(folder, 2, 20)
    write_file(str(tmp_path / "bare.pt"), {"w": WEIGHT})
    assert urls(named(step)) == urls(named(step + "/")) == [step]
    assert named(epoch) == [Candidate(epoch, 20, 2, sharded=False, remote=False)]
    assert named(str(tmp_path / "bare.pt"))[0].step == 0
    assert urls(named(folder)) == urls(named(paths.root)) == [step, epoch]
    with pytest.raises(CheckpointError, match=r"epoch_7.pt: there is no such checkpoint; beside it are epoch_2.pt"):
        named(storage.join(folder, "epoch_7.pt"))
    with pytest.raises(CheckpointError, match="a step_N folder, or the folder of a run"):
        named(str(tmp_path))


def test_a_folder_is_read_as_a_file_is(tmp_path: Path) -> None:
    folder, path = sharded(tmp_path, 30, 2), interchange(tmp_path, 2, 30)
    weights, meta = read_model_state(folder)
    assert torch.equal(weights["w"], WEIGHT)
    assert (meta, meta) == (read_model_state(path)[1], read_meta(folder))


def test_historical_run(shared_dir: Path) -> None:
    logs = shared_dir / "compat" / "run" / "logs"
    found = candidates(LATEST, LoggingConfig(logs=str(logs)), RunPaths(str(logs), "upstream"))
    expected = [(str(logs / "upstream" / "checkpoints" / f"epoch_{n}.pt"), 64 * n, n) for n in (2, 1)]
    assert [(candidate.url, candidate.step, candidate.epoch) for candidate in found] == expected


def test_progress_goes_through_json_and_back() -> None:
    progress = Progress(epoch=2, step=9, seed=3, evaluation_metrics=[{"loss": torch.tensor(2.5).numpy()[()]}])
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json({"step": 4, "of a later version": 1}) == Progress(step=4)
