"""The original's data functions, called with flat args objects."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, places, write_shard, write_source

import open_lm.data
from open_lm.data import get_data, get_wds_dataset, sample_chunk
from open_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.processes


def args_of(**options: object) -> Namespace:
    """Return the args that the original's trainer passes to its loaders; train_num_samples counts sequences."""
    defaults = {
        "train_data": None,
        "dataset_manifest": None,
        "val_data": None,
        "val_data_key": None,
        "val_num_samples": None,
        "train_num_samples": None,
        "train_data_mix_weights": None,
        "train_data_upsampling_factors": None,
        "dataset_type": "auto",
        "dataset_resampled": False,
        "disable_buffer": True,
        "data_key": "json",
        "ignore_parse_errors": False,
        "seq_len": SEQ_LEN,
        "vocab_size": VOCAB_SIZE,
        "per_gpu_batch_size": 5,
        "per_gpu_val_batch_size": 4,
        "world_size": 1,
        "rank": 0,
        "workers": 1,
        "seed": 42,
        "target_mask_left": None,
        "target_mask_individual": None,
        "squash_mask_left": False,
    }
    return Namespace(**{**defaults, **options})


def token_places(batches: object) -> list[tuple[int, ...]]:
    return [place for (tokens,) in batches for place in places(torch.LongTensor(tokens).numpy())]  # type: ignore[attr-defined]


def test_names_are_importable_and_importing_the_package_does_not_import_torch() -> None:
    for name in open_lm.data.__all__:
        assert callable(getattr(open_lm.data, name))
    code = "import sys, open_lm.data, open_lm.data.shard_format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'get_dataset'"):
        open_lm.data.get_dataset  # noqa: B018


@pytest.mark.parametrize(
    ("sequences", "batch_size", "workers", "expected"), [(40, 5, 1, 40), (33, 7, 2, 28), (150, 50, 0, 150)]
)
def test_training_epoch_without_repeats(
    tmp_path: Path, sequences: int, batch_size: int, workers: int, expected: int
) -> None:
    pattern = write_source(tmp_path, [50] * 3, kind="json", manifest=False)
    args = args_of(train_data=[pattern], train_num_samples=sequences, per_gpu_batch_size=batch_size, workers=workers)
    info = get_data(args)["train"]
    seen = token_places(info.dataloader)
    assert len(seen) == len(set(seen)) == expected
    assert (info.dataloader.num_samples, len(info.dataloader)) == (expected, expected // batch_size)
    assert token_places(info.dataloader) == seen
    assert get_wds_dataset(args, True, floor=False).dataloader.num_batches == -(-sequences // batch_size)


def test_epochs_follow_each_other(tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [30, 30], kind="json", manifest=False)
    args = args_of(train_data=[pattern], train_num_samples=20)
    epochs = [token_places(get_data(args, epoch=epoch)["train"].dataloader) for epoch in range(3)]
    assert len({place for epoch in epochs for place in epoch}) == 60
    info = get_data(args)["train"]
    for epoch in (2, 0):
        info.set_epoch(epoch)
        assert token_places(info.dataloader) == epochs[epoch]


def test_batches_feed_sample_chunk(tmp_path: Path) -> None:
    args = args_of(
        train_data=[write_source(tmp_path, [9], kind="json", manifest=False)],
        train_num_samples=9,
        target_mask_left=4,
    )
    (tokens,) = next(iter(get_data(args)["train"].dataloader))
    assert tokens.shape == (5, SEQ_LEN + 1)
    inputs, targets = sample_chunk(torch.LongTensor(tokens), args)
    assert inputs.shape == targets.shape == (5, SEQ_LEN)
    batch, _ = next(get_data(args)["train"].loader.batches(1))
    assert torch.equal(batch.inputs, inputs)
    assert torch.equal(batch.targets, targets)


def test_force_num_samples_sets_totals_and_weights(tmp_path: Path) -> None:
    patterns = [write_source(tmp_path / str(n), [40], n, "json", manifest=False) for n in range(2)]
    info = get_wds_dataset(args_of(train_data=patterns), True, data_key="json", force_num_samples=[30, 10])
    sources = [place[0] for place in token_places(info.dataloader)]
    assert (sources.count(0), sources.count(1)) == (30, 10)


def test_without_a_number_sizes_come_from_the_folder(tmp_path: Path) -> None:
    write_source(tmp_path / "sized", [6, 9], kind="json")
    info = get_data(args_of(train_data=[f"{tmp_path}/sized/{{00000..00001}}.tar"]))["train"]
    assert info.dataloader.num_samples == 15
    bare = write_source(tmp_path / "bare", [6, 9], kind="json", manifest=False)
    with pytest.raises(ConfigError, match="--train-num-samples"):
        get_data(args_of(train_data=[bare]))
    with pytest.raises(ConfigError, match="3 sequences is less than one global batch of 5"):
        get_data(args_of(train_data=[bare], train_num_samples=3))


def test_validation_sets_without_training(tmp_path: Path) -> None:
    short = write_shard(tmp_path / "short.tar", [torch.arange(n).numpy() for n in (9, 4, 9)], "txt")
    sets = [write_source(tmp_path / "a", [5, 4], kind="json.gz", manifest=False), short]
    data = get_data(args_of(val_data=sets, val_data_key=["json.gz", "txt"]), skip_train=True)
    assert data["train"] is None
    first, second = data["val_list"]
    assert token_places(first.dataloader) == [(0, s, m) for s, size in enumerate([5, 4]) for m in range(size)]
    assert [len(tokens) for (tokens,) in second["val"].dataloader] == [2]
    assert first.loader.val_data == [sets[0]]
    assert sum(batch.num_samples for batch in first.loader) == 9


def test_ranks_split_a_validation_set(tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [5, 6], kind="json", manifest=False)
    seen = []
    for rank in range(2):
        args = args_of(val_data=[pattern], world_size=2, rank=rank, per_gpu_val_batch_size=3)
        seen += token_places(get_data(args)["val_list"][0].dataloader)
    assert sorted(seen) == [(0, s, m) for s, size in enumerate([5, 6]) for m in range(size)]


def test_few_attributes_are_enough(tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [8], kind="json", manifest=False)
    args = Namespace(val_data=[pattern], seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, global_val_batch_size=4)
    assert len(token_places(get_data(args, skip_train=True)["val_list"][0].dataloader)) == 8
    assert get_data(Namespace(seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE)) == {}


def test_sequence_length_and_vocabulary_come_from_the_model(tmp_path: Path) -> None:
    pytest.importorskip("open_lm.model.transformer")
    path = write_shard(tmp_path / "a.tar", [torch.arange(17).numpy() % 16] * 4)
    args = Namespace(val_data=[path], model="open_lm_test_tiny", global_val_batch_size=4)
    (tokens,) = next(iter(get_data(args, skip_train=True)["val_list"][0].dataloader))
    assert tokens.shape == (4, 17)


def test_errors_are_clear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tar"):
        get_data(args_of(train_data=[f"{tmp_path}/none.tar"], train_num_samples=10))
    with pytest.raises(ConfigError, match="found 8, not divisible by the world size 3"):
        get_data(args_of(val_data=["x"], per_gpu_val_batch_size=None, global_val_batch_size=8, world_size=3))
    with pytest.raises(ConfigError, match="one validation set"):
        get_wds_dataset(args_of(val_data=["x", "y"]), is_train=False)
