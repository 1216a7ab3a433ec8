"""Test transfers to S3 stores that ignore or refuse checksum fields, as several that are not Amazon's do.

The store is a server on loopback that answers as they do; end to end for training and preprocessing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from datapreprocess_helpers import documents, write_jsonl
from faulty_proxy import FaultyProxy, Rule
from strict_s3 import StrictS3, write_certificate

from open_lm import storage
from open_lm.errors import StorageError
from open_lm.storage import checksums as storage_checksums
from open_lm.storage import retries as storage_errors
from open_lm.storage import s3 as storage_s3

SMALL, LARGE = 1000, 12 << 20


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use parts of S3's smallest size, no pauses between attempts, and forget the stores of other tests."""
    monkeypatch.setattr(storage_s3, "_PART_BYTES", 5 << 20)
    monkeypatch.setattr(storage_errors, "_pause", lambda seconds: None)
    monkeypatch.setattr(storage_checksums, "_refusing_stores", set())


two_kinds = pytest.mark.parametrize("strict_s3", ["swift", "minio"], indirect=True)
only_swift = pytest.mark.parametrize("strict_s3", ["swift"], indirect=True)


def source(folder: Path, num_bytes: int) -> tuple[Path, bytes]:
    """Write a file of random bytes, and return its path and content."""
    data = os.urandom(num_bytes)
    (folder / "source").write_bytes(data)
    return folder / "source", data


@pytest.mark.parametrize("prefix", ["", storage.FSSPEC_PREFIX])
@pytest.mark.parametrize("num_bytes", [0, SMALL, LARGE])
def test_uploads_to_a_store_without_checksum_fields(
    strict_s3: StrictS3, tmp_path: Path, num_bytes: int, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path, data = source(tmp_path, num_bytes)
    for name in ("one", "two"):
        url = f"{prefix}s3://bucket/folder/{name}"
        storage.upload(path, url)
        assert strict_s3.objects[f"bucket/folder/{name}"] == data
        storage.download(url, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == data and storage.read_bytes(url) == data
    assert len(storage.list_infos(f"{prefix}s3://bucket/folder")) == 2
    assert strict_s3.uploads == {}, "no unfinished uploads are left"
    refused = {"minio": {"NotImplemented": 1}, "ceph": {"InvalidArgument": 1}}.get(strict_s3.kind, {})
    del strict_s3.refused["NoSuchKey"]  # s3fs asks for objects that may be folders
    assert strict_s3.refused == refused, "the first refusal is remembered"
    assert caplog.text.count("does not support checksum fields") == (bool(refused) if prefix else 1)
    if not prefix:
        assert strict_s3.md5_headers == 2 * max(1, -(-num_bytes // (5 << 20)))


@pytest.mark.parametrize("prefix", ["", storage.FSSPEC_PREFIX])
def test_uploads_over_https_to_a_store_without_trailers(
    tmp_path: Path, prefix: str, strict_s3: StrictS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over https, s3fs sends the checksum as a trailer of the body."""
    write_certificate(tmp_path / "certificate.pem")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "certificate.pem"))
    with StrictS3(strict_s3.kind, tmp_path / "certificate.pem") as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        path, data = source(tmp_path, LARGE)
        storage.upload(path, f"{prefix}s3://bucket/name")
        assert store.objects["bucket/name"] == data == storage.read_bytes(f"{prefix}s3://bucket/name")
        assert store.refused["NotImplemented"] == (1 if prefix or strict_s3.kind == "minio" else 0)


@only_swift
def test_an_upload_above_32_mib_with_the_parts_of_a_real_run(
    strict_s3: StrictS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_s3, "_PART_BYTES", 16 << 20)
    path, data = source(tmp_path, (33 << 20) + 1)
    storage.upload(path, "s3://bucket/large")
    assert strict_s3.objects["bucket/large"] == data and strict_s3.md5_headers == 3


@pytest.mark.parametrize("num_bytes", [SMALL, LARGE])
def test_data_that_the_store_damages_are_sent_again_and_never_accepted(
    strict_s3: StrictS3, tmp_path: Path, num_bytes: int
) -> None:
    path, data = source(tmp_path, num_bytes)
    storage.upload(path, "s3://bucket/first")  # so that the store is known
    strict_s3.corrupt = 2
    storage.upload(path, "s3://bucket/name")
    assert strict_s3.objects["bucket/name"] == data and strict_s3.corrupt == 0
    strict_s3.corrupt = 1000
    with pytest.raises(StorageError, match=r"s3://bucket/other: .*checksum mismatch.*the store has MD5 .*, expected"):
        storage.upload(path, "s3://bucket/other")
    assert strict_s3.uploads == {}


@only_swift
def test_a_completion_whose_response_is_lost_is_verified_by_etag(
    strict_s3: StrictS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = source(tmp_path, LARGE)
    with FaultyProxy(strict_s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.write_bytes("s3://bucket/small", b"x")
        proxy.rules = [Rule("reset_after", method="POST", path="uploadId", times=1)]
        storage.upload(path, "s3://bucket/name")
        assert proxy.injected["reset_after"] == 1 and strict_s3.objects["bucket/name"] == data
        # An older object of the same size is not taken for the upload.
        proxy.rules = [Rule("reset_after", method="POST", path="uploadId", times=1)]
        strict_s3.lose_completions = 1
        with pytest.raises(StorageError, match="checksum mismatch after upload: the store has ETag"):
            storage.upload(source(tmp_path, LARGE)[0], "s3://bucket/name")


@only_swift
def test_settings_of_the_environment_are_honoured(
    strict_s3: StrictS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = source(tmp_path, LARGE)
    storage.write_bytes("s3://bucket/default", b"x")
    storage.read_bytes("s3://bucket/default")
    assert "x-amz-checksum-crc32" in strict_s3.checksum_headers
    monkeypatch.setattr(storage_checksums, "_refusing_stores", set())
    strict_s3.checksum_headers.clear()
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    storage.upload(path, "s3://bucket/name")
    assert storage.read_bytes("s3://bucket/name") == data == strict_s3.objects["bucket/name"]
    assert strict_s3.checksum_headers == {} and strict_s3.refused == {}
    assert storage_checksums._refusing_stores == set()


def test_amazon_style_stores_keep_their_checksums(s3_bucket: str, tmp_path: Path) -> None:
    import boto3

    for name, num_bytes in (("small", SMALL), ("large", LARGE)):
        storage.upload(source(tmp_path, num_bytes)[0], f"s3://{s3_bucket}/{name}")
        head = boto3.client("s3").head_object(Bucket=s3_bucket, Key=name, ChecksumMode="ENABLED")
        assert "ChecksumCRC32" in head
    assert storage_checksums._refusing_stores == set()


def test_other_errors_are_not_taken_for_a_refusal_of_checksums(s3_bucket: str) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        storage.write_text(f"s3://{s3_bucket}-not/x", "x")
    assert storage_checksums._refusing_stores == set()


# --- end to end ------------------------------------------------------------------------------------------------------
@pytest.fixture
def run_flags(shared_dir: Path, tmp_path: Path) -> Iterator[list[str]]:
    """Return the flags of a run of two steps whose checkpoints are uploaded in parts."""
    shape = {"hidden_dim": 32, "n_layers": 1, "n_heads": 2, "seq_len": 64, "vocab_size": 50432}
    (tmp_path / "model.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    data = shared_dir / "compat/run/data/manifest.jsonl"
    yield [
        "--model", str(tmp_path / "model.json"), "--dataset-manifest", str(data), "--data-key", "json.gz",
        "--train-num-samples", "1024", "--global-batch-size", "8", "--workers", "0", "--precision", "fp32",
        "--warmup", "1", "--lr-scheduler", "const", "--logs", str(tmp_path / "logs"), "--name", "run",
    ]  # fmt: skip


@two_kinds
def test_a_run_is_copied_to_a_store_without_checksum_fields(
    strict_s3: StrictS3, run_flags: list[str], tmp_path: Path
) -> None:
    from open_lm.main import main

    main([*run_flags, "--epochs", "1", "--remote-sync", "s3://bucket/runs"])
    local = {path.relative_to(tmp_path / "logs"): path.read_bytes() for path in (tmp_path / "logs").rglob("*.pt")}
    assert local and max(map(len, local.values())) > 2 * storage_s3._PART_BYTES
    for path, content in local.items():
        assert strict_s3.objects[f"bucket/runs/{path}"] == content
    assert strict_s3.uploads == {}


@two_kinds
def test_a_run_resumes_from_checkpoints_in_a_store_without_checksum_fields(
    strict_s3: StrictS3, run_flags: list[str], tmp_path: Path
) -> None:
    from open_lm.main import main

    flags = [*run_flags, "--checkpoint-dir", "s3://bucket/checkpoints"]
    main([*flags, "--epochs", "1"])
    main([*flags, "--epochs", "2", "--resume", "latest"])
    steps = [
        json.loads(line).get("step") for line in (tmp_path / "logs/run/metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert max(step for step in steps if step is not None) == 4
    assert any(name.endswith("step_00000004/checkpoint.json") for name in strict_s3.objects)
    assert strict_s3.uploads == {}


@pytest.mark.usefixtures("in_process")  # a Ray session of other tests has their environment
def test_preprocessing_writes_to_a_store_without_checksum_fields(
    strict_s3: StrictS3, tmp_path: Path, small_tokenizer: str
) -> None:
    from open_lm.datapreprocess import make_2048

    write_jsonl(tmp_path / "raw.jsonl", documents(40, seed=1))
    outputs = {"local": str(tmp_path / "out"), "remote": "s3://bucket/out"}
    for output in outputs.values():
        make_2048.main(["--input-files", str(tmp_path / "raw.jsonl"), "--output-dir", output, "--tokenizer",
                        small_tokenizer, "--seqlen", "32", "--num-workers", "2"])  # fmt: skip
    expected = {str(path.relative_to(tmp_path)): path for path in (tmp_path / "out").rglob("*.tar")}
    assert expected
    for name, path in expected.items():
        assert strict_s3.objects[f"bucket/{name}"] == path.read_bytes()
