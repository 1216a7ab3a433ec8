"""Runs with loss spikes, changed data, broken checkpoints or other settings."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import SEQ_LEN, VOCAB_SIZE, sequence, write_shard, write_source
from run_helpers import BATCH, before_step, tiny_flags, tokens, train, train_rows

from open_lm.checkpoint import manager
from open_lm.checkpoint.files import read_file
from open_lm.checkpoint.folders import step_folders
from open_lm.data.shard_format import ManifestEntry, write_manifest
from open_lm.errors import BrokenCheckpoint, CheckpointError, ConfigError, DataError, StorageError
from open_lm.main import main


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return tiny_flags(tmp_path, logs=tmp_path)


def spiky_data(folder: Path, batches: int, bad: int, has_manifest: bool = False) -> str:
    """Write a shard of equal sequences with one batch of noise.

    If a manifest has the size of the shard, a batch has a sequence of each quarter of it, else consecutive sequences.
    """
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, VOCAB_SIZE, (BATCH, SEQ_LEN + 1))
    batch_of = [n % batches if has_manifest else n // BATCH for n in range(batches * BATCH)]
    sequences = [noise[n % BATCH] if batch == bad else sequence(1, 2, 3) for n, batch in enumerate(batch_of)]
    return write_shard(folder / "00000.tar", sequences)


def spike_flags(flags: list[str], data: str, steps: int) -> list[str]:
    more = ["--train-data", data, "--disable-buffer", "--train-num-samples", tokens(steps), "--epochs", "1"]
    return [*flags, *more, "--save-every-n-steps", "20", "--report-to", "tensorboard"]


def test_loss_spike_is_skipped(flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = spiky_data(tmp_path / "data", 60, bad=44)
    main([*spike_flags(flags, data, 50), "--name", "run", "--skip-loss-spikes", "6"])
    assert "step 44 is a spike and was skipped" in caplog.text
    log = train_rows(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(1, 51))
    assert log[-1]["train/spikes"] == 1 and log[45]["train/loss"] < 0.5


def test_rollback_skips_the_data_before_the_spike(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = spiky_data(tmp_path / "data", 60, bad=44)
    main([*spike_flags(flags, data, 50), "--name", "run", "--rollback-loss-spikes", "6"])
    assert "loss spike at step 45: rolled back to the state of step 40; the 5 batches since" in caplog.text
    log = train_rows(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(1, 51)), "each step once, after the rollback"
    assert all(row["train/loss"] < 0.5 for row in log[40:])
    index = json.loads((tmp_path / "run/checkpoints/step_00000050/checkpoint.json").read_bytes())
    progress = index["extra"]["progress"]
    assert progress["samples_seen"] == 50 * BATCH
    assert progress["data_state"]["sources"][0]["samples"] == 55 * BATCH


def test_rollback_across_an_epoch_end_validates_it_once(flags: list[str], tmp_path: Path) -> None:
    data = spiky_data(tmp_path / "data", 80, bad=44)
    more = ["--epochs", "3", "--save-frequency", "0", "--val-data", data, "--val-num-samples", tokens(1)]
    main([*spike_flags(flags, data, 21), "--name", "run", "--rollback-loss-spikes", "6", *more])
    lines = (tmp_path / "run/checkpoints/results.jsonl").read_text().splitlines()
    assert [json.loads(line)[0]["train_tokens"] for line in lines] == [int(tokens(n)) for n in (21, 42, 63)]


def test_spike_without_a_checkpoint_is_only_skipped(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = spiky_data(tmp_path / "data", 60, bad=44)
    main([*spike_flags(flags, data, 50), "--name", "run", "--rollback-loss-spikes", "6", "--save-every-n-steps", "0"])
    assert "no checkpoint to go back to" in caplog.text
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 51))


def test_no_rollback_if_the_data_do_not_suffice(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spiky_data(tmp_path / "data", 52, bad=44, has_manifest=True)
    manifest = str(tmp_path / "data/manifest.jsonl")
    write_manifest(manifest, [ManifestEntry("00000", 52 * BATCH)])
    more = ("--name", "run", "--disable-buffer", "--save-every-n-steps", "20", "--rollback-loss-spikes", "6")
    train(flags, manifest, 50, *more)
    assert "without going back to step 40, because the remaining data" in caplog.text
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 51))
    assert "epoch_1.pt" in epoch_files(tmp_path / "run")


# --- checkpoints -----------------------------------------------------------------------------------------------------
def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_broken_checkpoint_is_skipped(flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 10, "--name", "uninterrupted", "--save-every-n-steps", "4")
    expected = train_rows(tmp_path / "uninterrupted")
    train(flags, data, 10, "--name", "run", "--save-every-n-steps", "4", "--checkpoint-format", "sharded")
    folder = tmp_path / "run/checkpoints"
    assert {path.name for path in folder.glob("step_*")} == {"step_00000008", "step_00000010"}
    flip(next(folder.glob("step_00000010/*.bin")))
    caplog.clear()
    train(flags, data, 10, "--name", "run", "--resume", "latest")
    assert "step_00000010" in caplog.text
    found = train_rows(tmp_path / "run")
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["step"], ours["train/loss"]) == (theirs["step"], theirs["train/loss"])
    for path in folder.glob("step_*/*.bin"):
        flip(path)
    for path in folder.glob("*.pt"):
        path.unlink()
    with pytest.raises(BrokenCheckpoint, match=r"step_00000008.*\.bin"):
        train(flags, data, 10, "--name", "run", "--resume", "latest")


def test_resuming_with_another_batch_size_is_refused(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 6, "--name", "run")
    with pytest.raises(CheckpointError, match=r"4 sequences per step, this run has 8.*--global-batch-size 4"):
        train(flags, data, 12, "--name", "run", "--resume", "latest", "--global-batch-size", "8")


def test_all_checkpoint_formats_and_locations_resume_alike(flags: list[str], tmp_path: Path, s3_bucket: str) -> None:
    """From a bucket, from interchange files only, and from the latest file: the losses of an uninterrupted run."""
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 5, "--name", "uninterrupted", epochs=2)
    expected = [(row["step"], row["train/loss"]) for row in train_rows(tmp_path / "uninterrupted")]
    ways = {
        "bucket": ["--checkpoint-dir", f"s3://{s3_bucket}/all"],
        "files": ["--checkpoint-format", "interchange"],
        "latest": ["--checkpoint-format", "interchange", "--save-frequency", "0", "--save-most-recent"],
    }
    for name, way in ways.items():
        # The schedule of the full run, stopped after its first epoch.
        first = [*way, "--name", name, "--lr-scheduler", "const"]
        train(flags, data, 5, *first, epochs=1)
        train(flags, data, 5, *first, "--resume", "latest", epochs=2)
        assert [step for step, _ in expected] == [row["step"] for row in train_rows(tmp_path / name)], name
    train(flags, data, 5, "--name", "const", "--lr-scheduler", "const", epochs=2)
    constant = [row["train/loss"] for row in train_rows(tmp_path / "const")]
    for name in ways:
        assert [row["train/loss"] for row in train_rows(tmp_path / name)] == constant, name
    assert not list((tmp_path / "bucket").rglob("*.bin"))


# --- data ------------------------------------------------------------------------------------------------------------
def test_changed_data_are_refused_with_a_list_of_changes(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_source(tmp_path / "data", [40, 40, 40])
    lines = [{"sha256": digest * 64} for digest in "abc"]
    manifest = tmp_path / "data/manifest.jsonl"

    def describe(digests: list[dict[str, Any]]) -> None:
        write_manifest(manifest, [ManifestEntry(f"{n:05d}", 40, extra) for n, extra in enumerate(digests)])

    describe([{} for _ in lines])
    train(flags, data, 4, "--name", "run")
    assert json.loads((tmp_path / "run/data.json").read_text())["sources"][0]["shards"][1]["shard"] == "00001"
    write_shard(tmp_path / "data/00003.tar", [sequence(0, 3, member) for member in range(12)])
    write_manifest(manifest, [ManifestEntry(f"{n:05d}", size) for n, size in enumerate([40, 40, 40, 12])])
    resumed = ["--name", "run", "--resume", "latest", "--lr-scheduler", "const"]
    with pytest.raises(DataError, match=r"differs from that of the checkpoint(.|\n)*1 shard is new: 00003"):
        train(flags, data, 4, *resumed, epochs=2)
    train(flags, data, 4, *resumed, "--allow-changed-data", epochs=2)
    assert "starts from the beginning" in caplog.text
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 9))


def test_document_mask_needs_the_end_of_text_id(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40])
    with pytest.raises(ConfigError, match="--end-of-text-id"):
        train(flags, data, 4, "--name", "run", "--document-mask")
    (tmp_path / "data/dataset.json").write_text(json.dumps({"settings": {"eot_id": 4}, "inputs": []}))
    validation = ["--val-data", str(tmp_path / "data/00000.tar")]
    train(flags, data, 4, "--name", "masked", "--document-mask", *validation)
    train(flags, data, 4, "--name", "given", "--document-mask", "--end-of-text-id", "4", *validation)
    train(flags, data, 4, "--name", "plain", *validation)
    losses = {name: [row["train/loss"] for row in train_rows(tmp_path / name)] for name in ("masked", "given", "plain")}
    assert losses["masked"] == losses["given"] != losses["plain"]
    results = [(tmp_path / name / "checkpoints/results.jsonl").read_text() for name in ("masked", "plain")]
    assert json.loads(results[0])[0]["loss"] != json.loads(results[1])[0]["loss"]


@pytest.mark.parametrize("role", ["training", "validation"])
def test_a_vocabulary_smaller_than_that_of_dataset_json_is_an_error_at_the_start(
    flags: list[str], tmp_path: Path, role: str
) -> None:
    data, large = write_source(tmp_path / "data", [40]), write_source(tmp_path / "large", [40])
    dataset = tmp_path / "large" / "dataset.json"
    dataset.write_text(json.dumps({"settings": {"vocab_size": VOCAB_SIZE}, "inputs": []}))
    more = ["--val-data", str(tmp_path / "large" / "00000.tar")] if role == "validation" else []
    source = data if role == "validation" else large
    train(flags, source, 2, "--name", "equal", *more)
    dataset.write_text(json.dumps({"settings": {"vocab_size": VOCAB_SIZE + 1}, "inputs": []}))
    with pytest.raises(DataError, match=rf"has {VOCAB_SIZE} ids(.|\n)*large/.*vocab_size {VOCAB_SIZE + 1}"):
        train(flags, source, 2, "--name", "larger", *more)
    assert not (tmp_path / "larger").exists()


def test_validations_after_the_restored_state_are_repeated(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    more = ["--name", "run", "--val-data", str(tmp_path / "data/00000.tar"), "--lr-scheduler", "const"]
    train(flags, data, 4, *more)
    results = tmp_path / "run/checkpoints/results.jsonl"
    later = json.loads(results.read_text())
    later[0]["train_tokens"] = 2 * int(tokens(4))
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(later) + "\n")  # as if the run was killed before its checkpoint was complete
    train(flags, data, 4, *more, "--resume", "latest", epochs=2)
    found = [json.loads(line)[0]["train_tokens"] for line in results.read_text().splitlines()]
    assert found == [int(tokens(4)), 2 * int(tokens(4))]


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


# --- badly timed stops ---------------------------------------------------------------------------------------------
def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def epoch_files(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob("epoch_*.pt")}


def test_signal_in_the_last_step_leaves_the_epoch_end_to_the_next_start(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    more = ("--name", "run", "--val-data", data, "--val-num-samples", str(4 * SEQ_LEN))
    with monkeypatch.context() as patches:
        before_step(7, stop, patches)
        train(flags, data, 4, *more, epochs=2)
    assert epoch_files(tmp_path / "run") == {"epoch_1.pt"}
    train(flags, data, 4, *more, "--resume", "latest", epochs=2)
    assert epoch_files(tmp_path / "run") == {"epoch_1.pt", "epoch_2.pt"}
    assert len((tmp_path / "run/checkpoints/results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("epoch", [1, 2])
def test_interchange_files_missing_after_a_kill_are_written_on_resume(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    original = manager.write_interchange

    def write(stored: Any, folder: str, name: str) -> str:
        if stored.extra["progress"]["epoch"] == epoch:
            raise RuntimeError("as if killed")
        return original(stored, folder, name)

    with monkeypatch.context() as patches, pytest.raises(StorageError, match="as if killed"):
        patches.setattr(manager, "write_interchange", write)
        train(flags, data, 4, "--name", "run", epochs=2)
    assert epoch_files(tmp_path / "run") == {f"epoch_{number}.pt" for number in range(1, epoch)}
    assert list(step_folders(str(tmp_path / "run/checkpoints"))) == [4, 8][:epoch]
    train(flags, data, 4, "--name", "run", "--resume", "latest", epochs=2)
    assert epoch_files(tmp_path / "run") == {"epoch_1.pt", "epoch_2.pt"}
    assert read_file(tmp_path / f"run/checkpoints/epoch_{epoch}.pt")["step"] == 4 * epoch
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 9))


def test_resuming_with_another_epoch_length_keeps_the_step(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 4, "--name", "run")
    train(flags, data, 6, "--name", "run", "--resume", "latest", epochs=2)
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 13))


def test_interchange_files_keep_all_counts(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    more = ("--name", "run", "--checkpoint-format", "interchange", "--log-every-n-steps", "100")
    with monkeypatch.context() as patches:
        before_step(2, stop, patches)
        train(flags, data, 8, *more)
    assert read_file(tmp_path / "run/checkpoints/epoch_latest.pt")["samples_seen"] == 3 * BATCH
    train(flags, data, 8, *more, "--resume", "latest")
    last = train_rows(tmp_path / "run")[-1]
    by_source = [value for name, value in last.items() if name.startswith("train/tokens/")]
    assert (last["tokens"], by_source) == (8 * BATCH * SEQ_LEN, [8 * BATCH * SEQ_LEN])


def test_stop_logs_what_is_saved_and_an_evaluation_stops_immediately(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_source(tmp_path / "data", [40])
    train(flags, data, 2, "--name", "run")
    with monkeypatch.context() as patches:
        before_step(1, stop, patches)
        train(flags, data, 4, "--logs", "none")
    assert "nothing is saved" in caplog.text
    before, handlers = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(
        "open_lm.training.evaluations.validation.evaluate_sets",
        lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)) or [],
    )
    monkeypatch.setattr("open_lm.training.evaluations.validation.validation_metrics", lambda _: {})
    weights = str(tmp_path / "run/checkpoints/epoch_1.pt")
    main([*flags, "--val-data", data, "--pretrained", weights, "--name", "evaluation"])
    assert handlers == [before]


# --- changed settings -------------------------------------------------------------------------------------------------
@pytest.mark.processes
def test_changed_settings_are_logged(flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    more = ["--name", "run", "--lr-scheduler", "const"]
    train(flags, data, 4, *more)
    train(flags, data, 4, *more, "--resume", "latest", epochs=1)
    assert "continues with other settings" not in caplog.text
    train(flags, data, 4, *more, "--resume", "latest", "--lr", "1e-3", "--workers", "1", epochs=2)
    message = next(record.message for record in caplog.records if "continues with other settings" in record.message)
    assert "--lr was 0.03, now it is 0.001" in message and "--epochs was 1, now it is 2" in message
    assert "--workers" not in message


@pytest.mark.parametrize("has_checkpoint_dir", [False, True])
def test_changed_settings_are_logged_when_resuming_from_interchange_files(
    has_checkpoint_dir: bool, flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    more = ["--name", "run", "--lr-scheduler", "const", "--checkpoint-format", "interchange"]
    more += ["--checkpoint-dir", str(tmp_path / "elsewhere")] if has_checkpoint_dir else []
    train(flags, data, 4, *more)
    train(flags, data, 4, *more, "--resume", "latest")
    assert "continues with other settings" not in caplog.text
    train(flags, data, 4, *more, "--resume", "latest", "--lr", "1e-3", "--grad-clip-norm", "0.5", epochs=2)
    message = next(record.message for record in caplog.records if "continues with other settings" in record.message)
    assert "--lr was 0.03, now it is 0.001" in message and "--grad-clip-norm was" in message


def test_interchange_file_records_its_batch_size(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 6, "--name", "run", "--checkpoint-format", "interchange")
    with pytest.raises(CheckpointError, match=r"4 sequences per step, this run has 8"):
        train(flags, data, 12, "--name", "run", "--resume", "latest", "--global-batch-size", "8")


def test_forgotten_checkpoint_dir_is_an_error(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 4, "--name", "run", "--checkpoint-dir", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"started with --checkpoint-dir .*elsewhere, but now it is None"):
        train(flags, data, 4, "--name", "run", "--resume", "latest")
