"""What a run does when its loss, its data or its checkpoints are not as they should be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import SEQ_LEN, VOCAB_SIZE, sequence, write_shard, write_source

from open_lm.data.shard_format import ManifestEntry, write_manifest
from open_lm.errors import BrokenCheckpoint, CheckpointError, ConfigError, DataError
from open_lm.main import main

BATCH = 4


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Of a tiny model; data are given by the tests."""
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE}
    (tmp_path / "model.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    return [
        "--model", str(tmp_path / "model.json"), "--data-key", "npy", "--global-batch-size", str(BATCH),
        "--warmup", "2", "--precision", "fp32", "--log-every-n-steps", "1", "--lr", "3e-2", "--workers", "0",
        "--logs", str(tmp_path),
    ]  # fmt: skip


def tokens(steps: int) -> str:
    return str(steps * BATCH * SEQ_LEN)


def train(flags: list[str], data: str, steps: int, *more: str, epochs: int = 1) -> None:
    main([*flags, "--dataset-manifest", data, "--train-num-samples", tokens(steps), "--epochs", str(epochs), *more])


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "train/loss" in row]


def spiky_data(folder: Path, batches: int, bad: int) -> str:
    """One shard in stored order: the same sequence over and over, but for one batch of noise."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, VOCAB_SIZE, (BATCH, SEQ_LEN + 1))
    sequences = [noise[n % BATCH] if n // BATCH == bad else sequence(1, 2, 3) for n in range(batches * BATCH)]
    return write_shard(folder / "00000.tar", sequences)


def spike_flags(flags: list[str], data: str, steps: int) -> list[str]:
    more = ["--train-data", data, "--disable-buffer", "--train-num-samples", tokens(steps), "--epochs", "1"]
    return [*flags, *more, "--save-every-n-steps", "20", "--report-to", "tensorboard"]


def test_a_spike_is_skipped(flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = spiky_data(tmp_path / "data", 60, bad=44)
    main([*spike_flags(flags, data, 50), "--name", "run", "--skip-loss-spikes", "6"])
    assert "step 44 is a spike and was skipped" in caplog.text
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(1, 51))
    assert log[-1]["train/spikes"] == 1 and log[45]["train/loss"] < 0.5


def test_a_run_goes_back_before_a_spike_and_passes_over_its_data(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = spiky_data(tmp_path / "data", 60, bad=44)
    main([*spike_flags(flags, data, 50), "--name", "run", "--rollback-loss-spikes", "6"])
    assert "the loss spiked at step 45: back to the state of step 40; the 5 batches between" in caplog.text
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(1, 51)), "each step once, the later one"
    assert all(row["train/loss"] < 0.5 for row in log[40:])
    index = json.loads((tmp_path / "run/checkpoints/step_00000050/checkpoint.json").read_bytes())
    progress = index["extra"]["progress"]
    assert progress["samples_seen"] == 50 * BATCH
    assert progress["data_state"]["sources"][0]["samples"] == 55 * BATCH


def test_without_a_checkpoint_a_spike_is_only_skipped(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = spiky_data(tmp_path / "data", 60, bad=44)
    main([*spike_flags(flags, data, 50), "--name", "run", "--rollback-loss-spikes", "6", "--save-every-n-steps", "0"])
    assert "no state to go to" in caplog.text
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 51))


# --- checkpoints -----------------------------------------------------------------------------------------------------
def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_broken_checkpoint_is_stepped_over(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 10, "--name", "whole", "--save-every-n-steps", "4")
    expected = rows(tmp_path / "whole")
    train(flags, data, 10, "--name", "run", "--save-every-n-steps", "4", "--checkpoint-format", "sharded")
    folder = tmp_path / "run/checkpoints"
    assert {path.name for path in folder.glob("step_*")} == {"step_00000008", "step_00000010"}
    flip(next(folder.glob("step_00000010/*.bin")))
    caplog.clear()
    train(flags, data, 10, "--name", "run", "--resume", "latest")
    assert "step_00000010 is stepped over" in caplog.text
    found = rows(tmp_path / "run")
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["step"], ours["train/loss"]) == (theirs["step"], theirs["train/loss"])
    for path in folder.glob("step_*/*.bin"):
        flip(path)
    for path in folder.glob("*.pt"):
        path.unlink()
    with pytest.raises(BrokenCheckpoint, match=r"step_00000008.*\.bin"):
        train(flags, data, 10, "--name", "run", "--resume", "latest")


def test_another_batch_counts_steps_differently(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 6, "--name", "run")
    with pytest.raises(CheckpointError, match=r"4 sequences a step, this run has 8.*--global-batch-size 4"):
        train(flags, data, 12, "--name", "run", "--resume", "latest", "--global-batch-size", "8")


def test_both_forms_and_places_go_on_alike(flags: list[str], tmp_path: Path, s3_bucket: str) -> None:
    """From a bucket, from interchange files alone, from the latest file: the losses of an unbroken run."""
    data = write_source(tmp_path / "data", [40, 40])
    train(flags, data, 5, "--name", "whole", epochs=2)
    expected = [(row["step"], row["train/loss"]) for row in rows(tmp_path / "whole")]
    ways = {
        "bucket": ["--checkpoint-dir", f"s3://{s3_bucket}/all"],
        "files": ["--checkpoint-format", "interchange"],
        "latest": ["--checkpoint-format", "interchange", "--save-frequency", "0", "--save-most-recent"],
    }
    for name, way in ways.items():
        # The schedule of the whole run, ended after its first epoch.
        first = [*way, "--name", name, "--lr-scheduler", "const"]
        train(flags, data, 5, *first, epochs=1)
        train(flags, data, 5, *first, "--resume", "latest", epochs=2)
        assert [step for step, _ in expected] == [row["step"] for row in rows(tmp_path / name)], name
    train(flags, data, 5, "--name", "const", "--lr-scheduler", "const", epochs=2)
    constant = [row["train/loss"] for row in rows(tmp_path / "const")]
    for name in ways:
        assert [row["train/loss"] for row in rows(tmp_path / name)] == constant, name
    assert not list((tmp_path / "bucket").rglob("*.bin"))


# --- data ------------------------------------------------------------------------------------------------------------
def test_changed_data_are_refused_with_what_changed(
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
    going_on = ["--name", "run", "--resume", "latest", "--lr-scheduler", "const"]
    with pytest.raises(DataError, match=r"not that of the checkpoint(.|\n)*1 shard is new: 00003"):
        train(flags, data, 4, *going_on, epochs=2)
    train(flags, data, 4, *going_on, "--allow-changed-data", epochs=2)
    assert "starts at its beginning" in caplog.text
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9))


def test_documents_need_the_id_that_ends_them(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40])
    with pytest.raises(ConfigError, match="--end-of-text-id"):
        train(flags, data, 4, "--name", "run", "--document-mask")
    (tmp_path / "data/dataset.json").write_text(json.dumps({"settings": {"eot_id": 4}, "inputs": []}))
    validation = ["--val-data", str(tmp_path / "data/00000.tar")]
    train(flags, data, 4, "--name", "masked", "--document-mask", *validation)
    train(flags, data, 4, "--name", "given", "--document-mask", "--end-of-text-id", "4", *validation)
    train(flags, data, 4, "--name", "plain", *validation)
    losses = {name: [row["train/loss"] for row in rows(tmp_path / name)] for name in ("masked", "given", "plain")}
    assert losses["masked"] == losses["given"] != losses["plain"]
    results = [(tmp_path / name / "checkpoints/results.jsonl").read_text() for name in ("masked", "plain")]
    assert json.loads(results[0])[0]["loss"] != json.loads(results[1])[0]["loss"]


def test_what_was_validated_after_the_state_is_validated_again(flags: list[str], tmp_path: Path) -> None:
    data = write_source(tmp_path / "data", [40, 40])
    more = ["--name", "run", "--val-data", str(tmp_path / "data/00000.tar"), "--lr-scheduler", "const"]
    train(flags, data, 4, *more)
    results = tmp_path / "run/checkpoints/results.jsonl"
    later = json.loads(results.read_text())
    later[0]["train_tokens"] = 2 * int(tokens(4))
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(later) + "\n")  # as a run leaves it that is killed before its checkpoint is complete
    train(flags, data, 4, *more, "--resume", "latest", epochs=2)
    found = [json.loads(line)[0]["train_tokens"] for line in results.read_text().splitlines()]
    assert found == [int(tokens(4)), 2 * int(tokens(4))]


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
