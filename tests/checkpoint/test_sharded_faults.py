"""Test background saves of sharded checkpoints, saves to S3, and broken files."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_proxy import FaultyProxy, Rule
from sharded_helpers import assert_equal, build, flip_bit, full_state, save, train, trained
from torch import nn

from open_lm import storage
from open_lm.checkpoint import staging, tensor_index, tensor_store
from open_lm.checkpoint.folders import step_folder
from open_lm.checkpoint.sharded import (
    ShardedWriter,
    StoredTensors,
    TrainingState,
    incomplete_reason,
    load,
    load_weights,
)
from open_lm.checkpoint.tensor_index import Index
from open_lm.errors import BrokenCheckpoint, CheckpointError, StorageError
from open_lm.storage import retries as storage_errors

HELPERS = Path(__file__).parents[1] / "helpers"


# ---------------------------------------------------------------------------------------------- background saves
@contextlib.contextmanager
def paused_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Block background writes until the yielded function is called or the block ends."""
    resumed, write = threading.Event(), storage.atomic_write

    def wait_and_write(*args: Any) -> Any:
        assert resumed.wait(60)
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "atomic_write", wait_and_write)
        try:
            yield resumed.set
        finally:
            resumed.set()


def test_changes_after_save_returns_are_not_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained()
    state.extra = {"list": [1]}
    expected, writer, reasons = full_state(state), ShardedWriter(), []
    with paused_writes(monkeypatch) as resume_writes:
        writer.save(
            state, str(tmp_path / "a"), 3, on_complete=lambda: reasons.append(incomplete_reason(str(tmp_path / "a")))
        )
        writer.check()
        train(state, range(3, 6))
        state.extra["list"].append(2)
        with torch.no_grad():
            for param in state.model.parameters():
                param.zero_()
        assert not (tmp_path / "a").exists() and reasons == []
        resume_writes()
        writer.save(state, str(tmp_path / "b"), 6, wait=True)  # waits for the previous save
    assert reasons == [None], "on_complete is called when the checkpoint is complete"
    loaded = build("single", 1)
    assert load(loaded, str(tmp_path / "a"))["list"] == [1]
    assert_equal(full_state(loaded), expected)
    assert load(loaded, str(tmp_path / "b"))["list"] == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert writer.last_write_s > 0 and writer.last_pause_s > 0


def test_check_wait_and_the_next_save_raise_the_error_of_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, writer = trained(), ShardedWriter()

    def fail() -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr(tensor_store, "checksum_of", lambda data: fail())
    for raise_error in (writer.wait, lambda: writer.save(state, str(tmp_path / "b"), 2)):
        writer.save(state, str(tmp_path / "a"), 1)
        with pytest.raises(StorageError, match=r"/a: the checkpoint could not be written \(RuntimeError: lost\)"):
            raise_error()
    writer.save(state, str(tmp_path / "a"), 1)
    writer._thread.join()
    with pytest.raises(StorageError, match="could not be written"):
        writer.check()
    writer.check()  # the error is raised only once
    assert os.listdir(tmp_path) == [], "partial files are removed"
    monkeypatch.undo()
    with pytest.raises(StorageError, match=r"/a: the checkpoint is complete, but .* failed .*\(RuntimeError: lost\)"):
        writer.save(state, str(tmp_path / "a"), 1, on_complete=fail, wait=True)
    assert incomplete_reason(str(tmp_path / "a")) is None, "the checkpoint stays complete"


def test_a_full_disk_names_the_file_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    state = trained()
    save(state, tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # larger files fail like on a full disk
    try:
        with pytest.raises(StorageError, match=r"b\.incomplete/rank_00000_000\.bin.*free disk space"):
            save(state, tmp_path / "b")
        with pytest.raises(StorageError, match=r"a/\w+_rank_00000_000\.bin.*free disk space"):
            save(state, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["a"] and incomplete_reason(str(tmp_path / "a")) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/c\.incomplete"):
        save(state, tmp_path / "file" / "c")


def test_an_earlier_attempt_and_an_earlier_checkpoint_of_the_step_are_replaced(tmp_path: Path) -> None:
    state = trained()
    save(state, tmp_path / "a", step=1)
    (tmp_path / "a.incomplete").mkdir()
    (tmp_path / "a.incomplete" / "rank_00007_000.bin").write_bytes(b"written by a killed process")
    save(state, tmp_path / "b", step=1)
    shutil.copytree(tmp_path / "b", tmp_path / "a.incomplete", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "a")
    for step in (2, 3):
        save(state, tmp_path / "a", step=step)
        assert sorted(os.listdir(tmp_path)) == ["a", "b"] and StoredTensors(str(tmp_path / "a")).step == step
        files = sorted(name[-18:] for name in os.listdir(tmp_path / "a"))
        assert files == ["checkpoint.json", "rank_00000_000.bin"]


@pytest.mark.processes
def test_killed_at_every_moment_of_a_save(tmp_path: Path) -> None:
    worker = HELPERS / "sharded_kill_worker.py"
    result = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)], check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parents[2])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    killed, _, blocked = result.stdout.partition(" times\n")
    assert int(killed.removeprefix("killed ")) > 20 and blocked == "blocked\n"


# ---------------------------------------------------------------------------------------------- S3
def test_saving_to_s3_replaces_an_older_checkpoint(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, state = f"s3://{s3_bucket}/run/{step_folder(3)}", trained()
    storage.write_bytes(f"{folder}/12345678_rank_00005_000.bin", b"of a killed run with more ranks")
    for _ in range(2):
        train(state, range(3, 4))
        save(state, folder)
        loaded = build("single", 1)
        load(loaded, folder)
        assert_equal(full_state(loaded), full_state(state))
        assert incomplete_reason(folder) is None
    files = storage.list_files(folder)
    assert sorted(url.rpartition("/")[2][-18:] for url in files) == ["checkpoint.json", "rank_00000_000.bin"]
    with monkeypatch.context() as patch:  # a save of the same step that fails at its end
        patch.setattr(tensor_store.TensorWriter, "finish", lambda *_: storage.read_bytes(f"{folder}/missing"))
        train(state, range(5, 6))
        with pytest.raises(StorageError, match="missing"):
            save(state, folder)
    assert storage.list_files(folder) == files
    load(build("single", 2), folder)
    storage.remove(f"{folder}/checkpoint.json")
    assert "no complete checkpoint" in str(incomplete_reason(folder))
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-here/a.*create it or correct the name"):
        save(state, "s3://no-such-bucket-here/a")


def test_s3_faults_are_retried(faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_errors, "_pause", lambda seconds: None)
    monkeypatch.setattr(staging, "CHUNK_BYTES", 100)
    monkeypatch.setattr(tensor_index, "CHUNK_BYTES", 500)  # so that there are many requests
    monkeypatch.setattr(tensor_store, "FILE_BYTES", 6000)
    for number, kind in enumerate(("503", "reset", "reset_after")):
        # Even if all faults hit the same request, there are fewer of them than attempts.
        faulty_s3.rules.append(Rule(kind, times=2, skip=4 * number))
    faulty_s3.rules.append(Rule("truncate", method="GET", path=r"\.bin", times=2, skip=1))
    folder, state = f"s3://{faulty_s3.bucket}/run/a", trained()
    save(state, folder)
    loaded = build("single", 1)
    load(loaded, folder)
    assert_equal(full_state(loaded), full_state(state))
    assert all(faulty_s3.injected[kind] for kind in ("503", "reset", "reset_after", "truncate"))


def test_a_failing_store_is_not_reported_as_a_broken_checkpoint(
    faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_errors, "_pause", lambda seconds: None)
    folder, state = f"s3://{faulty_s3.bucket}/run/a", trained()
    save(state, folder)
    faulty_s3.rules.append(Rule("reset", method="GET", path=r"\.bin"))
    with pytest.raises(StorageError, match=r"\.bin"):
        load(build("single", 1), folder)


# ---------------------------------------------------------------------------------------------- broken files
def test_a_flipped_bit_in_any_chunk_names_file_and_tensor(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    save(trained(), folder)
    stored, path = StoredTensors(str(folder)), folder / "rank_00000_000.bin"
    rng = random.Random(0)
    for name, tensor in stored._index.tensors.items():
        for chunk in tensor.chunks if stored.stored_name(name) == name else ():
            if chunk.length:
                position, bit = chunk.start + rng.randrange(chunk.length), rng.randrange(8)
                message = rf"rank_00000_000\.bin: checksum mismatch .* contain {name}: found"
                flip_bit(path, position, bit)
                with pytest.raises(BrokenCheckpoint, match=message):
                    stored.read(name)
                if name.startswith("model/layers.1"):
                    with pytest.raises(BrokenCheckpoint, match=message):
                        load_weights(build("single", 1).model, str(folder))
                flip_bit(path, position, bit)
    lengths = {chunk: chunk.length for tensor in stored._index.tensors.values() for chunk in tensor.chunks}
    assert sum(lengths.values()) == path.stat().st_size, "checksums cover all bytes"
    load(build("single", 1), str(folder))


def test_a_flipped_bit_anywhere_in_the_index_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    save(TrainingState(nn.Linear(2, 2)), folder)
    data = (folder / "checkpoint.json").read_bytes()
    Index.from_bytes(data, "url")
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        with pytest.raises(BrokenCheckpoint, match="url: truncated or changed"):
            Index.from_bytes(bytes(changed), "url")
    for length in range(0, len(data), 7):
        with pytest.raises(BrokenCheckpoint):
            Index.from_bytes(data[:length], "url")


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    save(trained(), folder)
    path, index = folder / "rank_00000_000.bin", folder / "checkpoint.json"
    assert incomplete_reason(str(folder)) is None
    os.truncate(path, path.stat().st_size - 1)
    assert "rank_00000_000.bin has" in str(incomplete_reason(str(folder)))
    with pytest.raises(BrokenCheckpoint, match=r"000\.bin: truncated.* contains model/embed.weight and .* more"):
        load(build("single", 1), str(folder))
    path.unlink()
    assert "rank_00000_000.bin is missing" in str(incomplete_reason(str(folder)))
    with pytest.raises(BrokenCheckpoint, match=r"rank_00000_000\.bin.*no such file"):
        load(build("single", 1), str(folder))
    os.truncate(index, 50)
    assert "truncated or changed" in str(incomplete_reason(str(folder)))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        StoredTensors(str(tmp_path / "missing"))


def test_a_newer_format_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_index, "FORMAT", 2)
    save(TrainingState(nn.Linear(2, 2)), tmp_path / "step")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="found format 2, expected 1; use a newer"):
        load_weights(nn.Linear(2, 2), str(tmp_path / "step"))
