"""Test that storage retries, detects or reports network faults, busy stores and full disks, and never truncates files.

The faults are real: a proxy between boto3 or s3fs and a real S3 server returns errors, truncates bodies and resets
connections.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from faulty_proxy import KINDS, FaultyProxy, Rule

from open_lm import storage
from open_lm.errors import StorageError
from open_lm.storage import paths as storage_files
from open_lm.storage import retries as storage_errors
from open_lm.storage import s3 as storage_s3

FAULTS = [kind for kind in KINDS if kind not in ("delay", "stall")]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use blocks and parts so small that a 12 MiB file needs many requests."""
    monkeypatch.setattr(storage_files, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(storage_files, "PART_BYTES", 1 << 20)
    monkeypatch.setattr(storage_s3, "_PART_BYTES", 5 << 20)  # S3's minimum


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the pauses between attempts instead of sleeping."""
    recorded: list[float] = []
    monkeypatch.setattr(storage_errors, "_pause", recorded.append)
    return recorded


def stored_object(proxy: FaultyProxy, name: str) -> bytes:
    """Return an object from the server behind the proxy."""
    client = boto3.client("s3", endpoint_url=proxy.upstream.geturl())
    data: bytes = client.get_object(Bucket=proxy.bucket, Key=name)["Body"].read()
    return data


def pending_uploads(proxy: FaultyProxy) -> list[Any]:
    """Return the multipart uploads that are neither completed nor aborted."""
    client = boto3.client("s3", endpoint_url=proxy.upstream.geturl())
    return client.list_multipart_uploads(Bucket=proxy.bucket).get("Uploads", [])


# ---------------------------------------------------------------------------------------------- every kind of request
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.usefixtures("small", "pauses")
def test_every_request_survives_every_fault(faulty_s3: FaultyProxy, tmp_path: Path, kind: str) -> None:
    """Make the first request of each operation fail, and the first three of a multipart upload and a ranged read."""
    data = os.urandom(12 << 20)
    (tmp_path / "big").write_bytes(data)
    url = f"s3://{faulty_s3.bucket}/folder/big"

    @contextlib.contextmanager
    def faults(method: str, path: str, times: int = 1) -> Any:
        before = faulty_s3.injected[kind]
        faulty_s3.rules = [Rule(kind, method=method, path=path, times=times)]
        yield
        assert faulty_s3.injected[kind] - before == times, (method, path)

    with faults("PUT", "partNumber", times=3):
        storage.upload(tmp_path / "big", url)
    with faults("POST", "uploads"):
        storage.upload(tmp_path / "big", url)
    with faults("POST", "uploadId"):
        storage.upload(tmp_path / "big", url)
    with faults("HEAD", "big"):
        storage.upload(tmp_path / "big", url)
    assert stored_object(faulty_s3, "folder/big") == data
    with faults("GET", "big", times=3):
        storage.download(url, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    with faults("GET", "big", times=3), storage.open_file(url) as file:
        assert b"".join(iter(lambda: file.read(300_000), b"")) == data
    with faults("HEAD", "big"):
        assert storage.size(url) == len(data)
    with faults("PUT", "small"):
        storage.write_text(f"s3://{faulty_s3.bucket}/folder/small", "text")
    with faults("GET", "list-type"):
        assert len(storage.glob_infos(f"s3://{faulty_s3.bucket}/*/*")) == 2
    with faults("DELETE", "big"):
        storage.remove(url)
    assert storage.list_files(f"s3://{faulty_s3.bucket}/folder") == [f"s3://{faulty_s3.bucket}/folder/small"]


@pytest.mark.usefixtures("small", "pauses")
@pytest.mark.parametrize("prefix", ["", storage.FSSPEC_PREFIX])
def test_many_faults_change_no_byte(faulty_s3: FaultyProxy, tmp_path: Path, prefix: str) -> None:
    """Make every seventh request fail, with every kind of fault in turn, for boto3 and s3fs."""
    data = os.urandom(12 << 20)
    (tmp_path / "big").write_bytes(data)
    # A lost response to "?uploads" leaves an upload without parts that the client cannot know about.
    kinds, path = FAULTS * 2, r"^(?!.*\?uploads)"
    faulty_s3.rules = [Rule(kind, skip=7 * number, times=1, path=path) for number, kind in enumerate(kinds)]
    if prefix:  # s3fs waits for seconds after the faults that it retries itself: use those that it does not retry
        faulty_s3.rules = [Rule("truncate", skip=3, times=2, method="GET"), Rule("reset_body", times=2, method="GET")]
    for number in range(1 if prefix else 4):
        url = f"{prefix}s3://{faulty_s3.bucket}/big-{number}"
        storage.upload(tmp_path / "big", url)
        with storage.open_file(url) as file:
            assert b"".join(iter(lambda: file.read(300_000), b"")) == data
        storage.download(url, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == data
    assert faulty_s3.injected == {rule.kind: 2 for rule in faulty_s3.rules}
    assert pending_uploads(faulty_s3) == []


@pytest.mark.usefixtures("pauses")
def test_a_stalled_request_is_abandoned_and_retried(faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3._connect, "__defaults__", (0.5, False))
    url = f"s3://{faulty_s3.bucket}/x"
    faulty_s3.rules = [Rule("stall", seconds=60, times=1)]
    storage.write_bytes(url, b"0123456789")
    assert stored_object(faulty_s3, "x") == b"0123456789" and faulty_s3.injected == {"stall": 1}


def existing_info(url: str) -> storage.FileInfo:
    info = storage.info(url)
    assert info is not None
    return info


@pytest.mark.usefixtures("pauses", "small")
@pytest.mark.parametrize("prefix", ["", storage.FSSPEC_PREFIX])
@pytest.mark.parametrize("kind", ["stall", "delay"])
def test_a_read_without_data_is_logged_and_retried(
    faulty_s3: FaultyProxy, caplog: pytest.LogCaptureFixture, prefix: str, kind: str
) -> None:
    url, data = f"{prefix}s3://{faulty_s3.bucket}/x", os.urandom(5 << 20)
    storage.write_bytes(url, data)
    faulty_s3.rules = [Rule(kind, seconds=60, times=3, method="GET", path="/x")]
    assert b"".join(storage.read_parts(existing_info(url), timeout_s=0.5)) == data
    assert faulty_s3.injected == {kind: 3}
    messages = [record.getMessage() for record in caplog.records if "no data" in record.getMessage()]
    assert messages.count(f"{url}: no data received for 0.5 s; attempt 1 of 4 failed, retrying") >= 3


@pytest.mark.usefixtures("pauses")
def test_a_store_that_never_answers_is_reported(faulty_s3: FaultyProxy) -> None:
    url = f"s3://{faulty_s3.bucket}/x"
    storage.write_bytes(url, b"0123456789")
    file = existing_info(url)
    faulty_s3.rules = [Rule("delay", seconds=60)]
    for read in (lambda: list(storage.read_parts(file, timeout_s=0.2)), lambda: storage.info(url, timeout_s=0.2)):
        with pytest.raises(
            StorageError, match=rf"^{url}: no data received for 0.2 s in each of 4 attempts; check the net"
        ):
            read()
    assert faulty_s3.injected == {"delay": 8}


def test_slow_transfers_do_not_stall_but_silent_ones_do(pauses: list[float]) -> None:
    finished = threading.Event()

    def slow(heartbeat: Callable[[], None]) -> str:
        for _ in range(5):
            finished.wait(0.2)
            heartbeat()
        return "done"

    assert storage_errors.run_with_stall_timeout(slow, "x://y", timeout_s=0.6) == "done"
    with pytest.raises(storage.Stalled, match=r"^x://y: no data received for 0\.1 s$"):
        storage_errors.run_with_stall_timeout(lambda heartbeat: finished.wait(60), "x://y", timeout_s=0.1)
    with pytest.raises(ZeroDivisionError):
        storage_errors.run_with_stall_timeout(lambda heartbeat: 1 // 0, "x://y", timeout_s=5)
    finished.set()


@pytest.mark.processes
def test_other_processes_recover_from_faults(faulty_s3: FaultyProxy) -> None:
    """Run a subprocess with the real pauses; the first ones are short."""
    url = f"s3://{faulty_s3.bucket}/x"
    faulty_s3.rules = [Rule("503", times=2), Rule("reset", times=2)]
    code = f"from open_lm import storage; storage.write_text({url!r}, 'text'); print(storage.read_text({url!r}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "text\n"
    assert faulty_s3.injected == {"503": 2, "reset": 2}


# ---------------------------------------------------------------------------------------------- permanent faults
@pytest.mark.usefixtures("small", "pauses")
def test_failed_uploads_leave_nothing_behind(
    faulty_s3: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "big").write_bytes(os.urandom(12 << 20))
    url = f"s3://{faulty_s3.bucket}/big"
    faulty_s3.rules = [Rule("500", method="PUT", path="partNumber=2")]
    with pytest.raises(StorageError, match=r"/big: .*InternalError"):
        storage.upload(tmp_path / "big", url)
    assert faulty_s3.injected["500"] == storage_errors._MAX_ATTEMPTS
    assert not storage.exists(url) and pending_uploads(faulty_s3) == []

    faulty_s3.rules = [Rule("503", method="POST", path="uploadId"), Rule("503", method="DELETE")]
    with pytest.raises(StorageError, match=r"/big: .*SlowDown"):
        storage.upload(tmp_path / "big", url)
    (upload,) = pending_uploads(faulty_s3)
    assert f"abort the multipart upload {upload['UploadId']} by hand" in caplog.text


@pytest.mark.usefixtures("pauses")
@pytest.mark.parametrize("prefix", ["", storage.FSSPEC_PREFIX])
def test_a_file_that_changes_during_a_read_is_an_error(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.setattr(storage_files, "BLOCK_BYTES", 1000)
    url = f"{prefix}s3://{s3_bucket}/x"
    storage.write_bytes(url, b"a" * 100_000)
    with storage.open_file(url) as file:
        file.read(500)
        storage.write_bytes(url, b"b" * 100_000)
        with pytest.raises(StorageError, match=r"/x: the file changed while it was being read"):
            file.seek(50_000)
            while file.read(500):
                pass


@pytest.mark.usefixtures("pauses")
def test_a_corrupted_upload_is_detected(
    s3_bucket: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(12 << 20)
    (tmp_path / "big").write_bytes(data)
    request = storage_s3._request

    def corrupt(connection: Any, operation: str, **options: Any) -> Any:
        if options.get("PartNumber") == 2:
            options["Body"] = bytes(len(options["Body"]))
        return request(connection, operation, **options)

    monkeypatch.setattr(storage_s3, "_request", corrupt)
    with pytest.raises(StorageError, match=r"checksum mismatch after upload: the store has CRC32 .*, expected"):
        storage.upload(tmp_path / "big", f"s3://{s3_bucket}/big")


def test_an_upload_that_is_missing_in_the_store_is_an_error(
    s3_bucket: str, tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    monkeypatch.setattr(storage_s3, "_put_single", lambda connection, path, url: {})
    with pytest.raises(StorageError, match="sent 10 bytes, but the store has no such file"):
        storage.upload(tmp_path / "x", f"s3://{s3_bucket}/y")
    assert len(pauses) == storage_errors._MAX_ATTEMPTS - 1


# ---------------------------------------------------------------------------------------------- retries
class Fault(Exception):
    """The relevant parts of a botocore error."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}


class EndpointConnectionError(Exception):
    """The botocore error for a refused connection or an unknown host."""


def test_transient_faults_are_retried_with_growing_pauses(pauses: list[float]) -> None:
    faults = [Fault(503, "SlowDown"), TimeoutError(), ConnectionResetError(), *[Fault(500, "InternalError")] * 6]

    def action() -> str:
        if faults:
            raise faults.pop(0)
        return "done"

    assert storage_errors.with_retries(action) == "done"
    assert len(pauses) == 9
    for number, pause in enumerate(pauses):
        assert 0.05 * 2**number * 0.5 <= pause <= 0.05 * 2**number * 1.5


@pytest.mark.parametrize(
    "error, attempts",
    [(Fault(403, "AccessDenied"), 1), (Fault(500, "InternalError"), 10), (EndpointConnectionError(), 6)],
)
def test_permanent_faults_raise_their_own_error(pauses: list[float], error: Exception, attempts: int) -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        raise error

    with pytest.raises(StorageError), storage_errors.wrap_errors("s3://b/k"):
        storage_errors.with_retries(action)
    assert len(calls) == attempts


# ---------------------------------------------------------------------------------------------- full disks
WRITE = """
import resource, sys
from open_lm import storage
from open_lm.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    exec(sys.argv[1])
except StorageError as error:
    print(error)
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", ["write_bytes", "small writes", "download"])
def test_a_file_size_limit_is_reported_and_keeps_the_old_file(tmp_path: Path, how: str) -> None:
    target, source = tmp_path / "folder" / "file", tmp_path / "source"
    storage.write_text(target, "old")
    source.write_bytes(bytes(3 << 20))
    commands = {
        "write_bytes": f"storage.write_bytes({str(target)!r}, bytes(3 << 20))",
        "small writes": f"with storage.atomic_write({str(target)!r}) as f: [f.write(bytes(9999)) for _ in range(999)]",
        "download": f"storage.download({str(source)!r}, {str(target)!r})",
    }
    command = [sys.executable, "-c", WRITE, commands[how]]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{target}: File too large while writing in {tmp_path / 'folder'} (" in output and "GB free there" in output
    assert target.read_text() == "old" and os.listdir(tmp_path / "folder") == ["file"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Any:
    """Mount a 1 MiB file system, which requires root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system requires root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_reported_and_keeps_the_old_file(tiny_disk: Path, s3_bucket: str) -> None:
    storage.write_text(tiny_disk / "file", "old")
    for attempt in (
        lambda: storage.write_bytes(tiny_disk / "file", bytes(3 << 20)),
        lambda: storage.download(f"s3://{s3_bucket}/big", tiny_disk / "file"),
    ):
        storage.write_bytes(f"s3://{s3_bucket}/big", bytes(3 << 20))
        with pytest.raises(StorageError, match=r"disk/file: No space left on device while writing in .*/disk \(0\.0"):
            attempt()
        assert (tiny_disk / "file").read_text() == "old" and os.listdir(tiny_disk) == ["file"]
