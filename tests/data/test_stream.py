"""Reading token ids from shards, and every kind of broken shard and manifest."""

from __future__ import annotations

import gzip
import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from data_helpers import SEQ_LEN, VOCAB_SIZE, places, sequence, write_shard, write_source

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.fetch import FetchSettings
from open_lm.data.order import DataOrder, OrderSettings, Source
from open_lm.data.shard_format import MEMBER_KINDS, ManifestEntry, write_manifest
from open_lm.data.sources import find_sources, find_validation_source
from open_lm.data.stream import SampleReader, StreamSpec, make_reader
from open_lm.errors import ConfigError, DataError, StorageError

LENGTH = SEQ_LEN + 1
STORED = OrderSettings(shuffle_shards=False, shuffle_samples=False)


def reader_of(*sources: Source, key: str | None = None, folder: str | None = None, **options: object) -> SampleReader:
    settings = {"seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE, "fetch": FetchSettings(folder), **options}
    return SampleReader(StreamSpec(sources, data_key=key, **settings))  # type: ignore[arg-type]


def read(reader: SampleReader, count: int, order: OrderSettings = STORED) -> tuple[np.ndarray, np.ndarray]:
    return reader.read(DataOrder(reader.spec.sources, 0, order, size_of=reader.size_of).take(count))


def one_shard(path: Path, sequences: list[np.ndarray], kind: str = "npy", size: int | None = None) -> Source:
    return Source("the source", (write_shard(path, sequences, kind),), (size,))


# --- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MEMBER_KINDS)
def test_rows_are_the_members_in_order(tmp_path: Path, kind: str) -> None:
    source = find_validation_source(write_source(tmp_path, [3, 2], kind=kind))
    rows, filled = read(reader_of(source), 5)
    assert rows.dtype == np.uint16
    assert rows.tolist() == [sequence(0, s, m).tolist() for s, m in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]]
    assert filled.all()


def test_negative_ids_count_from_the_end_and_old_end_of_text_strings_are_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    source = one_shard(path, [np.array([-2, -VOCAB_SIZE, *range(LENGTH - 2)])], "txt")
    assert read(reader_of(source), 1)[0][0, :3].tolist() == [VOCAB_SIZE - 2, 0, 0]
    data = path.read_bytes()
    text = b"[-2,-1000,0,1,2,3,4,5,6]"
    assert text in data
    old = b'["<|endoftext|>",9,8,7,6,5,4,3,2]'
    path.write_bytes(
        data.replace(b"%011o\0" % len(text), b"%011o\0" % len(old)).replace(text.ljust(40, b"\0"), old.ljust(40, b"\0"))
    )
    path.write_bytes(with_checksum(path.read_bytes()))
    assert read(reader_of(source), 1)[0].tolist() == [[0, 9, 8, 7, 6, 5, 4, 3, 2]]


def with_checksum(data: bytes) -> bytes:
    """Return the tar with the checksum of its first header corrected."""
    header = bytearray(data[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def test_long_sequences_are_cropped_at_a_fixed_position(tmp_path: Path) -> None:
    source = one_shard(tmp_path / "a.tar", [np.arange(50)] * 40)
    first = read(reader_of(source), 40)[0]
    assert np.array_equal(first, read(reader_of(source), 40)[0])
    assert (np.diff(first, axis=1) == 1).all()
    assert len(set(first[:, 0].tolist())) > 15
    assert first.max() < 50


def test_short_sequences_become_filler(tmp_path: Path) -> None:
    rows = [sequence(0, 0, m, length) for m, length in enumerate([LENGTH, LENGTH - 1, LENGTH, 3])]
    got, filled = read(reader_of(one_shard(tmp_path / "a.tar", rows)), 4)
    assert filled.tolist() == [True, False, True, False]
    assert not got[1].any()


def test_only_short_sequences_are_an_error_wherever_the_first_one_is(tmp_path: Path) -> None:
    short = [write_shard(tmp_path / f"{n}.tar", [sequence(0, n, m, 4 + n) for m in range(3)]) for n in range(3)]
    with pytest.raises(DataError, match=r"the source.*too short: the longest has 6 ids.*seq_len 8 needs 9"):
        read(reader_of(Source("the source", tuple(short), (None,) * 3)), 1)
    long = write_shard(tmp_path / "long.tar", [sequence(0, 9, 0)])
    _, filled = read(reader_of(Source("the source", (*short, long), (None,) * 4)), 10)
    assert filled.tolist() == [False] * 9 + [True]


def test_another_kind_is_used_and_reported_once(tmp_path: Path) -> None:
    source = find_validation_source(write_source(tmp_path, [3, 2], kind="json.gz"))
    reader = reader_of(source, key="txt")
    assert read(reader, 5)[1].all()
    assert [notice.text for notice in reader.notices] == [
        f"the data key is txt, but {source.name} holds json.gz; using json.gz"
    ]


def test_the_error_for_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    for wrong in (VOCAB_SIZE, -VOCAB_SIZE - 1):
        ids = np.array([*range(8), wrong], dtype=np.int64)
        source = one_shard(tmp_path / "a.tar", [sequence(0, 0, 0), ids], "json")
        for fraction in (None, 1.0):  # a wrong model does not make a member broken
            with pytest.raises(DataError, match=rf"a\.tar, member 000001\.json: found the id {wrong},.*has 1000"):
                read(reader_of(source, max_broken_fraction=fraction), 2)


# --- broken shards ---------------------------------------------------------------------------------------------------
def damage(path: str, keep: float) -> None:
    os.truncate(path, int(os.path.getsize(path) * keep) // 512 * 512 - 100)


def test_truncated_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    source = find_validation_source(write_source(tmp_path, [30, 30]))
    damage(source.shards[1], 0.5)
    with pytest.raises(DataError, match=r"00001\.tar: cut short"):
        read(reader_of(source), 60)


def test_manifest_that_disagrees_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    write_source(tmp_path, [4, 5])
    write_manifest(tmp_path / "manifest.jsonl", [ManifestEntry("00000", 4), ManifestEntry("00001", 6)])
    source = find_validation_source(str(tmp_path / "manifest.jsonl"))
    with pytest.raises(DataError, match=r"00001\.tar: holds 5 sequences, but its manifest lists 6; recreate"):
        read(reader_of(source), 10)


def test_empty_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.tar: the file is empty"):
        read(reader_of(Source("s", (str(tmp_path / "empty.tar"),), (None,))), 1)
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read \(No such file"):
        read(reader_of(Source("s", (str(tmp_path / "gone.tar"),), (1,))), 1)


def test_the_error_for_a_broken_member_names_it(tmp_path: Path) -> None:
    source = one_shard(tmp_path / "a.tar", [sequence(0, 0, m) for m in range(3)], "txt")
    path = Path(source.shards[0])
    path.write_bytes(path.read_bytes().replace(b"[0,0,1,", b"[0,0,x,"))
    with pytest.raises(DataError, match=r"a\.tar, member 000001\.txt: not a valid txt member"):
        read(reader_of(source), 3)


def test_tolerated_broken_shards_become_filler_and_are_named(tmp_path: Path) -> None:
    source = find_validation_source(write_source(tmp_path, [20, 20, 20]))
    damage(source.shards[1], 0.5)
    reader = reader_of(source, max_broken_fraction=0.09)
    _, filled = read(reader, 60)
    assert filled.tolist() == [True] * 20 + [False] * 20 + [True] * 20
    assert [notice.text.partition(": cut")[0] for notice in reader.notices] == [f"ignored: {source.shards[1]}"]


def test_too_many_broken_sequences_are_an_error(tmp_path: Path) -> None:
    source = find_validation_source(write_source(tmp_path, [20, 120]))
    damage(source.shards[1], 0.5)
    with pytest.raises(DataError, match=r"91 of 111 sequences are broken.*--data-tolerate-error-p 0\.09"):
        read(reader_of(source, max_broken_fraction=0.09), 140)


def test_a_broken_shard_of_unknown_size_counts_like_the_shard_before(tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [60, 60, 60, 1], manifest=False)
    source = find_validation_source(pattern)
    damage(source.shards[1], 0.5)
    reader = reader_of(source, max_broken_fraction=0.09)
    assert len(read(reader, 121)[0]) == 121
    damage(source.shards[2], 0.5)
    with pytest.raises(DataError, match="120 of 120 sequences are broken"):
        read(reader_of(source, max_broken_fraction=0.09), 121)


# --- remote shards ---------------------------------------------------------------------------------------------------
def upload(folder: Path, target: str) -> None:
    for path in folder.iterdir():
        storage.upload(str(path), f"{target}/{path.name}")


def test_s3_shards_are_downloaded_once_and_removed_again(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "local", [3] * 12)
    upload(tmp_path / "local", f"s3://{s3_bucket}/data")
    source = find_validation_source(f"s3://{s3_bucket}/data/{{00000..00011}}.tar")
    assert source.sizes == (3,) * 12
    fetched: list[str] = []
    read_parts = storage.read_parts
    monkeypatch.setattr(storage, "read_parts", lambda info, *rest: fetched.append(info.url) or read_parts(info, *rest))
    folder = tmp_path / "fetched"
    folder.mkdir()
    reader = reader_of(source, folder=str(folder))
    order = DataOrder([source], 0, OrderSettings(shuffle_shards=False, max_passes=1), size_of=reader.size_of)
    taken = []
    for _batch in range(18):
        samples = order.take(2)
        reader.prefetch(order.upcoming())
        taken += places(reader.read(samples)[0])
    assert sorted(taken) == [(0, s, m) for s in range(12) for m in range(3)]
    assert sorted(fetched) == sorted(source.shards)
    assert 1 <= len(list(folder.glob("*.tar"))) <= 10


def test_missing_s3_shards_are_listed_together(tmp_path: Path, s3_bucket: str) -> None:
    write_source(tmp_path, [1], manifest=False)
    upload(tmp_path, f"s3://{s3_bucket}/data")
    with pytest.raises(DataError) as caught:
        find_validation_source(f"s3://{s3_bucket}/data/{{00000..00002}}.tar")
    assert f"s3://{s3_bucket}/data/00001.tar" in str(caught.value)
    assert f"s3://{s3_bucket}/data/00002.tar" in str(caught.value)
    assert "00000" not in str(caught.value)


def test_unreachable_s3_names_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=r"s3://nowhere/.*http://127\.0\.0\.1:9"):
        find_validation_source("s3://nowhere/data/{00000..00003}.tar")


@pytest.mark.processes
@pytest.mark.parametrize("command", ["cat {}/data/{{00000..00001}}.tar", "gunzip -c {}/data/{{00000..00001}}.tar.gz"])
def test_pipe_commands(command: str, tmp_path: Path) -> None:
    write_source(tmp_path / "data", [2, 3])
    for path in (tmp_path / "data").glob("*.tar"):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    source = find_validation_source(f"pipe:{command.format(tmp_path)}")
    assert source.sizes == (None, None)
    (tmp_path / "fetched").mkdir()
    rows, _ = read(reader_of(source, folder=str(tmp_path / "fetched")), 5)
    assert places(rows) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, 2)]


def test_http_shards(tmp_path: Path) -> None:
    write_source(tmp_path / "data", [2, 3], manifest=False)
    (tmp_path / "fetched").mkdir()
    handler = partial(QuietHandler, directory=str(tmp_path / "data"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/{{00000..00001}}.tar"
        rows, _ = read(reader_of(find_validation_source(url), folder=str(tmp_path / "fetched")), 5)
        with pytest.raises(StorageError, match=r"00007\.tar: no such file"):
            read(reader_of(Source("s", (url.replace("{00000..00001}", "00007"),), (1,)), folder=str(tmp_path)), 1)
        server.shutdown()
        thread.join()
    assert len(set(places(rows))) == 5


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        """Log nothing."""


@pytest.mark.processes
def test_the_error_for_a_failing_pipe_command_names_it(tmp_path: Path) -> None:
    source = Source("s", (f"pipe:cat {tmp_path}/none.tar",), (None,))
    with pytest.raises(
        DataError,
        match=r"pipe:cat .*none\.tar: exit status 1, in the last of 3 attempts; see the command's own mess",
    ):
        read(reader_of(source, folder=str(tmp_path)), 1)
    assert not list(tmp_path.glob("*.tar"))


# --- the flags -------------------------------------------------------------------------------------------------------
def test_all_missing_shards_of_all_sources_are_reported_together(tmp_path: Path) -> None:
    write_source(tmp_path / "a", [1, 1], manifest=False)
    with pytest.raises(DataError) as caught:
        find_sources(DataConfig(train_data=[f"{tmp_path}/a/{{00000..00003}}.tar", f"{tmp_path}/b/*.tar"]))
    for name in ("a/00002.tar", "a/00003.tar", "b/*.tar"):
        assert name in str(caught.value)
    assert "00001" not in str(caught.value)


def test_missing_shards_of_a_manifest_are_listed(tmp_path: Path) -> None:
    manifest = write_source(tmp_path, [1, 1])
    write_manifest(tmp_path / "manifest.jsonl", [ManifestEntry(f"{n:05d}", 1) for n in range(4)])
    with pytest.raises(DataError, match=r"00002\.tar[\s\S]*00003\.tar"):
        find_sources(DataConfig(dataset_manifest=[manifest]))


@pytest.mark.parametrize("shard", ["pipe:touch x", "/etc/passwd", "s3://other/x"])
def test_a_manifest_cannot_list_commands_or_other_folders(tmp_path: Path, shard: str) -> None:
    write_manifest(tmp_path / "manifest.jsonl", [ManifestEntry(shard, 1)])
    with pytest.raises(DataError, match="outside its folder"):
        find_sources(DataConfig(dataset_manifest=[str(tmp_path / "manifest.jsonl")]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data_mix_weights": [1.0]}, "found 1 values for 2 sources"),
        ({"train_data_mix_weights": [0.0, 0.0]}, "expected 0 or more, and at least one above 0"),
        ({"train_data_mix_weights": [1.0, float("nan")]}, "expected numbers"),
        ({"train_data_upsampling_factors": "1::2::3"}, "found 3 factors for 2 sources"),
        ({"train_data_upsampling_factors": "1::x"}, "expected numbers"),
        ({"train_data_upsampling_factors": "1::0"}, "above 0"),
    ],
)
def test_weights_and_factors_that_do_not_fit(tmp_path: Path, options: dict[str, object], message: str) -> None:
    patterns = [write_source(tmp_path / name, [1], manifest=False) for name in "ab"]
    with pytest.raises(ConfigError, match=message):
        find_sources(DataConfig(train_data=patterns, **options))  # type: ignore[arg-type]


def test_factors_of_sources_and_of_joined_patterns(tmp_path: Path) -> None:
    patterns = [write_source(tmp_path / name, [1, 1], manifest=False) for name in "ab"]
    two = find_sources(DataConfig(train_data=patterns, train_data_upsampling_factors="1::2.5"))
    assert [float(source.weight) for source in two] == [1, 2.5]
    assert [set(map(float, source.repeats)) for source in two] == [{1.0}, {2.5}]
    (joined,) = find_sources(DataConfig(train_data=["::".join(patterns)], train_data_upsampling_factors="1::2"))
    assert list(map(float, joined.repeats)) == [1, 1, 2, 2]


def test_no_data_at_all() -> None:
    with pytest.raises(ConfigError, match="--train-data, --dataset-manifest, --train-text or --dataset-type synthetic"):
        find_sources(DataConfig())


# --- synthetic data, workers -----------------------------------------------------------------------------------------
def test_synthetic_sequences_are_random_ids_that_never_change() -> None:
    sources = find_sources(DataConfig(dataset_type="synthetic"))
    spec = StreamSpec(sources, seq_len=300, vocab_size=7, data_key="txt")
    first, filled = make_reader(spec).read(DataOrder(sources, 0).take(20))
    again, _ = make_reader(spec).read(DataOrder(sources, 0).take(20))
    other, _ = make_reader(spec).read(DataOrder(sources, 1).take(20))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert filled.all()
    assert np.bincount(first.ravel(), minlength=7).min() > 600
    assert len(np.unique(first, axis=0)) == 20


def test_a_new_reader_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    reader = reader_of(find_validation_source(write_source(tmp_path, [3])))
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(read(copy, 3)[0], read(reader, 3)[0])


def test_at_most_a_few_shards_stay_open(tmp_path: Path) -> None:
    source = find_validation_source(write_source(tmp_path, [1] * 40))
    reader = reader_of(source)
    before = len(os.listdir("/proc/self/fd"))
    order = DataOrder(reader.spec.sources, 0, STORED)
    for _ in range(20):
        reader.read(order.take(2))
    assert len(os.listdir("/proc/self/fd")) - before < 8
