"""Test that interchange files written from sharded checkpoints equal those of torch.save, but need little memory."""

from __future__ import annotations

import argparse
import os
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import Net, build, train
from faulty_proxy import FaultyProxy, Rule
from torch import Tensor

from open_lm import storage
from open_lm.checkpoint.archive import LazyTensor, write_archive
from open_lm.checkpoint.files import read_file, read_model_state
from open_lm.checkpoint.interchange import (
    load_average,
    load_averagers,
    load_optimizer,
    load_rng,
    load_weights,
    write_interchange,
    write_latest,
)
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.sharded import ShardedWriter, StoredTensors, TrainingState
from open_lm.checkpoint.tensor_index import read_index
from open_lm.distributed.rng import rng_state
from open_lm.errors import BrokenCheckpoint, CheckpointError, StorageError
from open_lm.optim.averaging import ModelAverager
from open_lm.utils import convert_checkpoint

PROGRESS = Progress(
    epoch=2, step=3, samples_seen=12, seed=3, evaluation_metrics=[{"loss": 2.5}], is_final=True,
    percentage_of_data_seen=1.0, next_shard_per_source=[4], train_data_string=["x/{1,2}.tar"], data_state={"at": [12]},
)  # fmt: skip


def trained(dtype: torch.dtype = torch.float32) -> TrainingState:
    """Return a state with all kinds of objects after three steps."""
    model, _ = build(0)
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    averagers = ModelAverager(model, "poly_8_1,ema_0.5_2")
    train(model, optimizer, range(3))
    averagers.step()
    extra = {"progress": PROGRESS.to_json(), "name": "run"}
    return TrainingState(model, optimizer, torch.amp.GradScaler("cpu"), averagers, extra)


def stored(state: TrainingState, folder: str | Path) -> StoredTensors:
    ShardedWriter().save(state, str(folder), 3, wait=True)
    return StoredTensors(str(folder))


def expected_files(state: TrainingState) -> dict[str, dict[str, Any]]:
    """Return the expected content of each file, built from the live objects."""
    assert state.optimizer is not None and state.averagers is not None
    names = [name for name, _ in state.model.named_parameters()]
    numbered = state.optimizer.state_dict()
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in numbered["param_groups"]]
    optimizer = {"state": {names[n]: moments for n, moments in numbered["state"].items()}, "param_groups": groups}
    common = {"epoch": 2, "name": "run", "evaluation_metrics": [{"loss": 2.5}]}
    shared = {"step": 3, "samples_seen": 12, "shard_shuffle_seed": 3, "next_shard_per_source": [4]}
    shared["data_state"] = {"at": [12]}
    return {
        "epoch_2.pt": {**common, **shared, "state_dict": dict(state.model.state_dict())},
        "optimizer_2.pt": {
            **common, "optimizer": optimizer, "scaler": state.scaler.state_dict(), "rng": [rng_state()],
        },
        "stats_2.pt": {
            **common, **shared, "is_final_checkpoint": True, "percentage_of_data_seen": 1.0,
            "train_data_string": ["x/{1,2}.tar"],
        },
        **{f"{name}_2.pt": averager.state_dict() for name, averager in state.averagers.avgs_dict.items()},
    }  # fmt: skip


def assert_same(actual: Any, expected: Any, path: str = "") -> None:
    """Check that types, values, tensor bits and the order of tensors in dicts are the same."""
    assert type(actual) is type(expected) or isinstance(expected, Tensor), (path, type(actual), type(expected))
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        tensors = [name for name, value in expected.items() if isinstance(value, Tensor)]
        assert [name for name in actual if name in tensors] == tensors, path
        for name, value in expected.items():
            assert_same(actual[name], value, f"{path}/{name}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), path
        for number, value in enumerate(expected):
            assert_same(actual[number], value, f"{path}/{number}")
    elif isinstance(expected, Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), path
        assert actual.stride() == torch.empty_like(actual).contiguous().stride(), path
        assert torch.equal(actual, expected), path
    else:
        assert actual == expected, path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_equal_those_of_torch_save(tmp_path: Path, dtype: torch.dtype) -> None:
    state = trained(dtype)
    expected = expected_files(state)
    path = write_interchange(stored(state, tmp_path / "step_3"), str(tmp_path / "files"), "run")
    assert path == str(tmp_path / "files" / "epoch_2.pt")
    assert sorted(os.listdir(tmp_path / "files")) == sorted(expected)
    for name, content in expected.items():
        for mmap in (True, False):
            assert_same(torch.load(tmp_path / "files" / name, weights_only=True, mmap=mmap), content, name)
    for name in ("epoch_2.pt", "poly_8_1_2.pt"):
        content = read_file(tmp_path / "files" / name)
        weights = content.get("state_dict") or content["av_model_sd"]
        assert weights["embed.weight"].data_ptr() == weights["output.weight"].data_ptr(), "tied weights are stored once"


def test_weights_only(tmp_path: Path) -> None:
    tensors = stored(TrainingState(Net(), extra={"progress": Progress(epoch=1, step=3).to_json()}), tmp_path / "step_3")
    write_interchange(tensors, str(tmp_path / "a"), "run")
    write_interchange(stored(trained(), tmp_path / "step_4"), str(tmp_path / "b"), "run", keep_optimizer=False)
    assert sorted(os.listdir(tmp_path / "a")) == ["epoch_1.pt", "stats_1.pt"]
    assert "optimizer_2.pt" not in os.listdir(tmp_path / "b")


# ---------------------------------------------------------------------------------------------- the format
def test_archives_are_valid_zip_files_that_can_be_memory_mapped(tmp_path: Path) -> None:
    with storage.atomic_write(str(tmp_path / "a.pt")) as file:
        write_archive(
            file, {"odd": lazy(torch.ones(3, dtype=torch.uint8)), "x": lazy(torch.rand(5, 7)), "é": [1, None]}
        )
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None, "all checksums are correct"
        assert {record.compress_type for record in archive.infolist()} == {zipfile.ZIP_STORED}
    content = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)
    start = content["x"].untyped_storage().data_ptr()
    assert (start % 64, content["é"]) == (0, [1, None])


def lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.split(2) if tensor.dim() else [tensor])


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (5, 3, 2)])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool]
)
def test_every_kind_of_tensor(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (torch.rand(shape) * 2).to(dtype)
    with storage.atomic_write(str(tmp_path / "a.pt")) as file:
        write_archive(file, lazy(tensor))
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (loaded.dtype, loaded.shape) == (dtype, tensor.shape) and torch.equal(loaded, tensor)


def test_incomplete_tensors_are_an_error(tmp_path: Path) -> None:
    incomplete = LazyTensor((6,), torch.float32, lambda: [torch.zeros(4)])
    error = pytest.raises(BrokenCheckpoint, match="found 16 bytes, expected 24")
    with error, storage.atomic_write(str(tmp_path / "a.pt")) as file:
        write_archive(file, {"x": incomplete})
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------- memory
class RowSharded(StoredTensors):
    """Twenty tensors of 1 MB in 100 chunks each; counts the bytes of the chunks that are in memory."""

    NUM_TENSORS, ROWS, COLUMNS, CHUNK_ROWS = 20, 1000, 250, 10

    def __init__(self) -> None:
        self.live_bytes = self.peak_bytes = 0
        self.extra = {"progress": PROGRESS.to_json()}

    def names(self, prefix: str = "") -> list[str]:
        return [f"model/{number}" for number in range(self.NUM_TENSORS) if prefix == "model/"]

    def stored_name(self, name: str) -> str:
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return self.ROWS, self.COLUMNS

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def chunks(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        for row in range(0, self.ROWS, self.CHUNK_ROWS):
            chunk = torch.full((self.CHUNK_ROWS, self.COLUMNS), float(row))
            self.live_bytes += chunk.nbytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(chunk, self._on_free, chunk.nbytes)
            yield (row, 0), chunk
            del chunk

    def _on_free(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def test_at_most_two_chunks_are_in_memory(tmp_path: Path) -> None:
    source = RowSharded()
    path = write_interchange(source, str(tmp_path), "run")
    assert os.path.getsize(path) > 20_000_000
    assert (source.peak_bytes, source.live_bytes) == (2 * 10_000, 0)
    rows = read_file(path)["state_dict"]["19"][:, 7]
    assert torch.equal(rows, torch.arange(0.0, 1000.0, 10.0).repeat_interleave(10))


class ColumnSharded(RowSharded):
    """Tensors sharded along the second dimension, whose chunks are not contiguous in the full tensor."""

    def chunks(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        for column in (0, 125):
            yield (0, column), torch.full((self.ROWS, 125), float(column))

    def read(self, name: str) -> Tensor:
        return torch.cat([chunk for _, chunk in self.chunks(name)], dim=1)


def test_column_sharded_tensors_are_assembled(tmp_path: Path) -> None:
    tensor = read_file(write_interchange(ColumnSharded(), str(tmp_path), "run"))["state_dict"]["0"]
    assert torch.equal(tensor, torch.tensor([0.0] * 125 + [125.0] * 125).expand(1000, 250))


# ---------------------------------------------------------------------------------------------- errors
def test_a_broken_chunk_leaves_no_file_that_looks_complete(tmp_path: Path) -> None:
    state = trained()
    tensors = stored(state, tmp_path / "step_3")
    path = write_interchange(tensors, str(tmp_path), "run")
    content = Path(path).read_bytes()
    chunk = read_index(tensors.folder).tensors["model/layers.1.out_proj.weight"].chunks[0]
    data = bytearray((tmp_path / "step_3" / chunk.file).read_bytes())
    data[chunk.start + 7] ^= 1
    (tmp_path / "step_3" / chunk.file).write_bytes(data)
    message = rf"epoch_2\.pt could not be written: .*{chunk.file}: checksum mismatch .*layers\.1\.out_proj\.weight"
    with pytest.raises(BrokenCheckpoint, match=message):
        write_interchange(tensors, str(tmp_path), "run")
    assert Path(path).read_bytes() == content, "the existing file does not change"
    with pytest.raises(BrokenCheckpoint):
        write_interchange(tensors, str(tmp_path / "new"), "run")
    assert "epoch_2.pt" not in os.listdir(tmp_path / "new")


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stored(trained(), tmp_path / "step_3")
    monkeypatch.setattr(zipfile._ZipWriteFile, "write", lambda self, data: fail())  # type: ignore[attr-defined]

    def fail() -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"optimizer_2\.pt.*No space left"):
        write_interchange(tensors, str(tmp_path / "new"), "run")
    assert os.listdir(tmp_path / "new") == []


def test_files_are_written_to_a_store_with_occasional_faults(tmp_path: Path, faulty_s3: FaultyProxy) -> None:
    state = trained()
    expected = expected_files(state)
    tensors = stored(state, tmp_path / "step_3")
    for kind in ("503", "reset", "reset_after"):
        faulty_s3.rules += [Rule(kind, method="PUT", times=1), Rule(kind, method="HEAD", times=1, skip=1)]
    path = write_interchange(tensors, f"s3://{faulty_s3.bucket}/run", "run")
    assert path == f"s3://{faulty_s3.bucket}/run/epoch_2.pt"
    assert set(faulty_s3.injected) == {"503", "reset", "reset_after"}
    for name, content in expected.items():
        assert_same(read_file(f"s3://{faulty_s3.bucket}/run/{name}"), content, name)


# ---------------------------------------------------------------------------------------------- loading
def test_epoch_latest_is_one_file_to_resume_from(tmp_path: Path) -> None:
    state = trained()
    path = write_latest(stored(state, tmp_path / "step_3"), str(tmp_path / "run"), "run")
    assert os.listdir(tmp_path / "run") == ["epoch_latest.pt"]
    expected = train(state.model, state.optimizer, range(3, 6))
    other, optimizer = build(1)
    averagers = ModelAverager(other, "ema_0.5_2")
    assert load_weights(path, other) == Progress(**{**vars(PROGRESS), "is_final": False, "percentage_of_data_seen": -1,
                                                    "train_data_string": None})  # fmt: skip
    assert load_optimizer(argparse.Namespace(resume=path), other, optimizer) and load_rng(path)
    load_averagers(path, averagers)
    assert averagers.avgs_dict["ema_0.5_2"].counters() == state.averagers.avgs_dict["ema_0.5_2"].counters()
    assert train(other, optimizer, range(3, 6)) == expected


def test_all_readers_of_weights_accept_sharded_folders(tmp_path: Path) -> None:
    state = trained()
    tensors = stored(state, tmp_path / "step_3")
    path = write_interchange(tensors, str(tmp_path), "run")
    models = [build(seed)[0] for seed in (1, 2, 3)]
    for model, source in zip(models, (tensors.folder, path, tensors.folder + "/"), strict=True):
        assert load_weights(source, model).step == 3
        assert_same(dict(model.state_dict()), dict(state.model.state_dict()))
    assert_same(read_model_state(tensors.folder)[0], read_model_state(path)[0])
    load_average([tensors.folder, path], None, models[0])
    assert_same(dict(models[0].state_dict()), dict(state.model.state_dict()))


def test_the_conversion_command_writes_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = stored(trained(), tmp_path / "step_3")
    write_interchange(tensors, str(tmp_path / "expected"), "run")
    path = convert_checkpoint.main([tensors.folder, "--output", str(tmp_path / "converted")])
    assert f"{path}: the model after 3 steps" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "converted")) == sorted(os.listdir(tmp_path / "expected"))
    for name in os.listdir(tmp_path / "converted"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    convert_checkpoint.main([tensors.folder, "--output", str(tmp_path / "weights"), "--weights-only"])
    assert "optimizer_2.pt" not in os.listdir(tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"expected: expected the step_N folder"):
        convert_checkpoint.main([str(tmp_path / "expected"), "--output", str(tmp_path / "x")])
    with pytest.raises(CheckpointError, match=r"step_9 cannot be converted: .*no complete checkpoint"):
        convert_checkpoint.main([str(tmp_path / "step_9"), "--output", str(tmp_path / "x")])
