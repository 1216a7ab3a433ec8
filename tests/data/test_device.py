"""Batches on the device: equal to the loader's, one ahead, each with its own state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, sequence, write_shard, write_source

from open_lm.config.sections import DataConfig
from open_lm.data.batch import Batch, TargetMask
from open_lm.data.device import DeviceBatch, on_device
from open_lm.data.loader import build_train_loader
from open_lm.data.masking import IGNORE_INDEX
from open_lm.data.shard_format import PAD_ID
from open_lm.errors import DataError

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def batch_of(rows: object, vocab_size: int = VOCAB_SIZE, dtype: object = np.uint16, **mask: object) -> Batch:
    """Return a batch whose sequences all hold data."""
    ids = torch.from_numpy(np.array(rows, dtype))  # type: ignore[call-overload]
    filled = torch.ones(len(ids), dtype=torch.bool)
    return Batch(ids, filled, len(ids), (len(ids),), 0, vocab_size, TargetMask(**mask))  # type: ignore[arg-type]


def moved(batch: Batch, device: torch.device) -> DeviceBatch:
    ((device_batch, _),) = on_device([(batch, None)], device)
    return device_batch


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if "device" in request.fixturenames and request.getfixturevalue("device").type == "cuda":
        pytest.importorskip("torch.cuda")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_every_stored_dtype_becomes_the_same_int64(device: torch.device, dtype: type) -> None:
    greatest = min(np.iinfo(dtype).max, 2**31 - 1)
    rows = [[0, 1, greatest, 2], [greatest, greatest - 1, 0, greatest]]
    device_batch = moved(batch_of(rows, greatest + 1, dtype), device)
    assert device_batch.inputs.device.type == device.type
    assert device_batch.inputs.dtype == device_batch.targets.dtype == torch.int64
    assert device_batch.inputs.is_contiguous() and device_batch.targets.is_contiguous()
    assert device_batch.inputs.tolist() == [row[:-1] for row in rows]
    assert device_batch.targets.tolist() == [row[1:] for row in rows]


@pytest.mark.parametrize("device", DEVICES)
def test_pads_and_filler_are_no_targets(device: torch.device) -> None:
    batch = batch_of([[5, 6, PAD_ID, PAD_ID], [0, 0, 0, 0]], dtype=np.int32)
    batch.filled[1] = False
    batch = Batch(batch.stored_ids, batch.filled, 1, (1,), 1, VOCAB_SIZE, TargetMask())
    device_batch = moved(batch, device)
    assert device_batch.inputs.tolist() == [[5, 6, VOCAB_SIZE - 1], [0, 0, 0]]
    assert device_batch.targets.tolist() == [[6, IGNORE_INDEX, IGNORE_INDEX], [IGNORE_INDEX] * 3]
    assert (device_batch.filled.tolist(), device_batch.num_samples, device_batch.per_source, device_batch.skipped) == (
        [True, False],
        1,
        (1,),
        1,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_masks_are_applied_on_the_device(device: torch.device) -> None:
    device_batch = moved(batch_of([[1, 2, 500, 3, 4, 501]], left=500, individual=501, squash=True), device)
    assert device_batch.inputs.tolist() == [[1, 2, 3, 4, 501]]
    assert device_batch.targets.tolist() == [[IGNORE_INDEX, 3, 4, IGNORE_INDEX, IGNORE_INDEX]]


@pytest.mark.processes
@pytest.mark.parametrize("device", DEVICES)
def test_device_batches_equal_those_of_the_loader(tmp_path: Path, device: torch.device) -> None:
    padded = sequence(0, 9, 0)
    padded[-2:] = PAD_ID
    write_source(tmp_path, [20, 20], manifest=False)
    write_shard(tmp_path / "00002.tar", [padded, sequence(0, 9, 1), sequence(0, 9, 2, 4), sequence(0, 9, 3, 30)])
    data = DataConfig(train_data=[str(tmp_path / "*.tar")], data_key="npy", workers=1)
    loaders = [build_train_loader(data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=4) for _ in range(2)]
    plain = list(loaders[0].batches(22))
    for (batch, state), (device_batch, its_state) in zip(plain, on_device(loaders[1].batches(22), device), strict=True):
        assert torch.equal(device_batch.inputs.cpu(), batch.inputs) and torch.equal(
            device_batch.targets.cpu(), batch.targets
        )
        assert torch.equal(device_batch.filled.cpu(), batch.filled)
        assert (device_batch.num_samples, device_batch.per_source, device_batch.skipped) == (
            batch.num_samples,
            batch.per_source,
            batch.skipped,
        )
        assert its_state == state
    assert {batch.stored_ids.dtype for batch, _ in plain} == {torch.uint16, torch.int32}


def test_the_state_belongs_to_the_batch_and_the_batch_ahead_is_not_lost(tmp_path: Path) -> None:
    data = DataConfig(dataset_manifest=[write_source(tmp_path, [30, 30])], data_key="npy", workers=0)
    options = {"seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE, "batch_size": 4}
    expected = [batch.inputs for batch, _ in build_train_loader(data, **options).batches(15)]  # type: ignore[arg-type]
    loader = build_train_loader(data, **options)  # type: ignore[arg-type]
    trained, steps = [], on_device(loader.batches(15), CPU)
    for _ in range(6):
        batch, state = next(steps)
        trained.append(batch.inputs)
    assert loader.state != state  # it is one batch further
    loader.rewind(state)
    trained += [batch.inputs for batch, _ in on_device(loader.batches(9), CPU)]
    assert all(torch.equal(a, b) for a, b in zip(trained, expected, strict=True))


def test_one_batch_is_loaded_ahead_and_an_error_comes_after_the_batches_before_it() -> None:
    loaded: list[int] = []

    def broken_after_three() -> Iterator[tuple[Batch, int]]:
        for number in range(3):
            loaded.append(number)
            yield batch_of([[number] * 4]), number
        raise DataError("the shard is broken")

    steps = on_device(broken_after_three(), CPU)
    assert loaded == []
    for number in range(3):
        batch, state = next(steps)
        assert (int(batch.inputs[0, 0]), state) == (number, number)
        assert len(loaded) == min(number + 2, 3)
    with pytest.raises(DataError, match="the shard is broken"):
        next(steps)
    assert list(on_device([], CPU)) == []
