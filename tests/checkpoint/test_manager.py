"""Test which checkpoints a run writes, in which formats, which it keeps, and what remains after storage errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from open_lm import storage
from open_lm.checkpoint import CheckpointManager, Progress, find_candidates, read_model_state
from open_lm.checkpoint.folders import INCOMPLETE, INDEX, step_folder
from open_lm.checkpoint.sharded import TrainingState, load
from open_lm.config.sections import CheckpointConfig, LoggingConfig
from open_lm.errors import StorageError
from open_lm.monitor.run_folder import RunPaths
from open_lm.optim.averaging import ModelAverager


class Run:
    """A model that changes with every step, saved like the trainer does."""

    def __init__(self, folder: Path, epochs: int = 3, checkpoint_dir: str | None = None, **flags: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.averagers = ModelAverager(self.model, "ema_0.5")
        self.cfg = CheckpointConfig(checkpoint_dir=checkpoint_dir, resume="latest", **flags)
        self.paths = RunPaths(str(folder), "run", checkpoint_dir)
        self.paths.prepare("latest")
        self.manager = CheckpointManager(self.paths, self.cfg, epochs)
        self.manager.start()
        self.epochs, self.step = epochs, 0

    def train(self, step: int) -> None:
        while self.step < step:
            self.model(torch.ones(1, 4)).sum().backward()
            self.optimizer.step()
            self.averagers.step()
            self.step += 1

    def at(self, step: int, epoch: int = 0, is_final: bool = False) -> tuple[Progress, TrainingState]:
        self.train(step)
        progress = Progress(epoch=epoch, step=step, samples_seen=step * 8, seed=0, is_final=is_final)
        extra = {"progress": progress.to_json(), "name": "run"}
        return progress, TrainingState(self.model, self.optimizer, averagers=self.averagers, extra=extra)

    def names(self) -> set[str]:
        self.manager.finish()
        root = self.paths.checkpoints.rstrip("/") + "/"
        return {url.removeprefix(root).split("/")[0] for url in storage.list_files(root, recursive=True)}

    def newest(self) -> str:
        return find_candidates(self.cfg, LoggingConfig(), self.paths)[0].url


STEP = {step: step_folder(step) for step in (2, 4, 5, 6, 8, 10, 12)}
COMPANIONS = ("epoch", "optimizer", "stats", "ema_0.5")


def interchange(*epochs: int | str) -> set[str]:
    return {f"{kind}_{epoch}.pt" for epoch in epochs for kind in COMPANIONS}


def test_both_formats_at_the_end_of_epochs_and_sharded_in_between(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every_n_steps=2, keep_last=2)
    for step in (2, 4):
        assert run.manager.is_due(step, False)
        run.manager.save_step(*run.at(step))
    assert not run.manager.is_due(5, False) and run.manager.is_due(5, True)
    run.manager.save_epoch(*run.at(5, epoch=1))
    assert run.names() == {STEP[4], STEP[5], *interchange(1)}
    weights, meta = read_model_state(f"{run.paths.checkpoints}/epoch_1.pt")
    assert meta["step"] == 5 and meta["epoch"] == 1
    assert torch.equal(weights["weight"], run.model.weight)
    run.manager.save_step(*run.at(6, epoch=1))
    assert run.names() == {STEP[5], STEP[6], *interchange(1)}
    assert run.newest().endswith(STEP[6])


def test_each_format_separately(tmp_path: Path) -> None:
    sharded = Run(tmp_path / "a", checkpoint_format="sharded")
    sharded.manager.save_epoch(*sharded.at(2, epoch=1))
    assert sharded.names() == {STEP[2]}
    files = Run(tmp_path / "b", checkpoint_format="interchange")
    files.manager.save_epoch(*files.at(2, epoch=1))
    assert files.names() == interchange(1)
    files.manager.save_step(*files.at(4, epoch=1), wait=True)  # as on a signal
    assert files.names() == {*interchange(1), "epoch_latest.pt"}
    assert files.newest().endswith("epoch_latest.pt")


def test_flags_that_limit_the_number_of_checkpoints(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", epochs=3, save_frequency=2, save_most_recent=True)
    for epoch in (1, 2, 3):
        run.manager.save_epoch(*run.at(2 * epoch, epoch))
    assert run.names() == {STEP[4], STEP[6], *interchange(2, 3), "epoch_latest.pt"}
    run = Run(tmp_path / "b", epochs=3, delete_previous_checkpoint=True, save_milestone_every=4)
    for epoch in (1, 2, 3):
        run.manager.save_epoch(*run.at(2 * epoch, epoch))
    assert run.names() == {STEP[4], STEP[6], *interchange(3)}
    run = Run(tmp_path / "c", epochs=3, save_frequency=0)
    for epoch in (1, 2):
        run.manager.save_epoch(*run.at(2 * epoch, epoch))
    assert run.names() == set()
    run.manager.save_epoch(*run.at(5, 2, is_final=True))
    assert run.names() == {STEP[5], *interchange(2)}


def test_nothing_is_written_without_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Path("none"))
    run.paths = run.manager.paths = RunPaths("none", "run")
    run.manager.start()
    assert not run.manager.is_due(2, True)
    run.manager.save_step(*run.at(2))
    run.manager.save_epoch(*run.at(2, 1, is_final=True))
    assert run.manager.save_failed(*run.at(2)) is None and run.manager.newest(100) is None
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("step_*"))


def test_a_failed_state_is_saved_to_a_separate_folder(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.manager.save_step(*run.at(2))
    folder = run.manager.save_failed(*run.at(4))
    assert folder == f"{run.paths.failed}/{STEP[4]}"
    assert {path.name for path in Path(run.paths.failed).iterdir()} == {STEP[4], *interchange(0)}
    assert run.newest().endswith(STEP[2])


def test_checkpoints_in_a_bucket(tmp_path: Path, s3_bucket: str) -> None:
    run = Run(tmp_path, checkpoint_dir=f"s3://{s3_bucket}/here", keep_last=1)
    for step in (2, 4):
        run.manager.save_step(*run.at(step))
    run.manager.save_epoch(*run.at(6, 1, is_final=True))
    assert run.paths.checkpoints == f"s3://{s3_bucket}/here/run/checkpoints"
    assert run.names() == {STEP[6], *interchange(1)}
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))
    other = Run(tmp_path, checkpoint_dir=f"s3://{s3_bucket}/here")
    assert other.newest().endswith(STEP[6])
    extra = load(other.at(1)[1], other.newest())
    assert extra["progress"]["step"] == 6 and torch.equal(other.model.weight, run.model.weight)


def test_unfinished_checkpoints_of_a_killed_run_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    run.manager.save_step(*run.at(2))
    run.manager.finish()
    incomplete, no_index = f"{run.paths.checkpoints}/{STEP[4]}{INCOMPLETE}", f"{run.paths.checkpoints}/{STEP[6]}"
    for folder in (incomplete, no_index):
        storage.write_bytes(f"{folder}/rank_00000.bin", b"half")
    with caplog.at_level(logging.INFO):
        run.manager.start()
    assert run.names() == {STEP[2]}
    assert incomplete in caplog.text and no_index in caplog.text


def test_a_failed_save_names_the_folder_and_keeps_the_others(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.manager.save_step(*run.at(2))
    run.manager.finish()
    folder = Path(run.paths.checkpoints)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / (STEP[4] + INCOMPLETE)).write_text("a file with the name of the folder")
    run.manager.save_step(*run.at(4))
    with pytest.raises(StorageError, match=STEP[4]):
        run.manager.finish()
    run.manager.check()  # the error is raised only once
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run.newest().endswith(STEP[2])


def test_superseded_checkpoints_are_kept_until_the_next_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, keep_last=1)
    run.manager.save_step(*run.at(2))
    run.manager.finish()

    def fail(*args: object) -> str:
        raise StorageError("the disk is full")

    monkeypatch.setattr("open_lm.checkpoint.manager.write_interchange", fail)
    run.manager.save_epoch(*run.at(4, 1))
    with pytest.raises(StorageError, match="the disk is full"):
        run.manager.finish()
    assert {path.name for path in Path(run.paths.checkpoints).iterdir()} == {STEP[2], STEP[4]}


def test_a_step_is_saved_only_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.manager.save_step(*run.at(2))
    run.manager.finish()
    index = Path(run.paths.checkpoints) / STEP[2] / INDEX
    mtime_ns = index.stat().st_mtime_ns
    run.manager.save_step(*run.at(2), wait=True)
    assert index.stat().st_mtime_ns == mtime_ns
    assert json.loads(index.read_bytes())["step"] == 2
