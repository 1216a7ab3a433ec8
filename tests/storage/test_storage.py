"""Test every storage function on every kind of path or URL, with S3 from a real server on loopback."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from open_lm import storage
from open_lm.errors import StorageError
from open_lm.storage import backends as storage_backends
from open_lm.storage import s3 as storage_s3


@pytest.fixture(params=["local", "file", "s3", "s3fs", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("s3", "s3fs"):
        prefix = storage.FSSPEC_PREFIX if request.param == "s3fs" else ""
        return f"{prefix}s3://{request.getfixturevalue('s3_bucket')}/some/folder"
    if request.param == "memory":
        return f"memory:///{uuid.uuid4().hex}"
    return f"file://{tmp_path}/folder" if request.param == "file" else str(tmp_path / "folder")


def plain(url: str) -> str:
    return storage.local_path(url)


# ---------------------------------------------------------------------------------------------- all backends
def test_written_files_are_read_and_listed(base: str) -> None:
    assert storage.list_files(base) == [] and not storage.exists(base)
    storage.write_bytes(storage.join(base, "b.bin"), b"\x00\xff")
    with storage.atomic_write(storage.join(base, "sub", "a.txt"), "w") as file:
        file.write("zwei\nZeilen ü\n")
    storage.write_text(storage.join(base, "c.txt"), "c")

    assert storage.read_bytes(storage.join(base, "b.bin")) == b"\x00\xff"
    assert storage.read_text(storage.join(base, "sub", "a.txt")) == "zwei\nZeilen ü\n"
    with storage.open_file(storage.join(base, "sub", "a.txt"), "r") as file:
        assert list(file) == ["zwei\n", "Zeilen ü\n"]
    root = plain(base)
    assert storage.list_files(base) == [f"{root}/b.bin", f"{root}/c.txt"]
    assert storage.list_files(base, recursive=True) == [f"{root}/b.bin", f"{root}/c.txt", f"{root}/sub/a.txt"]
    assert storage.glob(storage.join(base, "*.txt")) == [f"{root}/c.txt"]
    assert storage.glob(storage.join(base, "**", "*.txt")) == [f"{root}/c.txt", f"{root}/sub/a.txt"]
    assert storage.glob(storage.join(base, "[ab].???")) == [f"{root}/b.bin"]
    assert storage.glob(storage.join(base, "none*")) == []
    assert storage.size(storage.join(base, "b.bin")) == 2
    assert storage.exists(base) and storage.exists(storage.join(base, "sub"))
    assert storage.info(storage.join(base, "sub")) is None, "a folder is not a file"


def test_listings_include_size_and_etag_without_a_request_per_file(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        storage.write_bytes(storage.join(base, "sub", f"{number}.bin"), b"x" * number)
    etags = [storage.info(storage.join(base, "sub", f"{number}.bin")).etag for number in range(3)]  # type: ignore[union-attr]
    if storage.is_remote(base):
        backend = type(storage_backends.find_backend(base))
        monkeypatch.setattr(backend, "info", lambda self, url: pytest.fail("request for a single file"))
    for infos in (storage.glob_infos(storage.join(base, "s*", "*.bin")), storage.list_infos(base, recursive=True)):
        assert [item.url for item in infos] == [f"{plain(base)}/sub/{number}.bin" for number in range(3)]
        assert [item.size for item in infos] == [0, 1, 2]
        assert [item.etag for item in infos] == etags
    if "s3:" in base:
        assert len(set(etags)) == 3 and all(etag.isalnum() for etag in etags)


def test_open_files_are_seekable(base: str) -> None:
    data = os.urandom(100_000)
    url = storage.join(base, "data.bin")
    storage.write_bytes(url, data)
    with storage.open_file(url) as file:
        assert file.seek(-10, os.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        file.seek(50_000)
        assert file.read(7) == data[50_000:50_007]
        file.seek(-7, os.SEEK_CUR)
        assert file.read() == data[50_000:]
        assert file.read() == b""


def test_failed_writes_keep_the_old_file_and_leave_no_others(base: str) -> None:
    url = storage.join(base, "file.txt")
    storage.write_text(url, "old")
    with pytest.raises(ZeroDivisionError), storage.atomic_write(url, "w") as file:
        file.write("new")
        file.flush()
        raise ZeroDivisionError
    assert storage.read_text(url) == "old"
    assert storage.list_files(base, recursive=True) == [f"{plain(base)}/file.txt"]
    with pytest.raises(ZeroDivisionError), storage.atomic_write(storage.join(base, "other"), "wb"):
        raise ZeroDivisionError
    assert not storage.exists(storage.join(base, "other"))


def test_files_are_copied_between_any_two_backends(base: str, tmp_path: Path) -> None:
    data = os.urandom(10_000)
    (tmp_path / "source").write_bytes(data)
    storage.upload(tmp_path / "source", storage.join(base, "uploaded"))
    storage.copy(storage.join(base, "uploaded"), storage.join(base, "copy"))
    storage.copy(storage.join(base, "copy"), "memory:///copies/copy")
    storage.copy("memory:///copies/copy", storage.join(base, "back"))
    storage.download(storage.join(base, "back"), tmp_path / "new" / "folder" / "downloaded")
    assert (tmp_path / "new" / "folder" / "downloaded").read_bytes() == data
    assert os.listdir(tmp_path / "new" / "folder") == ["downloaded"]


def test_remove_deletes_single_files_only(base: str) -> None:
    for name in ("a", "ab", "a/b") if base.startswith("s3:") else ("a", "ab"):
        storage.write_text(storage.join(base, name), name)
    storage.remove(storage.join(base, "a"))
    storage.remove(storage.join(base, "a"))  # a missing file is no error
    assert not any(url.endswith("/a") for url in storage.list_files(base))
    assert storage.exists(storage.join(base, "ab"))
    if not storage.is_remote(base):
        storage.write_text(storage.join(base, "sub", "x"), "x")
        with pytest.raises(StorageError):
            storage.remove(storage.join(base, "sub"))
        assert storage.exists(storage.join(base, "sub", "x"))


@pytest.mark.parametrize("function", [storage.read_bytes, storage.open_file, storage.size])
def test_errors_for_missing_files_name_the_file(base: str, function: Any) -> None:
    url = storage.join(base, "absent.txt")
    with pytest.raises(StorageError, match=r"absent\.txt: no such file"):
        function(url)
    with pytest.raises(StorageError, match=r"absent\.txt: no such file"):
        storage.download(url, "/nowhere/at/all")


# ---------------------------------------------------------------------------------------------- paths and URLs
def test_paths_and_urls_are_classified_and_joined() -> None:
    assert [storage.is_remote(url) for url in ("s3://b/k", "gs://b", "https://h/x", "memory://x")] == [True] * 4
    assert [storage.is_remote(url) for url in ("a/b", "/a", "file:///a", "pipe:aws s3 cp s3://b/k -")] == [False] * 4
    assert storage.join("s3://b/", "/k/", "x.tar") == "s3://b/k/x.tar"
    assert storage.join("file:///a", "b") == "/a/b" and storage.join("a", "b") == "a/b"
    with pytest.raises(ValueError, match="use atomic_write"):
        storage.open_file("x", "wb")
    with pytest.raises(ValueError, match="'a'"), storage.atomic_write("x", "a"):
        pass


# ---------------------------------------------------------------------------------------------- local
def test_local_files_are_readable_by_other_users_and_appear_by_rename(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    old_umask = os.umask(0o022)
    try:
        with storage.atomic_write(target) as file:
            file.write(b"x")
            assert not target.exists()
            (name,) = os.listdir(target.parent)
            assert storage.is_temporary(name)
            assert storage.list_files(target.parent) == [], "incomplete files are not listed"
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_local_errors_name_the_path_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file/below: (Not a directory|File exists)"):
        storage.write_text(tmp_path / "file" / "below", "x")
    (tmp_path / "latin").write_bytes(b"abc\xff")
    with pytest.raises(StorageError, match="expected UTF-8 text, found byte 0xff at offset 3"):
        storage.read_text(tmp_path / "latin")


# ---------------------------------------------------------------------------------------------- S3
def test_large_objects_are_uploaded_in_parts(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "_PART_BYTES", 5 << 20)  # S3's minimum
    data = os.urandom(12 << 20)
    (tmp_path / "big").write_bytes(data)
    url = f"s3://{s3_bucket}/big"
    storage.upload(tmp_path / "big", url)
    storage.download(url, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    with storage.open_file(url) as file:
        file.seek(9 << 20)
        assert file.read(1000) == data[9 << 20 : (9 << 20) + 1000]


def test_reading_an_object_needs_few_requests(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(20 << 20)
    ranges: list[tuple[int, int]] = []
    storage.write_bytes(f"s3://{s3_bucket}/x", data)
    fetch = storage_s3._fetch

    def record(file_info: storage.FileInfo, start: int, length: int) -> bytes:
        ranges.append((start, length))
        return fetch(file_info, start, length)

    monkeypatch.setattr(storage_s3, "_fetch", record)
    assert storage.read_bytes(f"s3://{s3_bucket}/x") == data
    assert sorted(ranges) == [(0, 8 << 20), (8 << 20, 8 << 20), (16 << 20, 4 << 20)]


def test_objects_that_share_a_folder_name_prefix_are_not_listed(s3_bucket: str) -> None:
    for name in ("run/a", "run-2/b", "running"):
        storage.write_text(f"s3://{s3_bucket}/{name}", name)
    assert storage.list_files(f"s3://{s3_bucket}/run", recursive=True) == [f"s3://{s3_bucket}/run/a"]
    assert storage.list_files(f"s3://{s3_bucket}") == [f"s3://{s3_bucket}/running"]
    assert not storage.exists(f"s3://{s3_bucket}/runn")


@pytest.mark.parametrize(
    "pattern, matched",
    [
        ("*.tar", ["a.tar", "b+c.tar"]),
        ("?.tar", ["a.tar"]),
        ("**/*.tar", ["a.tar", "b+c.tar", "x/a.tar", "x/y/b.tar"]),
        ("x/**", ["x/a.tar", "x/a.txt", "x/y/b.tar"]),
        ("[!a]*.tar", ["b+c.tar"]),
        ("x/[ab].t[ax][rt]", ["x/a.tar", "x/a.txt"]),
        ("x/*", ["x/a.tar", "x/a.txt"]),
        ("*/a.*", ["x/a.tar", "x/a.txt"]),
        ("b+c.tar", ["b+c.tar"]),
    ],
)
def test_s3_glob_patterns(s3_bucket: str, pattern: str, matched: list[str]) -> None:
    for name in ("a.tar", "b+c.tar", "x/a.tar", "x/a.txt", "x/y/b.tar"):
        storage.write_text(f"s3://{s3_bucket}/d/{name}", name)
    assert storage.glob(f"s3://{s3_bucket}/d/{pattern}") == [f"s3://{s3_bucket}/d/{name}" for name in matched]


def test_s3_errors_say_what_to_do(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-here/x: no such bucket; create it"):
        storage.write_text("s3://no-such-bucket-here/x", "x")
    with pytest.raises(StorageError, match="expected s3://bucket/key"):
        storage.read_bytes("s3://bucket-only")

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1 cannot be reached"):
        storage.read_bytes(f"s3://{s3_bucket}/x")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match="no S3 credentials found; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"s3://{s3_bucket}/x")


@pytest.mark.processes
def test_forked_workers_read_s3(s3_bucket: str) -> None:
    """Data workers are forked and must not share the parent's connections."""
    url = f"s3://{s3_bucket}/shared"
    storage.write_bytes(url, b"x" * 1000)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(0 if all(storage.read_bytes(url) == b"x" * 1000 for _ in range(5)) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------- imports and ranges
@pytest.mark.processes
def test_importing_loads_no_heavy_library() -> None:
    modules = ("storage", "storage.remote_sync", "monitor.loggers", "monitor.run_folder", "utils.file_utils")
    code = f"import sys, {', '.join(f'open_lm.{name}' for name in modules)}\n"
    code += "print([m for m in ('boto3', 's3fs', 'fsspec', 'torch', 'wandb', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("kind", ["local", "s3", "memory"])
def test_a_single_range_is_read(kind: str, tmp_path: Path, s3_bucket: str) -> None:
    url = {"local": str(tmp_path / "a"), "s3": f"s3://{s3_bucket}/a", "memory": "memory://ranges/a"}[kind]
    storage.write_bytes(url, bytes(range(100)))
    assert storage.read_range(url, 10, 5) == bytes(range(10, 15)) and storage.read_range(url, 0, 100)[-1] == 99
    with pytest.raises(StorageError, match="a"):
        storage.read_range(url, 90, 20)
    with pytest.raises(StorageError, match="missing"):
        storage.read_range(url.removesuffix("a") + "missing", 0, 1)
