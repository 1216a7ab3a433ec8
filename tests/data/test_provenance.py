"""The origin of a run's data: read dataset.json, write data.json, describe changes, and reject changed data."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from data_helpers import SEQ_LEN, VOCAB_SIZE, jsonable, places, sequence, write_shard, write_source
from datapreprocess_helpers import make

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.loader import TrainLoader, build_train_loader
from open_lm.data.order import Source
from open_lm.data.provenance import describe, differences, end_of_text_id, read, read_dataset, write
from open_lm.data.shard_format import ManifestEntry, write_manifest
from open_lm.data.sources import find_sources, find_validation_source
from open_lm.errors import DataError
from open_lm.utils.make_wds_manifest import main as make_manifest

SETTINGS = {"tokenizer": "/here/t.json", "tokenizer_fingerprint": "f" * 8, "eot_id": 3, "seq_len": SEQ_LEN, "seed": 42}


def write_dataset(folder: Path, inputs: tuple[dict[str, Any], ...] = (), **settings: object) -> None:
    record = {"tool": {}, "settings": SETTINGS | settings, "inputs": inputs, "counts": {"tokens": 1}}
    (folder / "dataset.json").write_text(json.dumps(record))


def sources_of(*manifests: str, **options: Any) -> tuple[Source, ...]:
    return find_sources(DataConfig(dataset_manifest=list(manifests), data_key="npy", **options))


def with_manifest(folder: Path, sizes: list[int], source: int = 0) -> str:
    """Write a source whose manifest has sizes in bytes and sha256, like the preprocessor's."""
    write_source(folder, sizes, source, manifest=False)
    make_manifest(["--data-dir", str(folder)])
    return str(folder / "manifest.jsonl")


def loader_of(data: DataConfig, **options: Any) -> TrainLoader:
    return build_train_loader(data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=4, **options)


# --- sources ---------------------------------------------------------------------------------------------------------
@pytest.mark.processes
@pytest.mark.parametrize("pattern", ["manifest.jsonl", "*.tar", "{00000..00001}.tar"])
def test_a_source_has_the_fields_of_manifest_and_dataset_json(tmp_path: Path, pattern: str) -> None:
    with_manifest(tmp_path, [3, 4])
    write_dataset(tmp_path)
    name = str(tmp_path / pattern)
    flag = "dataset_manifest" if name.endswith(".jsonl") else "train_data"
    (source,) = find_sources(DataConfig(**{flag: [name]}, data_key="npy"))
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert source.num_bytes == tuple((tmp_path / f"0000{n}.tar").stat().st_size for n in range(2))
    assert source.sha256 == tuple(line["sha256"] for line in lines) and len(source.sha256[0]) == 64
    assert source.datasets[0]["settings"]["eot_id"] == 3
    assert source.fingerprint.count(":") == 3 and all(source.fingerprint.split(":"))


def test_fields_without_a_manifest_are_unknown(tmp_path: Path) -> None:
    (source,) = find_sources(DataConfig(train_data=[write_source(tmp_path, [3, 4], manifest=False)]))
    assert (source.num_bytes, source.sha256, source.datasets) == ((None, None), ("", ""), ())
    assert source.fingerprint.split(":")[1:] == ["", "", ""]
    assert end_of_text_id([source]) is None


@pytest.mark.processes
def test_the_same_data_elsewhere_has_the_same_fingerprint(tmp_path: Path, s3_bucket: str) -> None:
    with_manifest(tmp_path / "here", [3, 4])
    inputs = ({"url": "/raw/a", "etag": "1", "num_bytes": 5, "sha256": "ab"},)
    write_dataset(tmp_path / "here", inputs)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    write_dataset(tmp_path / "there", ({**inputs[0], "url": "s3://raw/a", "etag": "2"},), tokenizer="/there/t.json")
    for path in (tmp_path / "here").iterdir():
        storage.upload(str(path), f"s3://{s3_bucket}/data/{path.name}")
    urls = [
        f"{tmp_path}/here/manifest.jsonl",
        f"{tmp_path}/there/manifest.jsonl",
        f"s3://{s3_bucket}/data/manifest.jsonl",
    ]
    assert len({sources_of(url)[0].fingerprint for url in urls}) == 1
    changed = {
        "tokenizer": {"tokenizer_fingerprint": "g"},
        "input": {"inputs": ({**inputs[0], "sha256": "cd"},)},
    }
    for change in changed.values():
        write_dataset(tmp_path / "there", **{"inputs": inputs, **change})  # type: ignore[arg-type]
        assert sources_of(urls[1])[0].fingerprint != sources_of(urls[0])[0].fingerprint


def test_each_dataset_json_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_source(tmp_path / name, [1] * 5)
        write_dataset(tmp_path / name)
    requested = []
    info = storage.info
    monkeypatch.setattr(storage, "info", lambda url: (requested.append(str(url)), info(url))[1])  # type: ignore[func-returns-value]
    pattern = f"{tmp_path}/a/*.tar::{tmp_path}/b/*.tar"
    assert [len(source.datasets) for source in find_sources(DataConfig(train_data=[pattern, pattern]))] == [2, 2]
    assert sorted(url for url in requested if url.endswith("dataset.json")) == [
        f"{tmp_path}/{n}/dataset.json" for n in "ab"
    ]


def test_dataset_json_of_other_tools_and_damaged_ones(tmp_path: Path) -> None:
    manifest = write_source(tmp_path, [3])
    (tmp_path / "dataset.json").write_text('{"name": "of something else"}')
    assert read_dataset(str(tmp_path)) is None
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json: not JSON .* copy it again"):
        sources_of(manifest)


def test_an_unreadable_dataset_json_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_source(tmp_path, [3])
    (tmp_path / "dataset.json").mkdir()  # exists, but cannot be read
    monkeypatch.setattr(storage, "info", lambda url: url)
    with caplog.at_level(logging.WARNING):
        assert sources_of(manifest)[0].datasets == ()
    assert "cannot read dataset.json" in caplog.text


# --- the end-of-text id ----------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("in_process")
def test_data_from_the_preprocessor(raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str) -> None:
    folder = make(raw[0], tmp_path / "out", small_tokenizer) / "0"
    sources = sources_of(f"{folder}/manifest.jsonl")
    assert end_of_text_id(sources) == 3
    assert end_of_text_id([find_validation_source(f"{folder}/*.tar")]) == 3
    assert all(sources[0].fingerprint.split(":"))
    settings = sources[0].datasets[0]["settings"]
    assert settings["seq_len"] == 32 and settings["tokenizer_fingerprint"] and "tokenizer" not in settings


def test_sources_with_different_end_of_text_ids(tmp_path: Path) -> None:
    manifests = [write_source(tmp_path / name, [3], number) for number, name in enumerate("abc")]
    write_dataset(tmp_path / "a")
    assert end_of_text_id(sources_of(*manifests)) == 3  # sources without one do not count
    write_dataset(tmp_path / "b", eot_id=0)
    with pytest.raises(DataError, match=r"different end-of-text[\s\S]*a/manifest\.jsonl: 3[\s\S]*b/manifest\.jsonl: 0"):
        end_of_text_id(sources_of(*manifests))


# --- data.json -------------------------------------------------------------------------------------------------------
@pytest.mark.processes
def test_a_description_is_written_and_read_again(tmp_path: Path) -> None:
    described = describe(sources_of(with_manifest(tmp_path / "a", [3, 4])))
    write(str(tmp_path / "data.json"), described)
    assert read(str(tmp_path / "data.json")) == described
    assert differences(described, described) == []
    row = described["sources"][0]["shards"][1]
    assert (row["shard"], row["num_sequences"], set(row)) == (
        "00001",
        4,
        {"shard", "num_sequences", "num_bytes", "sha256"},
    )
    assert str(tmp_path) not in json.dumps(described).replace(described["sources"][0]["name"], "")
    assert read(str(tmp_path / "none.json")) is None
    (tmp_path / "other.json").write_text('{"format": 99}')
    assert read(str(tmp_path / "other.json")) is None


def test_descriptions_contain_no_secrets_of_addresses() -> None:
    shards = ("https://me:password@host/a/0.tar?signature=secret", "pipe:curl -H 'token: secret' host/1.tar")
    text = json.dumps(describe([Source("https://me:password@host/a/*.tar", shards, (1, 1))]))
    assert "password" not in text and "secret" not in text
    assert '"shard": "0"' in text


def test_every_change_is_a_sentence() -> None:
    settings = {"digest": "1", "settings": {"seq_len": 8, "eot_id": 3}, "inputs": "x"}
    a = Source(
        "a",
        ("x/0.tar", "x/1.tar", "x/2.tar"),
        (5, 5, 5),
        Fraction(3),
        (),
        (1, 1, 1),
        ("s", "t", "u"),
        "npy",
        (settings,),
    )
    b = Source("b", ("y/0.tar",), (7,))
    other = {"digest": "2", "settings": {"seq_len": 16, "eot_id": 3}, "inputs": "y"}
    now = [
        replace(
            a,
            shards=("x/0.tar", "x/2.tar", "x/3.tar"),
            sizes=(6, 5, 5),
            weight=Fraction(1),
            num_bytes=(2, 1, 1),
            sha256=("z", "u", "v"),
            data_key="txt",
            datasets=(other,),
        ),
        b,
    ]
    assert differences(describe([a, b]), describe(now)) == [
        "a: 1 shard is new: 3",
        "a: 1 shard is missing: 1",
        "a: 1 shard is changed in content (sha256): 0",
        "a: 1 shard is changed in size (bytes): 0",
        "a: 1 shard is changed in number of sequences: 0",
        "a: --data-key was npy, now it is txt",
        "a: dataset.json: seq_len was 8, now it is 16",
        "a: dataset.json: the inputs or their contents changed",
        "the weights were 3 : 1, now they are 1 : 1",
    ]


def test_changes_of_order_factors_and_sources() -> None:
    a = Source("a", ("x/0.tar", "x/1.tar"), (5, 5))
    b, c = Source("b", ("y/7.tar",), (7,)), Source("c", ("z/9.tar",), (7,))
    old = describe([a, b])
    assert differences(old, describe([b, a])) == ["the order of the sources changed"]
    assert differences(old, describe([replace(b, name="moved"), a])) == ["the order of the sources changed"]
    assert differences(old, describe([a, b, c])) == ["c is new"]
    assert differences(old, describe([a])) == ["b is missing"]
    reversed_a = replace(a, shards=a.shards[::-1], repeats=(Fraction(1), Fraction(2)))
    assert differences(old, describe([reversed_a, b])) == [
        "a: the order of its shards changed",
        "a: its upsampling factors changed",
    ]
    scaled = [replace(source, weight=Fraction(7)) for source in (a, b)]
    assert differences(old, describe(scaled)) == []
    same_names = Source("a", ("x/0.tar", "y/0.tar"), (5, 5))
    assert differences(describe([same_names]), describe([replace(same_names, sizes=(5, 6))])) == [
        "a: 1 shard is changed in number of sequences: 0 (number 2)"
    ]
    many = Source("a", tuple(f"x/{n}.tar" for n in range(9)), (5,) * 9)
    assert differences(old, describe([many, b])) == ["a: 7 shards are new: 2, 3, 4, 5, 6 and 2 more"]


# --- resuming --------------------------------------------------------------------------------------------------------
@pytest.mark.processes
def test_a_run_on_changed_shards_is_rejected_or_resumes_if_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifests = [with_manifest(tmp_path / "a", [8, 8], 0), with_manifest(tmp_path / "b", [8, 8], 1)]
    data = DataConfig(dataset_manifest=manifests, multiple_data_passes=True, data_key="npy", workers=0)
    loader = loader_of(data)
    list(loader.batches(3))
    state = jsonable(loader.state)
    expected = [place for batch, _ in loader.batches(2) for place in places(batch.inputs.numpy()) if place[0] == 0]
    write_shard(tmp_path / "b" / "00001.tar", [sequence(9, 1, m) for m in range(8)])  # of the same size
    make_manifest(["--data-dir", str(tmp_path / "b")])
    with pytest.raises(
        DataError, match=r"--allow-changed-data\): .*b/manifest\.jsonl differs in the sha256 of its shards"
    ):
        loader_of(data, state=state)
    rejected = loader_of(data)
    with pytest.raises(DataError, match="differs in the sha256 of its shards"):
        rejected.rewind(state)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        allowed = loader_of(replace(data, allow_changed_data=True), state=state)
        loader_of(replace(data, allow_changed_data=True), state=state, rank=1, world_size=2)
    (warning,) = [record.message for record in caplog.records]
    assert "continuing on the current data" in warning and "starts from the beginning" in warning
    taken = [place for batch, _ in allowed.batches(2) for place in places(batch.inputs.numpy()) if place[0] == 0]
    assert taken == expected
    allowed.rewind(state)  # type: ignore[arg-type]
    assert [p for batch, _ in allowed.batches(2) for p in places(batch.inputs.numpy()) if p[0] == 0] == expected


@pytest.mark.processes
def test_new_manifest_fields_do_not_change_the_data(tmp_path: Path) -> None:
    manifest = write_source(tmp_path, [8, 8])
    data = DataConfig(dataset_manifest=[manifest], data_key="npy", workers=0)
    loader = loader_of(data)
    list(loader.batches(1))
    state = jsonable(loader.state)
    make_manifest(["--data-dir", str(tmp_path)])
    write_dataset(tmp_path)
    loader_of(data, state=state)
    write_manifest(manifest, [ManifestEntry("00000", 8), ManifestEntry("00001", 7)])
    with pytest.raises(
        DataError, match=r"differs in the numbers of sequences of its shards .*\(it had 16, now it has 15\)"
    ):
        loader_of(data, state=state)
