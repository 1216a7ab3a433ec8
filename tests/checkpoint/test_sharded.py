"""Test that sharded checkpoints load in any layout bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_processes import on_ranks
from sharded_helpers import assert_equal, build, flip_bit, full_state, save, train, trained
from torch import nn

from open_lm import storage
from open_lm.checkpoint import staging, tensor_store
from open_lm.checkpoint.sharded import (
    ShardedWriter,
    StoredTensors,
    TrainingState,
    incomplete_reason,
    load,
    load_weights,
)
from open_lm.errors import CheckpointError, StorageError


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
        flip_bit(folder / "failed" / "rank_00001_000.bin", 10)
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


@pytest.mark.processes
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
    assert extra["progress"] == {"metrics": [0.5], "tuple": [1, 2]}
    assert extra["lowest"] is None, "strict JSON has no infinity"
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
