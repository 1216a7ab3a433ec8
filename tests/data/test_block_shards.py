"""Blocks of shards: only the needed ones are fetched, each once, and no byte is used before it is verified."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import BLOCK_BYTES, SEQ_LEN, VOCAB_SIZE, places, sequence, write_block_source
from hypothesis import given
from hypothesis import strategies as st

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.block_shards import BlockShard, ShardPiece
from open_lm.data.block_sums import BlockHasher, BlockSums
from open_lm.data.fetch import FetchFolder, FetchSettings
from open_lm.data.loader import build_train_loader
from open_lm.data.manifest import read_manifest
from open_lm.data.order import DataOrder, OrderSettings, Samples, Source
from open_lm.data.shard_format import ManifestEntry, ShardWriter, token_dtype, write_manifest
from open_lm.data.shards import ShardStore
from open_lm.data.sources import find_sources
from open_lm.data.stream import SampleReader, StreamSpec
from open_lm.data.verify import expected_files
from open_lm.errors import ConfigError, DataError
from open_lm.utils.make_wds_manifest import make_manifest


def reader_of(source: Source, folder: Path, **options: object) -> SampleReader:
    folder.mkdir(exist_ok=True)
    fetch = FetchSettings(folder=str(folder))
    return SampleReader(StreamSpec((source,), SEQ_LEN, VOCAB_SIZE, "npy", fetch=fetch, **options))  # type: ignore[arg-type]


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        storage.upload(path, f"{url}/{path.name}")


def places_of(samples: Samples) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in samples[:3]), strict=True))


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Record the ranges (url, start, length) that are read from storage."""
    found: list[tuple[str, int, int]] = []
    read_range, lock = storage.read_range_chunks, threading.Lock()

    def recording(url: str, start: int, length: int, timeout_s: float) -> list[bytes]:
        with lock:
            found.append((url, start, length))
        return read_range(url, start, length, timeout_s)

    monkeypatch.setattr(storage, "read_range_chunks", recording)
    return found


# --- checksums -------------------------------------------------------------------------------------------------------
@given(st.binary(max_size=300), st.integers(1, 50), st.lists(st.integers(0, 100), max_size=5))
def test_block_checksums_do_not_depend_on_how_the_bytes_arrive(data: bytes, block: int, cuts: list[int]) -> None:
    hasher = BlockHasher(block)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        hasher.update(data[start:stop] if start < stop else b"")
    hasher.update(data[max([0, *cuts]) :] if max([0, *cuts]) > len(data) else b"")
    sums = hasher.finish(1)
    assert sums.num_blocks == -(-len(data) // block)
    for number in range(sums.num_blocks):
        content = data[number * block : (number + 1) * block]
        assert sums.mismatches(range(number, number + 1), [content]) == []
        changed = data[: number * block] + content[:-1] + bytes([content[-1] ^ 1]) + data[(number + 1) * block :]
        chunks = [memoryview(changed)[start : start + 7] for start in range(0, len(data), 7)]
        assert sums.mismatches(range(sums.num_blocks), chunks) == [number]
    line = sums.to_json()
    expected = sums if data else None
    assert BlockSums.from_json(line, 1, len(data)) == expected
    assert BlockSums.from_json(line, 1, len(data) + block) is None
    assert BlockSums.from_json({**line, "block_sums": "?"}, 1, len(data)) is None


def test_writer_and_make_manifest_give_equal_checksums_to_shards_of_equal_members_only(tmp_path: Path) -> None:
    infos = {}
    for name, kind, lengths in (("a", "npy", [9] * 5), ("b", "npy", [9, 9, 8]), ("c", "json.gz", [9] * 5)):
        with ShardWriter(tmp_path / f"{name}.tar", kind, dtype=token_dtype(VOCAB_SIZE)) as writer:
            for member, length in enumerate(lengths):
                writer.write(f"{member:06d}", sequence(0, 0, member, length).astype(np.uint16))
        infos[name] = writer.info
    with ShardWriter(tmp_path / "d.tar", "npy") as writer:
        writer.write_numbered(0, np.arange(45, dtype=np.uint16).reshape(5, 9))
    infos["d"] = writer.info
    make_manifest(str(tmp_path))
    for entry in read_manifest(str(tmp_path / "manifest.jsonl")):
        info = infos[entry.shard]
        assert info.sha256 == entry.sha256
        assert (entry.block_sums is not None) == bool(info.block_sums) == (entry.shard in "ad")
        assert {name: entry.extra[name] for name in info.block_sums} == info.block_sums
    assert infos["a"].block_sums["member_bytes"] == 1024


# --- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.processes
def test_a_piece_is_fetched_ahead_in_every_pass(
    tmp_path: Path, s3_bucket: str, ranges: list[tuple[str, int, int]]
) -> None:
    write_block_source(tmp_path / "data", [40] * 2)
    upload(tmp_path / "data", f"s3://{s3_bucket}/d")
    (source,) = find_sources(DataConfig(dataset_manifest=[f"s3://{s3_bucket}/d/manifest.jsonl"], data_key="npy"))
    store = ShardStore(2, FetchSettings(str(tmp_path)), expected_files([source]))
    url, members = source.shards[0], np.arange(40)
    for _pass in range(2):
        ranges.clear()
        store.fetch([(url, members[:1])], "npy")
        store.prefetch([ShardPiece(url, 0, 40)] * 2, "npy")
        shard = store.get(url, "npy")
        assert isinstance(shard, BlockShard) and shard.pieces == [range(40)]
        store.make_readable(shard, members)
        assert sum(length for _, _, length in ranges) == 40 * 1024, "each block once"
        shard.close()
        store._open.clear()


@pytest.mark.processes
def test_only_the_blocks_of_requested_members_are_fetched_and_each_once(
    tmp_path: Path, s3_bucket: str, ranges: list[tuple[str, int, int]]
) -> None:
    write_block_source(tmp_path / "data", [40] * 8)
    upload(tmp_path / "data", f"s3://{s3_bucket}/d")
    (source,) = find_sources(DataConfig(dataset_manifest=[f"s3://{s3_bucket}/d/manifest.jsonl"], data_key="npy"))
    reader = reader_of(source, tmp_path / "fetched")
    order = DataOrder([source], 0, OrderSettings(lanes=8, max_passes=1))
    samples = order.take(8)
    reader.prefetch([])
    ids, filled = reader.read(samples)
    assert filled.all() and places(ids) == [
        (0, *p) for p in zip(samples.shard.tolist(), samples.member.tolist(), strict=True)
    ]
    assert len(ranges) == 8 and {length for _, _, length in ranges} == {BLOCK_BYTES}
    while order.position < 320:
        samples = order.take(8)
        reader.prefetch(order.entered() + order.upcoming(4))
        ids, filled = reader.read(samples)
        assert filled.all()
        assert places(ids) == [(0, *p) for p in zip(samples.shard.tolist(), samples.member.tolist(), strict=True)]
    blocks = Counter(
        (url, block) for url, start, length in ranges for block in range(start, start + length, BLOCK_BYTES)
    )
    assert len(blocks) == 80 and set(blocks.values()) == {1}
    for shard in list(reader._store._open.values()):
        shard.close()
    assert list((tmp_path / "fetched").glob("*.tar")) == []


def test_readers_that_share_a_folder_fetch_a_block_once(
    tmp_path: Path, ranges: list[tuple[str, int, int]], s3_bucket: str
) -> None:
    write_block_source(tmp_path / "data", [16])
    upload(tmp_path / "data", f"s3://{s3_bucket}/d")
    (source,) = find_sources(DataConfig(dataset_manifest=[f"s3://{s3_bucket}/d/manifest.jsonl"], data_key="npy"))
    samples = DataOrder([source], 0, OrderSettings()).take(16)
    threads = [threading.Thread(target=lambda: reader_of(source, tmp_path / "fetched").read(samples)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(length for _, _, length in ranges) == 16 * 1024


@pytest.mark.processes
@pytest.mark.parametrize("is_remote", [False, True])
def test_a_damaged_block_is_an_error_when_it_is_needed_and_not_before(
    tmp_path: Path, s3_bucket: str, is_remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "back_off", lambda _: None)
    write_block_source(tmp_path / "data", [40])
    path = tmp_path / "data" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[5 * BLOCK_BYTES + 700] ^= 1  # member 20
    path.write_bytes(data)
    upload(tmp_path / "data", f"s3://{s3_bucket}/d")
    folder = f"s3://{s3_bucket}/d" if is_remote else str(tmp_path / "data")
    (source,) = find_sources(DataConfig(dataset_manifest=[f"{folder}/manifest.jsonl"], data_key="npy"))
    options = OrderSettings(shuffle_shards=False, shuffle_samples=False)
    reader, order = reader_of(source, tmp_path / "fetched"), DataOrder([source], 0, options)
    assert reader.read(order.take(20))[1].all()
    with pytest.raises(DataError, match=r"00000\.tar: the bytes 20480 to 24576 differ from the checksum"):
        reader.read(order.take(1))
    tolerant = reader_of(source, tmp_path / "fetched", max_broken_fraction=0.5)
    ids, filled = tolerant.read(DataOrder([source], 0, options).take(24))
    assert not filled.any() and not ids.any()
    (notice,) = tolerant.notices
    assert notice.text.startswith("ignored: ")


def test_a_local_shard_of_another_size_is_an_error(tmp_path: Path) -> None:
    manifest = write_block_source(tmp_path / "data", [40])
    (source,) = find_sources(DataConfig(dataset_manifest=[manifest], data_key="npy"))
    source = replace(source, num_bytes=(99,), block_sums=(BlockSums(1, 99, bytes(16)),))
    with pytest.raises(DataError, match=r"bytes, expected 99 from its manifest"):
        reader_of(source, tmp_path / "fetched").read(DataOrder([source], 0).take(1))


@pytest.mark.parametrize("has_blocks", [True, False])
def test_a_full_disk_and_too_few_open_files_are_not_errors_of_a_shard(
    tmp_path: Path, has_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where broken shards are tolerated."""
    manifest = write_block_source(tmp_path / "data", [40])
    (source,) = find_sources(DataConfig(dataset_manifest=[manifest], data_key="npy"))
    if not has_blocks:
        source = replace(source, block_sums=(None,), sha256=("",))
    samples = DataOrder([source], 0).take(1)
    reader = reader_of(source, tmp_path / "fetched", max_broken_fraction=0.5)

    def too_many(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        target = "open_lm.data.block_shards.os.open" if has_blocks else "open_lm.data.shards.open"
        patch.setattr(target, too_many, raising=False)
        with pytest.raises(ConfigError, match=r"fetched: cannot hold the open shards \(Too many open files\); raise"):
            reader.read(samples)
    if has_blocks:

        def full(file: int, offset: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ConfigError, match=r"fetched: cannot hold the open shards \(No space left on device\)"):
            reader.read(samples)
        monkeypatch.undo()
    filled = reader.read(samples)[1]
    assert filled.all() and not reader.notices


@pytest.mark.processes
def test_local_shards_are_verified_block_by_block_with_the_same_batches(tmp_path: Path) -> None:
    manifest = write_block_source(tmp_path / "data", [40, 30, 20])
    plain = tmp_path / "data" / "plain.jsonl"
    write_manifest(plain, [ManifestEntry(f"{n:05d}", size) for n, size in enumerate([40, 30, 20])])
    rows = []
    for path, workers in ((manifest, 0), (manifest, 2), (str(plain), 0)):
        data = DataConfig(dataset_manifest=[path], data_key="npy", workers=workers)
        loader = build_train_loader(data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=6)
        rows.append([places(batch.inputs.numpy()) for batch, _ in loader.batches(15)])
    assert rows[0] == rows[1] == rows[2]
    assert FetchFolder.is_needed(find_sources(DataConfig(dataset_manifest=[manifest])))
