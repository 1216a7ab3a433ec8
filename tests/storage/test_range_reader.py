"""Test reading remote files in blocks, with a thread that prefetches the next one."""

from __future__ import annotations

import os
import threading

import pytest

from open_lm import storage
from open_lm.errors import StorageError
from open_lm.storage import paths as storage_files


def test_sequential_reads_prefetch_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_files, "BLOCK_BYTES", 1000)
    data, requests, fetched = os.urandom(10_500), [], threading.Semaphore(0)

    def fetch(start: int, length: int) -> bytes:
        requests.append((start, length))
        fetched.release()
        return data[start : start + length]

    reader = storage_files.RangeReader(storage_files.FileInfo("x://y", len(data), 0.0), fetch)
    file = reader.buffered()
    assert reader.read(10) == data[:10]
    fetched.acquire(), fetched.acquire()
    assert requests == [(0, 1000), (1000, 1000)], "only the current block and the next one"
    reader.seek(5000)
    assert reader.read(10) == data[5000:5010]
    assert requests[2:] == [(5000, 1000)], "no prefetch after a jump"
    file.seek(0)
    assert file.read() == data
    assert file.read() == b""


def test_prefetch_errors_are_raised_when_the_block_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_files, "BLOCK_BYTES", 1000)

    def fetch(start: int, length: int) -> bytes:
        if start >= 1000:
            raise PermissionError(13, "Permission denied")
        return bytes(length)

    with storage_files.RangeReader(storage_files.FileInfo("x://y", 5000, 0.0), fetch) as reader:
        assert reader.read(1000) == bytes(1000)
        with pytest.raises(StorageError, match=r"x://y: Permission denied \(errno 13\)"):
            reader.read(1)


@pytest.mark.processes
def test_a_reader_works_in_a_forked_child(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_files, "BLOCK_BYTES", 1000)
    url, data = f"s3://{s3_bucket}/x", os.urandom(5000)
    storage.write_bytes(url, data)
    with storage.open_file(url) as file:
        assert file.read(10) == data[:10]
        child = os.fork()
        if child == 0:
            os._exit(0 if file.read() == data[10:] else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert file.read() == data[10:]
