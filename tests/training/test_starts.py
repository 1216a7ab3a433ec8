"""Starts of runs: from another run's state, after a failure, and from weights that cannot be evaluated."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import SEQ_LEN, write_source
from run_helpers import BATCH, before_step, tiny_flags, train, train_rows

from open_lm.checkpoint.files import read_file, write_file
from open_lm.errors import CheckpointError, ConfigError, DataError, StorageError
from open_lm.main import main


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return tiny_flags(tmp_path, logs=tmp_path / "runs")


# --- --load-pretrained-state -----------------------------------------------------------------------------------------
def test_load_pretrained_state_continues_on_other_data_with_another_seed(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(flags, write_source(tmp_path / "data", [40, 40]), 10, "--name", "first")
    checkpoint = str(tmp_path / "runs/first/checkpoints/step_00000010")
    # Enough for the 5 steps that follow, not for the 15 steps of both runs.
    other = write_source(tmp_path / "other", [12, 12])
    more = ("--name", "second", "--pretrained", checkpoint, "--load-pretrained-state", "--seed", "7")
    train(flags, other, 5, *more, epochs=3)
    found = train_rows(tmp_path / "runs/second")
    assert [row["step"] for row in found] == list(range(11, 16))
    rate = 0.5 * (1 + math.cos(math.pi * (10 - 2) / (15 - 2))) * 3e-2
    assert found[0]["train/lr"] == pytest.approx(rate), "the schedule of this run, at the checkpoint's step"
    assert (found[-1]["tokens"], found[-1]["train/tokens/other"]) == (15 * BATCH * SEQ_LEN, 5 * BATCH * SEQ_LEN)
    saved = read_file(tmp_path / "runs/second/checkpoints/epoch_3.pt")
    assert (saved["epoch"], saved["step"], saved["shard_shuffle_seed"]) == (3, 15, 7)
    message = next(record.message for record in caplog.records if "this run continues" in record.message)
    assert "from epoch 1, step 10" in message and f"{other} from its beginning (--seed was 0, now it is 7)" in message
    train(flags, other, 5, *more, "--resume", "latest", epochs=3)
    assert [row["step"] for row in train_rows(tmp_path / "runs/second")] == list(range(11, 16)), (
        "the same command restarts it"
    )


def test_load_pretrained_state_continues_unchanged_data_where_the_checkpoint_was(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 5, "--name", "whole", "--lr-scheduler", "const", epochs=2)
    train(flags, data, 5, "--name", "first", "--lr-scheduler", "const")
    checkpoint = str(tmp_path / "runs/first/checkpoints/epoch_1.pt")
    more = ("--lr-scheduler", "const", "--pretrained", checkpoint, "--load-pretrained-state")
    train(flags, data, 5, "--name", "second", *more, epochs=2)
    expected = [(row["step"], row["train/loss"]) for row in train_rows(tmp_path / "runs/whole")][5:]
    assert [(row["step"], row["train/loss"]) for row in train_rows(tmp_path / "runs/second")] == expected
    assert f"data: {data} from pass 1" in caplog.text


@pytest.mark.parametrize("way", ["--pretrained", "--resume"])
def test_a_start_without_steps_left_names_the_flags_to_raise(way: str, flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 5, "--name", "first")
    more = ["--name", "second", way, str(tmp_path / "runs/first/checkpoints/epoch_1.pt")]
    more += ["--load-pretrained-state"] if way == "--pretrained" else []
    with pytest.raises(
        ConfigError, match=r"at epoch 1, step 5, but .*1 epochs.* 5 steps.*raise --epochs to 2 or more$"
    ):
        train(flags, data, 5, *more)
    tokens = 3 * BATCH * SEQ_LEN
    with pytest.raises(ConfigError, match=rf"--epochs to 3 or more, or --train-num-samples to {tokens} or more$"):
        train(flags, data, 2, *more, epochs=2)
    train(flags, data, 3, *more, epochs=2)
    assert [row["step"] for row in train_rows(tmp_path / "runs/second")] == [6]


def test_load_pretrained_state_checks_that_the_data_suffice_for_the_remaining_steps(
    flags: list[str], tmp_path: Path
) -> None:
    train(flags, write_source(tmp_path / "data", [40, 40]), 5, "--name", "first")
    more = ("--pretrained", str(tmp_path / "runs/first"), "--load-pretrained-state", "--name", "second")
    with pytest.raises(DataError, match=r"has 16 sequences.*20 .* are needed"):
        train(flags, write_source(tmp_path / "other", [16]), 5, *more, epochs=2)


def test_load_pretrained_state_refuses_another_batch_size_without_advising_what_was_given(
    flags: list[str], tmp_path: Path
) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 5, "--name", "first")
    more = ("--pretrained", str(tmp_path / "runs/first"), "--load-pretrained-state", "--name", "second")
    with pytest.raises(CheckpointError, match=r"--global-batch-size 4, or .*: remove --load-pretrained-state"):
        train(flags, data, 5, *more, "--global-batch-size", "8", epochs=2)


# --- results ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "names"),
    [
        ((), ["step_00000005", "step_00000010"]),
        (("--checkpoint-format", "interchange"), ["epoch_1.pt", "epoch_2.pt"]),
        (("--save-frequency", "0"), [None, "step_00000010"]),
    ],
)
def test_results_name_the_checkpoint_of_the_evaluated_weights(
    more: tuple[str, ...], names: list[str | None], flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    more = ("--name", "run", "--val-data", str(tmp_path / "data/00000.tar"), *more)
    with monkeypatch.context() as patches:  # a run that is resumed from a checkpoint of step 3
        before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), patches)
        train(flags, data, 5, *more, epochs=2)
    train(flags, data, 5, *more, "--resume", "latest", epochs=2)
    checkpoints = tmp_path / "runs/run/checkpoints"
    found = [
        json.loads(line)[0]["checkpoint_path"] for line in (checkpoints / "results.jsonl").read_text().splitlines()
    ]
    assert found == [None if name is None else str(checkpoints / name) for name in names]
    assert (checkpoints / str(names[-1])).exists()


# --- weights that cannot be evaluated --------------------------------------------------------------------------------
def strict(line: str) -> Any:
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"found {name}"))


def test_weights_that_are_not_finite_are_an_error_of_the_evaluation(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 2, "--name", "first")
    content = read_file(tmp_path / "runs/first/checkpoints/epoch_1.pt")
    content["state_dict"]["norm.weight"][3] = torch.nan
    broken = str(tmp_path / "broken.pt")
    write_file(broken, content)
    with pytest.raises(CheckpointError, match=r"(?s)broken.pt.*the loss is nan.*1 of \d+ weights .* norm.weight"):
        main([*flags, "--val-data", str(tmp_path / "data/00000.tar"), "--pretrained", broken, "--name", "evaluated"])
    run = tmp_path / "runs/evaluated"
    (result,) = strict((run / "checkpoints/results.jsonl").read_text())
    assert result["loss"] is None and result["tokens"] > 0 and result["checkpoint_path"] == broken
    assert [strict(line)["val/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [None]


def test_average_that_the_checkpoint_lacks_is_not_evaluated(flags: list[str], tmp_path: Path) -> None:
    train(flags, write_source(tmp_path / "data", [40, 40]), 2, "--name", "first")
    evaluation = [*flags, "--val-data", str(tmp_path / "data/00000.tar"), "--averagers", "poly_8_1", "--name"]
    for number, name in enumerate(("epoch_1.pt", "step_00000002")):
        checkpoint = str(tmp_path / "runs/first/checkpoints" / name)
        with pytest.raises(CheckpointError, match=f"--averagers poly_8_1: {checkpoint} has no such average"):
            main([*evaluation, f"evaluated-{number}", "--pretrained", checkpoint])


@pytest.mark.parametrize("coefficients", [("0.5", "0.9"), ("nan", "0.5"), ("0.5", "0.48")])
def test_coefficients_that_do_not_add_up_to_one_are_refused(coefficients: tuple[str, str], flags: list[str]) -> None:
    average = ["--average", "a.pt", "b.pt", "--average-coefficients", *coefficients]
    with pytest.raises(ConfigError, match=r"--average-coefficients: .* add up to .*expected 1"):
        main([*flags, "--dataset-type", "synthetic", "--train-num-samples", "100", *average])


# --- failed starts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [["--name", "run"], []])
def test_a_start_that_fails_before_training_leaves_no_folder(name: list[str], flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    failures = {
        DataError: ["--val-data", str(tmp_path / "missing.tar")],
        CheckpointError: ["--pretrained", str(tmp_path / "missing.pt")],
        StorageError: ["--checkpoint-dir", "/proc/nowhere"],
    }
    for kind, more in failures.items():
        with pytest.raises(kind):
            train(flags, data, 2, *name, *more)
        assert not list((tmp_path / "runs").glob("*"))
    train(flags, data, 2, "--name", "run", "--report-to", "tensorboard")
    assert (tmp_path / "runs/run/checkpoints/epoch_1.pt").exists()


def test_a_failure_in_the_first_step_leaves_the_name_free(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/params.txt").write_text("by the user")
    copy = ["--remote-sync", str(tmp_path / "copy"), "--remote-sync-protocol", "fsspec"]
    more = ("--name", "run", "--copy-codebase", "--report-to", "tensorboard", *copy)

    def fail() -> None:
        raise MemoryError("as if the device had too little memory")

    with monkeypatch.context() as patches, pytest.raises(MemoryError):
        before_step(0, fail, patches)
        train(flags, data, 2, *more)
    assert [path.name for path in (tmp_path / "runs/run").iterdir()] == ["params.txt"], "existed before"
    with monkeypatch.context() as patches, pytest.raises(MemoryError):
        before_step(1, fail, patches)
        train(flags, data, 2, *more)
    with pytest.raises(ConfigError, match="already exists"):
        train(flags, data, 2, *more)
    log = (tmp_path / "runs/run/out.log").read_text()
    assert {"report.html", "environment.json"} <= {path.name for path in (tmp_path / "copy/run").iterdir()}
    assert "OutOfMemory: the memory of rank 0 is exhausted at step 1" in log and "as if the device had" in log


def test_a_folder_of_a_killed_start_is_reused(flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "runs/run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "out.log").write_text("2026-01-31,23:59:59 | INFO | Running with a single process.\n")
    (run / "params.txt").write_text("accum_freq: 1\n")
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 2, "--name", "run")
    assert [row["step"] for row in train_rows(run)] == [1, 2]


@pytest.mark.parametrize("file", ["checkpoints/epoch_1.pt", "checkpoints/results.jsonl", "metrics.jsonl", "out.log"])
def test_a_folder_with_results_is_not_reused(file: str, flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "runs/run" / file
    path.parent.mkdir(parents=True)
    path.write_text("2026-01-31,23:59:59 | INFO | Train Epoch: 0 [ 8/64 (12%)] Loss: 2.360\n")
    data = write_source(tmp_path / "data", [40, 40])
    with pytest.raises(ConfigError, match="already exists"):
        train(flags, data, 2, "--name", "run")
    assert path.exists()


# --- interrupts ------------------------------------------------------------------------------------------------------
def test_first_interrupt_saves_and_ends_the_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    with monkeypatch.context() as patches:
        before_step(2, lambda: os.kill(os.getpid(), signal.SIGINT), patches)
        train(flags, data, 5, "--name", "run")
    assert (tmp_path / "runs/run/checkpoints/step_00000003/checkpoint.json").exists()
    train(flags, data, 5, "--name", "run", "--resume", "latest")
    assert [row["step"] for row in train_rows(tmp_path / "runs/run")] == [1, 2, 3, 4, 5]
