"""Test when checkpoints are due, which ones are kept, and the functions for their folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_lm import storage
from open_lm.checkpoint.folders import (
    INCOMPLETE,
    INDEX,
    remove_folder,
    step_folder,
    step_folders,
    step_number,
    unfinished_folders,
)
from open_lm.config.checkpoint_policy import due_after_epoch, due_after_step, superseded
from open_lm.config.sections import CheckpointConfig


def test_due_steps() -> None:
    cfg = CheckpointConfig(save_every_n_steps=10, save_milestone_every=25)
    assert [step for step in range(1, 61) if due_after_step(cfg, step)] == [10, 20, 25, 30, 40, 50, 60]
    assert not any(due_after_step(CheckpointConfig(), step) for step in range(1, 100))


def test_due_epochs() -> None:
    every_third = CheckpointConfig(save_frequency=3)
    assert [epoch for epoch in range(1, 9) if due_after_epoch(every_third, epoch, epoch == 8)] == [3, 6, 8]
    only_last = CheckpointConfig(save_frequency=0)
    assert [epoch for epoch in range(1, 9) if due_after_epoch(only_last, epoch, epoch == 8)] == [8]


@pytest.mark.parametrize(
    ("flags", "steps", "newest", "removed"),
    [
        ({"keep_last": 2}, [10, 20, 30, 40], 40, [10, 20]),
        ({"keep_last": 2}, [10, 20, 30], 40, [10, 20]),
        ({"keep_last": 1, "save_milestone_every": 20}, [10, 20, 30, 40, 50], 50, [10, 30]),
        ({"keep_last": 2, "save_milestone_every": 20}, [20, 40, 60], 60, []),
        ({"keep_last": 0}, [10, 20, 30, 40], 40, []),
        ({"keep_last": 3, "delete_previous_checkpoint": True}, [10, 20, 30], 30, [10, 20]),
        ({"keep_last": 3}, [10, 20, 50, 60], 20, [50, 60]),  # the run rolled back from 60 to 10
        ({"keep_last": 3, "save_milestone_every": 50}, [10, 50, 60], 20, [60]),  # a milestone is kept for good
    ],
)
def test_superseded_steps(flags: dict[str, int], steps: list[int], newest: int, removed: list[int]) -> None:
    assert sorted(superseded(CheckpointConfig(**flags), steps, newest)) == removed


@given(st.sets(st.integers(1, 500)), st.integers(1, 500), st.integers(0, 4), st.integers(0, 50), st.booleans())
def test_the_newest_is_never_superseded(steps: set[int], newest: int, keep: int, milestone: int, delete: bool) -> None:
    cfg = CheckpointConfig(keep_last=keep, save_milestone_every=milestone, delete_previous_checkpoint=delete)
    removed = superseded(cfg, steps, newest)
    assert newest not in removed
    assert set(removed) <= steps
    remaining = {step for step in steps | {newest} if step not in removed}
    milestones = {step for step in steps if milestone and step % milestone == 0}
    assert max(remaining - milestones | {newest}) == newest
    assert milestones <= remaining
    assert not keep or delete or len(remaining) >= min(keep, sum(step <= newest for step in steps | {newest}))


def test_local_folders_are_listed_and_removed(tmp_path: Path) -> None:
    check_folders(str(tmp_path))


def test_folders_in_a_bucket_are_listed_and_removed(s3_bucket: str) -> None:
    check_folders(f"s3://{s3_bucket}/run/checkpoints")


def check_folders(root: str) -> None:
    assert step_folders(root) == {} and unfinished_folders(root) == []
    for name in (step_folder(5), step_folder(123456789), "step_7", step_folder(3) + INCOMPLETE, "stepping_2", "other"):
        storage.write_bytes(storage.join(root, name, "rank_00000.bin"), b"data")
    storage.write_bytes(storage.join(root, "epoch_1.pt"), b"data")
    for step in (5, 123456789):
        storage.write_bytes(storage.join(root, step_folder(step), INDEX), b"{}")
    folders = step_folders(root)
    assert list(folders) == [5, 7, 123456789]
    assert [step_number(url + "/") for url in folders.values()] == list(folders)
    unfinished = [storage.join(root, step_folder(3) + INCOMPLETE), storage.join(root, "step_7")]
    assert sorted(unfinished_folders(root)) == sorted(unfinished)
    for url in unfinished:
        remove_folder(url)
    remove_folder(storage.join(root, "missing"))
    assert unfinished_folders(root) == [] and list(step_folders(root)) == [5, 123456789]
    assert storage.exists(storage.join(root, "other", "rank_00000.bin"))
