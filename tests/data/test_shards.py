"""Opening shards: verification, fetching ahead, removal after use, and the cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
from data_helpers import SEQ_LEN, VOCAB_SIZE, sequence, write_shard
from faulty_proxy import FaultyProxy, Rule

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data import shards
from open_lm.data import verify as verify_module
from open_lm.data.block_shards import ShardPiece
from open_lm.data.fetch import FetchSettings, look_up
from open_lm.data.loader import build_train_loader
from open_lm.data.manifest import ManifestEntry, write_manifest
from open_lm.data.order import DataOrder, OrderSettings, Source
from open_lm.data.shards import ShardStore
from open_lm.data.stream import SampleReader, StreamSpec
from open_lm.data.verify import Expected
from open_lm.errors import DataError, StorageError
from open_lm.storage import retries as storage_errors

MEMBERS = 20


def whole(urls: Iterable[str]) -> list[ShardPiece]:
    return [ShardPiece(url, 0, None) for url in urls]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_errors, "_pause", lambda seconds: None)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder for temporary downloads."""
    (tmp_path / "temporary").mkdir()
    return str(tmp_path / "temporary")


def shard_bytes(tmp_path: Path, number: int) -> bytes:
    return Path(write_shard(tmp_path / "made.tar", [sequence(0, number, m) for m in range(MEMBERS)])).read_bytes()


def expected(data: bytes) -> Expected:
    return Expected(len(data), hashlib.sha256(data).hexdigest())


def put(tmp_path: Path, base: str, count: int) -> dict[str, Expected]:
    """Write shards 0.tar, … to a store; return their sizes and checksums."""
    known = {}
    for number in range(count):
        data = shard_bytes(tmp_path, number)
        storage.write_bytes(f"{base}/{number}.tar", data)
        known[f"{base}/{number}.tar"] = expected(data)
    return known


def first_ids(store: ShardStore, url: str) -> list[int]:
    return store.get(url, "npy").ids(0)[:3].tolist()


def names(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith((".tar", ".part")))


# --- verification ----------------------------------------------------------------------------------------------------
def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 16
    path.write_bytes(data)


def test_flipped_bits_and_cuts_of_a_local_shard_are_detected(tmp_path: Path, folder: str) -> None:
    data = shard_bytes(tmp_path, 0)
    path = tmp_path / "a.tar"
    known = {str(path): expected(data)}
    for byte in (*np.random.default_rng(0).integers(0, len(data), 10).tolist(), len(data) - 1):
        path.write_bytes(data)
        flip(path, byte)
        with pytest.raises(
            DataError, match=rf"a\.tar: has the sha256 \w+, expected {known[str(path)].sha256} from its"
        ):
            ShardStore(2, FetchSettings(folder), known).get(str(path), "npy")
    for length in (0, 511, len(data) // 2, len(data) - 1024, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"a\.tar: has {length} bytes, expected {len(data)} from its manifest"):
            ShardStore(2, FetchSettings(folder), known).get(str(path), "npy")
    path.write_bytes(data)
    assert first_ids(ShardStore(2, FetchSettings(folder), known), str(path)) == [0, 0, 0]


def test_a_local_shard_is_hashed_ahead_and_once(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    hash_file = verify_module._hash
    monkeypatch.setattr(verify_module, "_verified", set())
    monkeypatch.setattr(verify_module, "_hash", lambda file: hashed.append(file.name) or hash_file(file))
    known = put(tmp_path, str(tmp_path / "data"), 2)
    for _worker in range(2):
        store = ShardStore(2, FetchSettings(folder), known)
        store.prefetch(whole(list(known)))
        assert [first_ids(store, url) for url in known] == [[0, 0, 0], [0, 1, 0]]
        verify_module._verified.clear()
    assert sorted(hashed) == sorted(known)


# --- remote shards without a cache -----------------------------------------------------------------------------------
def test_remote_shards_are_removed_after_use(faulty_s3: FaultyProxy, tmp_path: Path, folder: str) -> None:
    known = put(tmp_path, f"s3://{faulty_s3.bucket}/d", 8)
    faulty_s3.requests.clear()
    store = ShardStore(2, FetchSettings(folder), known)
    urls = list(known)
    for number, url in enumerate(urls):
        store.prefetch(whole(urls[number + 1 : number + 3]))
        assert first_ids(store, url) == [0, number, 0]
        assert len(names(folder)) <= 2 + 3, "the open ones and those being downloaded"
    assert faulty_s3.requests["GET"] == 8, "each is downloaded once"
    assert len(names(folder)) == 2


def test_shards_fetched_ahead_for_other_workers_are_released(s3_bucket: str, tmp_path: Path, folder: str) -> None:
    known = put(tmp_path, f"s3://{s3_bucket}/d", 8)
    store, urls = ShardStore(2, FetchSettings(folder), known), list(known)
    for number in range(6):
        store.prefetch(whole(urls[number : number + 2]))
        wait(store._ahead.values())
    assert list(store._ahead) == urls[5:7]
    first_ids(store, urls[7])
    store._remote.trim()
    assert len(names(folder)) == 3


def test_fetching_ahead_is_limited_in_bytes_but_includes_each_source(
    s3_bucket: str, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = put(tmp_path, f"s3://{s3_bucket}/d", 8)
    urls = list(known)
    size = known[urls[0]].num_bytes or 0
    cached = FetchSettings(folder, str(tmp_path / "cache"), 4 * 5 * size, 30)
    for capacity, settings, most_bytes, ahead in [
        (2, FetchSettings(folder), 3 * size, 3),
        (2, FetchSettings(folder), 3 * size - 1, 2),
        (10, FetchSettings(folder), size, 5),
        (2, cached, 100 * size, 5),
    ]:
        monkeypatch.setattr(shards, "_AHEAD_BYTES", most_bytes)
        for known_files in (known, {}):
            store = ShardStore(capacity, settings, known_files)
            store.keep_open(100)
            first_ids(store, urls[7])  # gives the estimate for shards of unknown size
            for _ in urls:
                store.prefetch(whole(urls))
                wait(store._ahead.values())
            assert list(store._ahead) == urls[:ahead]


def test_all_shards_of_a_batch_are_fetched_without_another_call(
    faulty_s3: FaultyProxy, tmp_path: Path, folder: str
) -> None:
    """More of them than are downloaded at a time; those to read next do not wait for the ones ahead of them."""
    known = put(tmp_path, f"s3://{faulty_s3.bucket}/d", 12)
    urls = list(known)
    store = ShardStore(2, FetchSettings(folder), known)
    store.prefetch(whole(urls[:6]))
    store.fetch([(url, np.zeros(1, np.int64)) for url in urls[4:]])
    assert set(store._ahead) == set(urls)
    wait(store._ahead.values())
    assert faulty_s3.requests["GET"] == 12
    assert [first_ids(store, url) for url in urls] == [[0, number, 0] for number in range(12)]
    assert faulty_s3.requests["GET"] == 12 and not store._ahead


def test_an_error_of_fetching_ahead_is_raised_when_the_shard_is_requested(
    faulty_s3: FaultyProxy, tmp_path: Path, folder: str
) -> None:
    known = put(tmp_path, f"s3://{faulty_s3.bucket}/d", 1)
    (url,) = known
    faulty_s3.rules = [Rule("500", method="GET")]
    store = ShardStore(2, FetchSettings(folder), known)
    store.prefetch(whole([url]))
    with pytest.raises(StorageError, match=r"0\.tar: .*InternalError"):
        store.get(url, "npy")
    assert faulty_s3.injected["500"] == storage_errors._MAX_ATTEMPTS, "no second round of attempts"
    faulty_s3.rules = []
    assert first_ids(store, url) == [0, 0, 0]


# --- the cache -------------------------------------------------------------------------------------------------------
@pytest.fixture
def cached(tmp_path: Path, folder: str) -> FetchSettings:
    return FetchSettings(folder, str(tmp_path / "cache"), 10**7, 30)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_cached_shard_is_not_downloaded_again(
    faulty_s3: FaultyProxy, tmp_path: Path, cached: FetchSettings, is_known: bool
) -> None:
    known = put(tmp_path, f"s3://{faulty_s3.bucket}/d", 3)
    faulty_s3.requests.clear()
    for _run in range(3):
        store = ShardStore(2, cached, known if is_known else {})
        assert [first_ids(store, url) for url in known] == [[0, 0, 0], [0, 1, 0], [0, 2, 0]]
    assert faulty_s3.requests["GET"] == 3
    assert faulty_s3.requests["HEAD"] == (0 if is_known else 9), "no request for what the manifest lists"
    assert len(names(str(cached.cache_dir))) == 3 and names(str(cached.folder)) == []


def test_a_changed_remote_object_is_downloaded_again(
    faulty_s3: FaultyProxy, tmp_path: Path, cached: FetchSettings
) -> None:
    put(tmp_path, f"s3://{faulty_s3.bucket}/d", 1)
    url = f"s3://{faulty_s3.bucket}/d/0.tar"
    assert first_ids(ShardStore(2, cached, {}), url) == [0, 0, 0]
    storage.write_bytes(url, shard_bytes(tmp_path, 7))
    assert first_ids(ShardStore(2, cached, {}), url) == [0, 7, 0]


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_copy_in_the_cache_is_detected_and_downloaded_again(
    faulty_s3: FaultyProxy, tmp_path: Path, cached: FetchSettings, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    known = put(tmp_path, f"s3://{faulty_s3.bucket}/d", 1)
    (url,) = known
    first_ids(ShardStore(2, cached, known), url)
    (name,) = names(str(cached.cache_dir))
    path = Path(str(cached.cache_dir)) / name
    if damage == "flip":
        flip(path, 5000)
    else:
        os.truncate(path, 5000)
    assert first_ids(ShardStore(2, cached, {**known}), url) == [0, 0, 0]
    found = "the sha256" if damage == "flip" else "5000 bytes, expected"
    assert f"{url}: its copy in {cached.cache_dir} has {found}" in caplog.text
    assert expected(path.read_bytes()) == known[url]


def test_a_limit_smaller_than_a_shard_disables_the_cache_with_a_warning(
    faulty_s3: FaultyProxy, tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    known = put(tmp_path, f"s3://{faulty_s3.bucket}/d", 3)
    settings = FetchSettings(folder, str(tmp_path / "cache"), 1000, 30)
    store = ShardStore(2, settings, known)
    assert [first_ids(store, url) for url in known] == [[0, 0, 0], [0, 1, 0], [0, 2, 0]]
    assert caplog.text.count("has no space for it: the shards in use fill --cache-limit 1000 bytes") == 1
    assert names(str(tmp_path / "cache")) == [] and len(names(folder)) == 2


def test_a_shard_that_a_stopped_process_downloads_is_downloaded_separately_with_a_warning_that_says_so(
    faulty_s3: FaultyProxy, tmp_path: Path, cached: FetchSettings, caplog: pytest.LogCaptureFixture
) -> None:
    ((url, known),) = put(tmp_path, f"s3://{faulty_s3.bucket}/d", 1).items()
    store = ShardStore(2, cached, {url: known})
    cache = store._remote._cache
    assert cache is not None
    cache._stall_timeout_s = 0.1
    key = hashlib.sha256(look_up(url, known, 30).identity.encode()).hexdigest()[:32]
    os.makedirs(cache.folder)
    with open(os.path.join(cache.folder, f"{key}.part"), "wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        assert first_ids(store, url) == [0, 0, 0]
    assert f"{url}: another process downloads it to {cache.folder} but received nothing for 0.1 s" in caplog.text
    assert "no space" not in caplog.text


def test_a_cache_folder_that_cannot_be_created_is_an_error(faulty_s3: FaultyProxy, tmp_path: Path, folder: str) -> None:
    known = put(tmp_path, f"s3://{faulty_s3.bucket}/d", 1)
    (tmp_path / "file").write_text("")
    store = ShardStore(2, FetchSettings(folder, str(tmp_path / "file"), 10**6, 30), known)
    with pytest.raises(StorageError, match=r"/file: cannot store shards there \(File exists\); choose another"):
        store.get(next(iter(known)), "npy")


# --- broken shards that are tolerated --------------------------------------------------------------------------------
def test_a_tolerated_broken_shard_is_not_downloaded_for_each_of_its_sequences(
    faulty_s3: FaultyProxy, tmp_path: Path, folder: str
) -> None:
    known = put(tmp_path, f"s3://{faulty_s3.bucket}/d", 3)
    urls = tuple(known)
    broken = bytearray(storage.read_bytes(urls[1]))
    broken[3000] ^= 1
    storage.write_bytes(urls[1], bytes(broken))
    source = Source(
        "s",
        urls,
        (MEMBERS,) * 3,
        num_bytes=tuple(entry.num_bytes for entry in known.values()),
        sha256=tuple(entry.sha256 for entry in known.values()),
    )
    spec = StreamSpec((source,), SEQ_LEN, VOCAB_SIZE, "npy", max_broken_fraction=0.05, fetch=FetchSettings(folder))
    reader = SampleReader(spec)
    order = DataOrder((source,), 0, OrderSettings(shuffle_shards=False, shuffle_samples=False))
    faulty_s3.requests.clear()
    filled = []
    for _batch in range(3 * MEMBERS // 5):
        samples = order.take(5)
        reader.prefetch([*order.entered(), *order.upcoming()])
        filled += reader.read(samples)[1].tolist()
    assert filled == [True] * MEMBERS + [False] * MEMBERS + [True] * MEMBERS
    (notice,) = reader.notices
    assert notice.text.startswith(f"ignored: {urls[1]}: has the sha256")
    assert faulty_s3.requests["GET"] == 2 + 3


# --- end to end ----------------------------------------------------------------------------------------------------
@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_downloads_over_a_stalling_connection(
    faulty_s3: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    base = f"s3://{faulty_s3.bucket}/d"
    known = put(tmp_path, base, 6)
    entries = [
        ManifestEntry(str(number), MEMBERS, {"num_bytes": entry.num_bytes, "sha256": entry.sha256})
        for number, entry in enumerate(known.values())
    ]
    write_manifest(f"{base}/manifest.jsonl", entries)
    data = DataConfig(
        dataset_manifest=[f"{base}/manifest.jsonl"],
        workers=workers,
        read_timeout=1.0,
        cache_dir=str(tmp_path / "cache"),
        cache_limit="1MB",
    )
    seen = []
    for _run in range(2):
        loader = build_train_loader(data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=10)
        faulty_s3.rules = [Rule("stall", method="GET", path=r"\.tar", times=2, seconds=60)]
        seen += [tuple(row[1:3]) for batch, _ in loader.batches(12) for row in batch.inputs.tolist()]
        loader.close()
    assert seen[:120] == seen[120:] and len(set(seen)) == 120, "each sequence once in a run"
    assert faulty_s3.injected == {"stall": 2}, "the second run requests no shard"
    del loader
    assert os.listdir(tmp_path / "tmp") == [] and len(names(str(tmp_path / "cache"))) == 6
