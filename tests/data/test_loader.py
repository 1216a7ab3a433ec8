"""Batches: the same for any number of workers and ranks, resumable anywhere, with clear errors from workers."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
from itertools import chain
from pathlib import Path

import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, jsonable, places, sequence, write_shard, write_source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from open_lm import storage
from open_lm.config.sections import DataConfig, ValidationConfig
from open_lm.data.batch import Batch
from open_lm.data.loader import TrainLoader, build_pipeline, build_train_loader
from open_lm.data.masking import IGNORE_INDEX
from open_lm.data.shard_format import PAD_ID, ManifestEntry, write_manifest
from open_lm.data.validation_loader import ValLoader, build_val_loaders
from open_lm.errors import ConfigError, DataError, StorageError


def loader_of(data: object, batch_size: int = 4, **options: object) -> TrainLoader:
    return build_train_loader(data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=batch_size, **options)  # type: ignore[arg-type]


def val_loaders(data: DataConfig, batch_size: int = 4, **options: object) -> list[ValLoader]:
    ranks = {key: options.pop(key) for key in ("rank", "world_size") if key in options}
    validation = ValidationConfig(**options)  # type: ignore[arg-type]
    return build_val_loaders(
        validation,
        data,
        seq_len=SEQ_LEN,
        vocab_size=VOCAB_SIZE,
        batch_size=batch_size,
        **ranks,  # type: ignore[arg-type]
    )


def config(*sources: str, workers: int = 0, **options: object) -> DataConfig:
    name = "dataset_manifest" if sources[0].endswith(".jsonl") else "train_data"
    return DataConfig(**{name: list(sources)}, workers=workers, data_key="npy", **options)  # type: ignore[arg-type]


def places_of(batch: Batch) -> list[tuple[int, ...]]:
    return places(batch.inputs[batch.filled].numpy())


def same(first: Batch, second: Batch) -> bool:
    tensors = zip(
        (first.inputs, first.targets, first.filled), (second.inputs, second.targets, second.filled), strict=True
    )
    counts = [(b.num_samples, b.per_source, b.skipped) for b in (first, second)]
    return all(torch.equal(a, b) for a, b in tensors) and counts[0] == counts[1]


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Manifests of 40 and 17 sequences."""
    folder = tmp_path_factory.mktemp("sources")
    return [write_source(folder / "a", [10, 7, 11, 12], 0), write_source(folder / "b", [8, 9], 1)]


# --- content ---------------------------------------------------------------------------------------------------------
def test_a_batch_holds_shifted_sequences_of_the_data(two_sources: list[str]) -> None:
    batch, _ = next(loader_of(config(two_sources[0])).batches(1))
    assert batch.inputs.shape == batch.targets.shape == (4, SEQ_LEN)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous()
    for row, target in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        expected = sequence(*row[:3]).tolist()
        assert (row, target) == (expected[:-1], expected[1:])
    assert (batch.num_samples, batch.skipped, batch.per_source) == (4, 0, (4,))


def test_one_pass_trains_on_every_sequence_once(two_sources: list[str]) -> None:
    loader = loader_of(config(two_sources[0]), batch_size=5)
    taken = [place for batch, _ in loader.batches(8) for place in places_of(batch)]
    assert sorted(taken) == [(0, s, m) for s, size in enumerate([10, 7, 11, 12]) for m in range(size)]
    with pytest.raises(DataError, match=r"all 40 sequences are used up.*--multiple-data-passes"):
        next(loader.batches(1))


def test_weights_mix_sources_at_sample_level(two_sources: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loader = loader_of(config(*two_sources, train_data_mix_weights=[3.0, 1.0], multiple_data_passes=True), 8)
    for batch, _ in loader.batches(25):
        assert batch.per_source == (6, 2)
    assert [source["samples"] for source in loader.state["sources"]] == [150, 50]
    assert [source["pass"] for source in loader.state["sources"]] == [3, 2]
    messages = [record.message for record in caplog.records if two_sources[0] in record.message]
    assert messages == [f"starting pass {number} over {two_sources[0]}" for number in (2, 3, 4)]


def test_masks_apply_to_targets(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [torch.tensor([1, 2, 500, 3, 4, 501, 501, 501, 501]).numpy()])
    masks = {"target_mask_left": 500, "target_mask_individual": 501}
    batch, _ = next(loader_of(config(path, **masks), 1).batches(1))
    x = IGNORE_INDEX
    assert batch.targets.tolist() == [[x, x, 3, 4, x, x, x, x]]
    batch, _ = next(loader_of(config(path, squash_mask_left=True, **masks), 1).batches(1))
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 501, 501, 501, 501]]
    assert batch.targets.tolist() == [[x, 3, 4, x, x, x, x, x]]


def test_short_sequences_are_filler_without_targets(tmp_path: Path) -> None:
    rows = [sequence(0, 0, m, SEQ_LEN + (m != 2)) for m in range(4)]
    batch, _ = next(loader_of(config(write_shard(tmp_path / "a.tar", rows))).batches(1))
    assert (batch.num_samples, batch.skipped, batch.per_source) == (3, 1, (3,))
    assert (batch.targets[~batch.filled] == IGNORE_INDEX).all()
    assert (batch.targets[batch.filled] != IGNORE_INDEX).all()


@pytest.mark.processes
def test_synthetic_data_needs_no_files() -> None:
    loaders = [loader_of(DataConfig(dataset_type="synthetic", workers=workers), seed=5) for workers in (0, 2)]
    for (first, _), (second, _) in zip(*(loader.batches(5) for loader in loaders), strict=True):
        assert same(first, second)
        assert first.inputs.max() < VOCAB_SIZE
        assert torch.equal(first.inputs[:, 1:], first.targets[:, :-1])


# --- the same for any split ------------------------------------------------------------------------------------------
@pytest.mark.processes
@pytest.mark.parametrize("resampled", [False, True])
def test_workers_change_nothing(two_sources: list[str], resampled: bool) -> None:
    sources = [manifest.replace("manifest.jsonl", "*.tar") for manifest in two_sources]
    data = {"train_data_mix_weights": [0.7, 0.3], "dataset_resampled": resampled}
    loaders = [loader_of(config(*sources, workers=workers, **data)) for workers in (0, 1, 2, 3)]
    for items in zip(*(loader.batches(30) for loader in loaders), strict=True):
        assert all(same(items[0][0], batch) and items[0][1] == state for batch, state in items[1:])


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3))
def test_ranks_share_the_same_global_batches(two_sources: list[str], world_size: int, seed: int) -> None:
    data = config(*two_sources, multiple_data_passes=True)
    expected = [places_of(batch) for batch, _ in loader_of(data, 12, seed=seed).batches(7)]
    size = 12 // world_size
    parts = [
        [places_of(batch) for batch, _ in loader_of(data, size, seed=seed, rank=rank, world_size=world_size).batches(7)]
        for rank in range(world_size)
    ]
    assert [list(chain(*batches)) for batches in zip(*parts, strict=True)] == expected


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 12), st.sampled_from([1, 2, 3]), st.booleans())
def test_resuming_from_any_state_gives_the_remaining_batches(
    two_sources: list[str], stop: int, world_size: int, resampled: bool
) -> None:
    sources = [manifest.replace("manifest.jsonl", "*.tar") for manifest in two_sources]
    data = config(*sources, dataset_resampled=resampled)
    expected = [places_of(batch) for batch, _ in loader_of(data, 6, seed=1).batches(12)]
    first = loader_of(data, 6, seed=1)
    for _step in first.batches(stop):
        pass
    state = jsonable(first.state)
    parts = [
        loader_of(data, 6 // world_size, rank=rank, world_size=world_size, state=state) for rank in range(world_size)
    ]
    rest = zip(*([places_of(batch) for batch, _ in part.batches(12 - stop)] for part in parts), strict=True)
    assert [list(chain(*batches)) for batches in rest] == expected[stop:]


@pytest.mark.processes
def test_stopping_loses_no_batch_that_workers_had_prepared(two_sources: list[str]) -> None:
    data = config(*two_sources, multiple_data_passes=True, workers=2)
    expected = [places_of(batch) for batch, _ in loader_of(data).batches(20)]
    loader = loader_of(data)
    taken = [places_of(batch) for batch, _ in loader.batches(7)]
    loader.close()
    taken += [places_of(batch) for batch, _ in loader.batches(4)]
    taken += [places_of(batch) for batch, _ in loader.batches(2)]
    resumed = loader_of(data, state=jsonable(loader.state), seed=77)
    assert taken + [places_of(batch) for batch, _ in resumed.batches(7)] == expected


@pytest.mark.processes
def test_the_global_random_state_does_not_change(two_sources: list[str]) -> None:
    before = torch.get_rng_state()
    list(loader_of(config(two_sources[0], workers=2)).batches(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.processes
def test_workers_can_be_spawned(two_sources: list[str]) -> None:
    """Workers receive plain values, so a platform that spawns its processes gives the same batches."""
    data = config(two_sources[0], workers=1)
    forked = list(loader_of(data).batches(3))
    loader = loader_of(data)
    assert len(pickle.dumps(build_pipeline(loader._spec))) < 10_000
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = list(loader.batches(3))
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert all(same(a, b) for (a, _), (b, _) in zip(forked, spawned, strict=True))


# --- bad input -------------------------------------------------------------------------------------------------------
def failure(loader: TrainLoader, batches: int = 20) -> Exception:
    """Return the error that a worker's data causes; it has its own type and no traceback of the worker."""
    with pytest.raises((DataError, StorageError, ConfigError)) as caught:
        list(loader.batches(batches))
    assert "Traceback" not in str(caught.value)
    assert "DataLoader worker" not in str(caught.value)
    return caught.value


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_of_a_worker_is_raised_with_its_message(tmp_path: Path, workers: int) -> None:
    pattern = write_source(tmp_path, [8, 8], manifest=False)
    write_shard(tmp_path / "00001.tar", [torch.full((9,), VOCAB_SIZE).numpy()] * 3, "json")
    loader = loader_of(config(pattern, workers=workers))
    error = failure(loader)
    assert type(error) is DataError
    assert "found the id 1000, but the model's vocabulary has 1000" in str(error)
    assert str(failure(loader)) == str(error)


@pytest.mark.processes
def test_batches_before_a_broken_shard_are_returned(tmp_path: Path) -> None:
    data = config(write_source(tmp_path, [2] * 8), workers=2)
    batches = [[shard for _, shard, _ in places_of(batch)] for batch, _ in loader_of(data).batches(4)]
    first = next(number for number, shards in enumerate(batches) if set(shards) - set(batches[0]))
    (broken, *_) = set(batches[first]) - set(batches[0])
    # Full tar blocks, so that its size looks right.
    (tmp_path / f"{broken:05d}.tar").write_bytes(b"no tar at all..." * 1024)
    loader = loader_of(data)
    assert first and len(list(loader.batches(first))) == first
    with pytest.raises(DataError, match=rf"{broken:05d}\.tar: no valid tar header"):
        next(loader.batches(1))


def test_shards_of_a_wrong_size_are_reported_together_before_the_run(tmp_path: Path) -> None:
    manifest = write_source(tmp_path, [8, 8, 8, 8])
    full_bytes = (tmp_path / "00003.tar").stat().st_size
    entries = [ManifestEntry(f"{shard:05d}", 8) for shard in range(3)]
    write_manifest(tmp_path / "manifest.jsonl", [*entries, ManifestEntry("00003", 8, {"num_bytes": full_bytes})])
    (tmp_path / "00000.tar").write_bytes(b"")
    os.truncate(tmp_path / "00001.tar", 5000)
    os.truncate(tmp_path / "00003.tar", 4096)
    pattern = str(tmp_path / "*.tar")
    for data in (config(manifest), DataConfig(train_data=[pattern], train_num_samples=64)):
        with pytest.raises(DataError) as caught:
            loader_of(data)
        message = str(caught.value)
        assert "00000.tar: the file is empty" in message and "00001.tar: its 5000 bytes" in message
        assert "00002.tar" not in message
        assert f"00003.tar: has 4096 bytes, but its manifest lists {full_bytes}" in message
    with pytest.raises(DataError, match=r"(?s)00000\.tar.*00001\.tar.*00003\.tar"):
        build_val_loaders(
            ValidationConfig(val_data=[pattern]), DataConfig(), seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=4
        )


@pytest.mark.processes
def test_a_manifest_with_a_wrong_count(tmp_path: Path) -> None:
    manifest = write_source(tmp_path, [8, 8])
    write_manifest(tmp_path / "manifest.jsonl", [ManifestEntry("00000", 8), ManifestEntry("00001", 9)])
    assert "holds 8 sequences, but its manifest lists 9" in str(failure(loader_of(config(manifest, workers=2)), 4))


@pytest.mark.processes
def test_tolerated_errors_are_filler_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = write_source(tmp_path, [8, 8])
    (tmp_path / "00001.tar").write_bytes(b"x" * 5000)
    data = config(manifest, workers=2, ignore_parse_errors=True)
    with caplog.at_level(logging.WARNING):
        batches = [batch for batch, _ in loader_of(data).batches(4)]
    assert [batch.skipped for batch in batches] == [2, 2, 2, 2]
    assert [record.message.partition(": no valid")[0] for record in caplog.records] == [
        f"ignored: {tmp_path}/00001.tar"
    ]


@pytest.mark.processes
def test_another_data_key_is_reported_once_and_by_one_rank(
    two_sources: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = DataConfig(dataset_manifest=[two_sources[0]], data_key="json.gz", workers=2)
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            list(loader_of(data, rank=rank, world_size=2).batches(5))
    assert [record.message for record in caplog.records] == [
        f"the data key is json.gz, but {two_sources[0]} holds npy; using npy"
    ]


def test_unknown_data_key_lists_the_known_ones(two_sources: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--data-key: found jsonl, expected one of npy, json\.gz, json, txt"):
        loader_of(DataConfig(dataset_manifest=two_sources, data_key="jsonl"))


@pytest.mark.processes
def test_sequences_too_short_everywhere(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [sequence(0, 0, m, 5) for m in range(9)])
    assert "the longest has 5 ids, but the model's seq_len 8 needs 9" in str(
        failure(loader_of(config(path, workers=2)))
    )


def test_too_little_data_is_an_error_at_the_start_with_numbers(two_sources: list[str]) -> None:
    run = {"train_num_samples": 25 * SEQ_LEN, "epochs": 2}
    with pytest.raises(DataError, match=r"48 sequences[\s\S]*has 40 sequences \(320 tokens\), 48 \(384 tokens\)"):
        loader_of(config(two_sources[0], **run))
    loader_of(config(two_sources[0], multiple_data_passes=True, **run))
    assert loader_of(config(two_sources[0], train_num_samples=20 * SEQ_LEN, epochs=2)).tokens_available == [320]


def test_less_than_one_batch_is_an_error(two_sources: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"100 tokens in 1 epochs are 12 sequences of 8, less than one global batch of 16"
    ):
        loader_of(config(two_sources[0], train_num_samples=100, epochs=1), batch_size=8, world_size=2)


@pytest.mark.processes
def test_unreachable_s3_from_a_worker(two_sources: list[str], tmp_path: Path, s3_bucket: str) -> None:
    url = f"s3://{s3_bucket}/a"
    folder = Path(two_sources[0]).parent
    for path in folder.iterdir():
        storage.upload(str(path), f"{url}/{path.name}")
    data = config(f"{url}/manifest.jsonl", workers=2)
    with pytest.MonkeyPatch.context() as patch:
        loader = loader_of(data)
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        error = failure(loader)
    assert isinstance(error, StorageError)
    assert "http://127.0.0.1:9" in str(error)
    remote = [places_of(batch) for batch, _ in loader_of(data, 5).batches(8)]
    assert remote == [places_of(batch) for batch, _ in loader_of(config(two_sources[0]), 5).batches(8)]


# --- validation ------------------------------------------------------------------------------------------------------
@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
def test_validation_reads_every_sequence_once_in_file_order(tmp_path: Path, workers: int) -> None:
    pattern = write_source(tmp_path, [5, 4, 2], manifest=False)
    expected = [(0, s, m) for s, size in enumerate([5, 4, 2]) for m in range(size)]
    data = DataConfig(data_key="npy", workers=workers)
    (loader,) = val_loaders(data, val_data=[pattern])
    for _reading in range(2):
        batches = list(loader)
        assert [place for batch in batches for place in places_of(batch)] == expected
        assert [batch.num_samples for batch in batches] == [4, 4, 3]
        assert [batch.skipped for batch in batches] == [0, 0, 0]
        assert (batches[-1].targets[3] == IGNORE_INDEX).all()
    assert loader.val_data == [pattern]


def test_padding_is_no_target_and_the_last_id_as_an_input(tmp_path: Path) -> None:
    ids = sequence(0, 0, 0)
    ids[-3:] = PAD_ID
    path = write_shard(tmp_path / "a.tar", [ids])
    (loader,) = val_loaders(DataConfig(data_key="npy", workers=0), val_data=[path])
    (batch,) = loader
    assert batch.inputs[0].tolist() == [*ids[:-3], VOCAB_SIZE - 1, VOCAB_SIZE - 1]
    assert batch.targets[0].tolist() == [*ids[1:-3], IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    assert batch.tokens[0].tolist() == [*ids[:-3], *[VOCAB_SIZE - 1] * 3]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_have_the_same_number_of_validation_batches(tmp_path: Path, world_size: int) -> None:
    pattern = write_source(tmp_path, [5, 4, 2], manifest=False)
    taken = []
    lengths = set()
    for rank in range(world_size):
        (loader,) = val_loaders(
            DataConfig(data_key="npy", workers=0), 2, val_data=[pattern], rank=rank, world_size=world_size
        )
        batches = list(loader)
        lengths.add(len(batches))
        assert all(batch.inputs.shape == (2, SEQ_LEN) for batch in batches)
        taken += [place for batch in batches for place in places_of(batch)]
    assert len(lengths) == 1
    assert sorted(taken) == [(0, s, m) for s, size in enumerate([5, 4, 2]) for m in range(size)]


def test_val_num_samples_counts_tokens(tmp_path: Path) -> None:
    manifest = write_source(tmp_path, [5, 4])
    (loader,) = val_loaders(DataConfig(data_key="npy", workers=0), val_data=[manifest], val_num_samples=6 * SEQ_LEN + 3)
    assert loader.num_sequences == 6
    assert [batch.num_samples for batch in loader] == [4, 2]


def test_validation_sets_have_one_data_key_each_or_one_for_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets = [write_source(tmp_path / kind, [2], kind=kind) for kind in ("npy", "txt")]
    with caplog.at_level(logging.WARNING):
        for loader in val_loaders(DataConfig(workers=0), val_data=sets, val_data_key=["npy", "txt"]):
            assert sum(batch.num_samples for batch in loader) == 2
    assert not caplog.records
    assert [loader.data_key for loader in val_loaders(DataConfig(), val_data=sets, val_data_key=["npy"])] == ["npy"] * 2
    with pytest.raises(ConfigError, match="found 3 values for 2 values of --val-data"):
        val_loaders(DataConfig(), val_data=sets, val_data_key=["npy"] * 3)


def test_missing_validation_sets_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one\.tar[\s\S]*two\.tar"):
        val_loaders(DataConfig(), val_data=[f"{tmp_path}/one.tar", f"{tmp_path}/two.tar"])


@pytest.mark.processes
def test_golden_run_data(shared_dir: Path) -> None:
    """Shards of an original run: json.gz, and a manifest without the validation shards."""
    folder = shared_dir / "compat" / "run" / "data"
    data = DataConfig(dataset_manifest=[f"{folder}/manifest.jsonl"], data_key="json.gz", workers=2)
    loader = build_train_loader(data, seq_len=64, vocab_size=256, batch_size=32)
    assert loader.tokens_available == [6 * 256 * 64]
    assert sum(batch.num_samples for batch, _ in loader.batches(48)) == 1536
    validation = ValidationConfig(val_data=[f"{folder}/0000000{n}.tar" for n in (7, 8)], val_data_key=["json.gz"])
    for val_loader in build_val_loaders(validation, data, seq_len=64, vocab_size=256, batch_size=100):
        assert [batch.num_samples for batch in val_loader] == [100, 100, 56]
