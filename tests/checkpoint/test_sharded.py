"""Test sharded checkpoints: loading in any layout bit for bit, background saves, S3, and broken files."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from faulty_proxy import FaultyProxy, Rule
from sharded_helpers import assert_equal, build, full_state, on_ranks, train
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


def save(state: TrainingState, folder: Path | str, step: int = 3) -> ShardedWriter:
    writer = ShardedWriter()
    writer.save(state, str(folder), step, wait=True)
    return writer


def trained(seed: int = 0, steps: int = 3, **changes: Any) -> TrainingState:
    state = build("single", seed, **changes)
    train(state, range(steps))
    return state


# ---------------------------------------------------------------------------------------------- several ranks
def two_ranks(rank: int, folder: Path) -> None:
    """Load a checkpoint of one process with DDP and FSDP, train, and save with both."""
    expected = torch.load(folder / "single.pt")
    read: list[tuple[str, int]] = []
    read_chunks = tensor_store.read_chunks

    def record_chunks(folder: str, requests: Any) -> Any:
        read.extend((name, chunk.length) for name, _, chunk in requests)
        return read_chunks(folder, requests)

    tensor_store.read_chunks, staging.CHUNK_BYTES, staging._BLOCK_BYTES = record_chunks, 100, 512
    for kind in ("ddp", "fsdp"):
        state = build(kind, 50 + rank)
        assert load(state, str(folder / "single"))["saved_by"] == "single"
        assert_equal(full_state(state), expected)
        torch.testing.assert_close(train(state, range(3, 5)), torch.load(folder / "losses.pt"))
        state.extra = {"saved_by": f"rank {rank}"}
        torch.manual_seed(100 + rank)
        writer = save(state, folder / kind)
        drawn = torch.randn(3)
        saved = full_state(state)
        read.clear()
        load(state, str(folder / kind))
        assert torch.equal(torch.randn(3), drawn), "each rank's generator continues"
        if rank == 0:
            torch.save(saved, folder / f"{kind}.pt")
        index = StoredTensors(str(folder / kind))._index
        chunks = [chunk for name in saved if name not in index.aliases for chunk in index.tensors[name].chunks]
        total = sum(chunk.length for chunk in chunks)
        for number in range(2):
            rank_bytes = sum(chunk.length for chunk in chunks if chunk.file.startswith(f"rank_{number:05d}_"))
            assert 0.4 * total < rank_bytes < 0.6 * total, "each rank writes about half"
        assert writer.host_bytes < 0.6 * total + 40_000, "host memory for half, and for the generators (20 kB)"
        if kind == "fsdp":
            assert 0.4 * total < sum(length for name, length in read if name in saved) < 0.6 * total
    failing_ranks(rank, folder, state)


def failing_ranks(rank: int, folder: Path, state: TrainingState) -> None:
    """Check that an error of one rank is raised on all, keeps the previous checkpoint, and the next save works."""
    writer, write = ShardedWriter(), storage.atomic_write

    def broken(url: str, mode: str = "wb") -> Any:
        if rank == 1 and "rank_00001" in url:
            raise StorageError(f"{url}: no space left")
        return write(url, mode)

    storage.atomic_write = broken  # type: ignore[assignment]
    writer.save(state, str(folder / "failed"), 9)
    with pytest.raises(StorageError, match=r"failed\.incomplete/rank_00001_000\.bin: no space left"):
        writer.wait()
    storage.atomic_write = write
    assert not (folder / "failed").exists() and not (folder / "failed.incomplete").exists()
    assert incomplete_reason(str(folder / "fsdp")) is None
    called = []
    writer.save(state, str(folder / "failed"), 9, on_complete=lambda: called.append(rank), wait=True)
    assert called == ([0] if rank == 0 else [])
    dist.barrier()
    if rank == 0:
        flip(folder / "failed" / "rank_00001_000.bin", 10)
    dist.barrier()
    for load_broken in (lambda: load(state, str(folder / "failed")), lambda: load(state, str(folder / "missing"))):
        with pytest.raises(CheckpointError, match=r"rank_00001|no complete checkpoint"):
            load_broken()  # raises on every rank without a deadlock


def four_ranks(rank: int, folder: Path) -> None:
    """Load the checkpoints of two ranks with four, in other layouts."""
    for kind, before in (("hybrid", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")):
        state = build(kind, 70 + rank)
        torch.manual_seed(5)
        load(state, str(folder / before))
        expected = torch.randn(2, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.randn(2), expected), "generators of another world size are not restored"
        assert_equal(full_state(state), torch.load(folder / f"{before}.pt"))
        save(state, folder / f"{kind}4")
    stored = StoredTensors(str(folder / "hybrid4"))
    name = "model/layers.0.in_proj.weight"
    assert sorted(c.sizes for c in stored._index.tensors[name].chunks) == [(5, 6), (6, 6)], "each half is stored once"
    assert {c.file for c in stored._index.tensors[name].chunks} <= set(stored._index.files)
    assert len(stored._index.files) == 4


def test_one_process_to_two_ranks_to_four_and_back_bit_for_bit(tmp_path: Path) -> None:
    state = trained()
    state.extra = {"saved_by": "single"}
    save(state, tmp_path / "single")
    torch.save(full_state(state), tmp_path / "single.pt")
    torch.save(train(state, range(3, 5)), tmp_path / "losses.pt")
    on_ranks(two_ranks, tmp_path, 2)
    on_ranks(four_ranks, tmp_path, 4)
    for kind, before in (("hybrid4", "fsdp"), ("fsdp4", "ddp"), ("ddp4", "fsdp")):
        single = build("single", 9)
        load(single, str(tmp_path / kind))
        expected = torch.load(tmp_path / f"{before}.pt")
        assert_equal(full_state(single), expected)
        stored = StoredTensors(str(tmp_path / kind))
        assert stored.names("model/") == [f"model/{name}" for name in single.model.state_dict()], "the model's order"
        for name in expected:
            assert torch.equal(stored.read(name), expected[name])
    assert StoredTensors(str(tmp_path / "ddp")).extra["saved_by"] == "rank 0"


# ---------------------------------------------------------------------------------------------- one process
def test_random_generators_and_extra_are_restored(tmp_path: Path) -> None:
    state = trained()
    state.extra = {"progress": {"metrics": [np.float32(0.5)], "tuple": (1, 2)}, "lowest": float("-inf")}

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(1).item()]

    draw()  # after an odd number of normal draws, the generator has cached one for the next draw
    save(state, tmp_path / "step")
    expected = draw()
    extra = load(state, str(tmp_path / "step"))
    assert draw() == expected
    assert extra["progress"] == {"metrics": [0.5], "tuple": [1, 2]} and extra["lowest"] == float("-inf")
    assert extra["param_groups"][0]["params"][0] == "embed.weight"


def test_hyperparameters_are_kept_and_weights_can_be_loaded_separately(tmp_path: Path) -> None:
    state = trained()
    save(state, tmp_path / "trained")
    fresh = build("single", 4)
    fresh.optimizer.param_groups[0]["lr"] = 0.5
    save(fresh, tmp_path / "fresh")
    assert StoredTensors(str(tmp_path / "fresh")).names("optimizer/") == []

    load(fresh, str(tmp_path / "trained"))
    assert fresh.optimizer.param_groups[0]["lr"] == 0.5, "the run's flags apply"
    assert_equal(full_state(fresh), full_state(state))
    load(state, str(tmp_path / "fresh"))
    assert not state.optimizer.state, "no moments, as before the first step"

    weights = build("single", 8)
    before = full_state(weights)
    load_weights(weights.model, str(tmp_path / "trained"))
    after = full_state(weights)
    assert torch.equal(after["model/embed.weight"], full_state(fresh)["model/embed.weight"])
    assert_equal(*({n: v for n, v in s.items() if n.startswith("averager")} for s in (after, before)))


def test_loading_allocates_moments_without_an_optimizer_step(tmp_path: Path) -> None:
    save(trained(), tmp_path / "step")
    state = build("single", 1)
    state.optimizer = torch.optim.AdamW(state.model.parameters(), foreach=True)
    state.optimizer.step = None  # any call would fail
    load(state, str(tmp_path / "step"))
    assert all(values["step"].device.type == "cpu" and values["step"] == 3 for values in state.optimizer.state.values())


class Kinds(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        for kind in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int8", "uint8", "bool"):
            values = torch.randint(0, 100, (3, 5), generator=draw)
            self.register_buffer(f"of_{kind}", values.to(getattr(torch, kind)))
        self.register_buffer("scalar", torch.randn((), generator=draw))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("transposed", torch.randn(4, 3, generator=draw).T)  # not contiguous
        self.register_buffer("odd", torch.randint(0, 99, (3,), dtype=torch.uint8, generator=draw))
        self.register_buffer("nan", torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float64))


def test_every_dtype_scalars_empty_and_transposed_tensors(tmp_path: Path) -> None:
    model, target = Kinds(0), Kinds(1)
    save(TrainingState(model), tmp_path / "step")
    load_weights(target, str(tmp_path / "step"))
    stored = StoredTensors(str(tmp_path / "step"))
    for name, value in model.state_dict().items():
        for loaded in (target.state_dict()[name], stored.read(f"model/{name}")):
            assert loaded.dtype == value.dtype and loaded.shape == value.shape
            assert as_bytes(loaded) == as_bytes(value), name


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_large_tensors_are_split_into_chunks_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 100)
    monkeypatch.setattr(staging, "_BLOCK_BYTES", 256)
    monkeypatch.setattr(tensor_store, "FILE_BYTES", 1000)
    model = nn.Linear(7, 40)  # 28 bytes per row, so three rows per chunk
    writer = ShardedWriter()
    writer.save(TrainingState(model), str(tmp_path / "step"), 1, wait=True)
    host_bytes = writer.host_bytes
    writer.save(TrainingState(model), str(tmp_path / "step"), 1, wait=True)
    assert writer.host_bytes == host_bytes, "host memory is reused"
    stored = StoredTensors(str(tmp_path / "step"))
    assert [offsets for offsets, _ in stored.chunks("model/weight")] == [(row, 0) for row in range(0, 40, 3)]
    assert torch.equal(stored.read("model/weight"), model.weight)
    assert len(stored._index.files) > 2 and max(stored._index.files.values()) <= 6000
    other = nn.Linear(7, 40)
    load_weights(other, str(tmp_path / "step"))
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)


def test_tied_weights_are_stored_once_and_load_into_untied_models(tmp_path: Path) -> None:
    tied, untied = trained(), trained(tied=False)
    save(tied, tmp_path / "tied")
    save(untied, tmp_path / "untied")
    stored = StoredTensors(str(tmp_path / "tied"))
    assert stored.stored_name("model/output.weight") == "model/embed.weight"
    assert stored.shape("model/output.weight") == (7, 6) and stored.dtype("model/output.weight") == torch.float32
    load_weights(untied.model, str(tmp_path / "tied"))
    assert torch.equal(untied.model.output.weight, tied.model.embed.weight)
    assert torch.equal(untied.model.embed.weight, tied.model.embed.weight)


def test_all_mismatches_are_reported_before_anything_changes(tmp_path: Path) -> None:
    save(trained(layers=3), tmp_path / "deep")
    state = build("single", 1)
    before = full_state(state)
    with pytest.raises(CheckpointError, match=r"does not fit the model.*not in the model \(5\): layers.2.gain"):
        load(state, str(tmp_path / "deep"))
    assert_equal(full_state(state), before)
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint \(2\)"):
        save(TrainingState(nn.Linear(3, 2)), tmp_path / "linear")
        load_weights(nn.Sequential(nn.Linear(3, 2)), str(tmp_path / "linear"))
    with pytest.raises(CheckpointError, match=r"weight: found \(2, 3\), the model has \(2, 4\)"):
        load_weights(nn.Linear(4, 2), str(tmp_path / "linear"))


def test_an_averager_missing_in_the_checkpoint_restarts_from_the_loaded_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = trained()
    averagers, state.averagers = state.averagers, None
    save(state, tmp_path / "step")
    other = trained(seed=5)
    load(other, str(tmp_path / "step"))
    average = other.averagers.avgs_dict["ema_0.5"]
    assert torch.equal(average.tensors()["embed.weight"], state.model.embed.weight) and average.step_counter == 1
    assert "no averager ema_0.5" in caplog.text and averagers is not None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_works_with_the_writer_and_reader(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    model, folder = nn.Linear(3, 5), str(tmp_path / "step")
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    writer = tensor_store.TensorWriter(folder, 7, {"a": 1})
    dcp.save(dict(model.state_dict()), storage_writer=writer, planner=planner)
    other = nn.Linear(3, 5)
    load_planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(dict(other.state_dict()), storage_reader=tensor_store.TensorReader(folder), planner=load_planner)
    assert torch.equal(other.weight, model.weight) and StoredTensors(folder).step == 7
    with pytest.raises(dcp.CheckpointException, match="only tensors"):
        dcp.save({"a": object()}, storage_writer=tensor_store.TensorWriter(folder, 8, {}), planner=planner)
    assert StoredTensors(folder).step == 7


def test_the_benchmark_reports_every_method() -> None:
    script = Path(__file__).parents[2] / "scripts" / "bench_checkpoint.py"
    command = [sys.executable, str(script), "--model", "open_lm_test_tiny", "--rounds", "1"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    ways = ("torch.save", "torch dcp.save", "torch dcp.async_save", "ours, synchronous", "ours, in the background")
    for way in ways:
        assert re.search(rf"^{way}.* pause .* s, written after .* MB/s.*, peak ", result.stdout, re.MULTILINE), way
    assert result.stdout.count("and loaded") == 2


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
def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


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
                flip(path, position, bit)
                with pytest.raises(BrokenCheckpoint, match=message):
                    stored.read(name)
                if name.startswith("model/layers.1"):
                    with pytest.raises(BrokenCheckpoint, match=message):
                        load_weights(build("single", 1).model, str(folder))
                flip(path, position, bit)
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
