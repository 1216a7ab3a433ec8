"""Downloading a shard: the result matches the manifest despite faults of networks, stores and commands."""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from data_helpers import sequence, write_shard
from faulty_proxy import KINDS, FaultyProxy, Rule

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.fetch import FetchFolder, FetchSettings, fetch, look_up
from open_lm.data.verify import Expected, record_verified, verify
from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.storage import paths as storage_files
from open_lm.storage import retries as storage_errors


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    recorded: list[float] = []
    monkeypatch.setattr(storage_errors, "_pause", recorded.append)
    return recorded


@pytest.fixture
def shard(tmp_path: Path) -> bytes:
    return Path(write_shard(tmp_path / "shard.tar", [sequence(0, 0, m) for m in range(300)])).read_bytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetched(url: str, folder: Path, expected: Expected | None = None, timeout_s: float = 30) -> bytes:
    """Download a shard; check the returned sha256."""
    expected = expected or Expected()
    with open(folder / "fetched", "w+b") as file:
        digest = fetch(look_up(url, expected, timeout_s), expected, timeout_s, file, lambda length: None)
        file.seek(0)
        data = file.read()
    assert digest == sha256(data)
    return data


def flipped(data: bytes, bit: int = 12_345) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# --- verification ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_of_a_store_is_retried(
    faulty_s3: FaultyProxy, tmp_path: Path, shard: bytes, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(storage_files, "PART_BYTES", 100_000)
    url = f"s3://{faulty_s3.bucket}/a.tar"
    storage.write_bytes(url, shard)
    faulty_s3.rules = [Rule(kind, method="GET", times=3, seconds=60 if kind == "stall" else 0.1)]
    assert fetched(url, tmp_path, Expected(len(shard), sha256(shard)), timeout_s=1) == shard
    assert faulty_s3.injected == {kind: 3}


@pytest.mark.processes
@pytest.mark.parametrize("scheme", ["s3", "fsspec+s3", "pipe"])
def test_a_flipped_bit_is_detected_and_downloaded_again(
    s3_bucket: str, tmp_path: Path, shard: bytes, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    (tmp_path / "right.tar").write_bytes(shard)
    (tmp_path / "current.tar").write_bytes(flipped(shard))
    if scheme == "pipe":  # first the damaged file, then the right one
        url = f"pipe:cat {tmp_path}/current.tar && cp {tmp_path}/right.tar {tmp_path}/current.tar"
        assert fetched(url, tmp_path, Expected(None, sha256(shard))) == shard
        assert (
            f"{url}: has the sha256 {sha256(flipped(shard))}, expected {sha256(shard)}; attempt 1 of 3 failed"
            in caplog.text
        )
        return
    url = f"{scheme}://{s3_bucket}/a.tar"
    storage.write_bytes(url, flipped(shard))
    with pytest.raises(DataError) as caught:
        fetched(url, tmp_path, Expected(len(shard), sha256(shard)))
    message = (
        f"{url}: has the sha256 {sha256(flipped(shard))}, expected {sha256(shard)}, in the last of 3 attempts; create"
    )
    assert str(caught.value).startswith(message)


def test_a_wrong_length_is_an_error_without_a_download(faulty_s3: FaultyProxy, tmp_path: Path, shard: bytes) -> None:
    url = f"s3://{faulty_s3.bucket}/a.tar"
    storage.write_bytes(url, shard[:-1024])
    with pytest.raises(DataError, match=rf"a\.tar: has {len(shard) - 1024} bytes, expected {len(shard)}, in the"):
        fetched(url, tmp_path, Expected(len(shard), ""))
    assert faulty_s3.requests["GET"] == 0


@pytest.mark.parametrize("scheme", ["s3", "fsspec+s3", "http"])
def test_known_shards_need_one_request_and_a_wrong_length_is_an_error(
    faulty_s3: FaultyProxy, tmp_path: Path, shard: bytes, scheme: str
) -> None:
    storage.write_bytes(f"s3://{faulty_s3.bucket}/a.tar", shard)
    boto3.client("s3").put_object_acl(Bucket=faulty_s3.bucket, Key="a.tar", ACL="public-read")
    path = f"{faulty_s3.bucket}/a.tar"
    url = f"{faulty_s3.endpoint}/{path}" if scheme == "http" else f"{scheme}://{path}"
    faulty_s3.requests.clear()
    assert fetched(url, tmp_path, Expected(len(shard), sha256(shard))) == shard
    if scheme == "s3":
        assert faulty_s3.requests == {"GET": 1}
    for length in (len(shard) - 1, len(shard) + 1):
        with pytest.raises(DataError, match=rf"a\.tar: has {len(shard)} bytes, expected {length}, in the last of"):
            fetched(url, tmp_path, Expected(length, sha256(shard)))


@pytest.mark.processes
def test_a_longer_failed_attempt_leaves_no_bytes_behind(tmp_path: Path, shard: bytes) -> None:
    (tmp_path / "long").write_bytes(shard + b"x" * 5000)
    url = f"pipe:cat {tmp_path}/long && cp {tmp_path}/shard.tar {tmp_path}/long"
    assert fetched(url, tmp_path, Expected(len(shard), "")) == shard


@pytest.mark.processes
def test_the_output_of_a_command_must_be_a_complete_tar(tmp_path: Path, shard: bytes) -> None:
    with pytest.raises(DataError, match=r"^pipe:head.*cut short.*in the last of 3 attempts; see the command's own"):
        fetched(f"pipe:head -c {len(shard) // 2} {tmp_path}/shard.tar", tmp_path)
    with pytest.raises(DataError, match=r"^pipe:true: is empty"):
        fetched("pipe:true", tmp_path)


@pytest.mark.processes
def test_commands_are_retried(tmp_path: Path, pauses: list[float]) -> None:
    counter = tmp_path / "count"
    with pytest.raises(DataError, match=r"exit status 7, in the last of 3 attempts"):
        fetched(f"pipe:echo x >> {counter}; exit 7", tmp_path)
    assert counter.read_text() == "x\n" * 3 and len(pauses) == 2


def test_other_schemes_use_webdataset(tmp_path: Path, shard: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    import webdataset  # noqa: F401  (its function gopen hides the module of the same name)

    handlers = sys.modules["webdataset.gopen"]

    def opened(url: str, mode: str, bufsize: int) -> object:
        return handlers.Pipe(["cat", url.removeprefix("tape:/")], mode=mode, bufsize=bufsize)

    monkeypatch.setitem(handlers.gopen_schemes, "tape", opened)
    assert fetched(f"tape:/{tmp_path}/shard.tar", tmp_path) == shard
    with pytest.raises(StorageError, match="nothing://x: neither a file system nor a command"):
        fetched("nothing://x", tmp_path)


# --- stalls ----------------------------------------------------------------------------------------------
class StallingHandler(BaseHTTPRequestHandler):
    """Sends a header and half of a file, then stalls."""

    data = bytes(100_000)
    end = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.wfile.write(self.data[: len(self.data) // 2])
        self.end.wait(60)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def stalling_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StallingHandler)
    server.daemon_threads = True
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.02))
    StallingHandler.end.clear()
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    StallingHandler.end.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_stalled_web_server_is_retried_and_an_error(
    stalling_server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{stalling_server}/a.tar"
    with pytest.raises(StorageError, match=rf"^{url}: no data received for 0\.3 s in each of 4 attempts"):
        fetched(url, tmp_path, timeout_s=0.3)
    for attempt in (1, 2, 3):
        assert f"{url}: no data received for 0.3 s; attempt {attempt} of 4 failed" in caplog.text


def ends(pid: int) -> bool:
    """Return whether a process ends within ten seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    return bool(select.select([handle], [], [], 10)[0])


@pytest.mark.processes
def test_a_stalled_command_is_killed_with_its_child_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"pipe:echo start; sleep 600 & echo $! >> {tmp_path}/pids; wait"
    with pytest.raises(DataError, match=r"no data received for 0\.3 s, in the last of 3 attempts"):
        fetched(url, tmp_path, timeout_s=0.3)
    assert f"{url}: no data received for 0.3 s; attempt 1 of 3 failed" in caplog.text
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    assert all(map(ends, pids))


@pytest.mark.processes
def test_a_slow_command_is_not_a_stall(tmp_path: Path, shard: bytes) -> None:
    half = len(shard) // 2
    path = f"{tmp_path}/shard.tar"
    url = f"pipe:head -c {half} {path}; sleep 0.5; tail -c +{half + 1} {path}"
    assert fetched(url, tmp_path, timeout_s=20) == shard


# --- local files -----------------------------------------------------------------------------------------------------
def test_a_file_is_hashed_once_for_all_processes_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_lm.data import verify as verify_module

    hashed: list[str] = []
    monkeypatch.setattr(verify_module, "_verified", set())
    monkeypatch.setattr(
        verify_module, "_hash", lambda file: hashed.append(file.name) or sha256(Path(file.name).read_bytes())
    )
    path = tmp_path / "a.tar"
    path.write_bytes(b"content")
    records = tmp_path / "records"
    expected = Expected(7, sha256(b"content"))

    def problem() -> str:
        with open(path, "rb") as file:
            return verify(file, expected, str(records))

    assert [problem(), problem()] == ["", ""] and len(hashed) == 1
    verify_module._verified.clear()  # like another process
    assert problem() == "" and len(hashed) == 1
    os.utime(path, ns=(0, 0))
    assert problem() == "" and len(hashed) == 2, "another modification time: the content may have changed"
    path.write_bytes(b"cOntent")
    for number in (3, 4):
        assert problem() == f"has the sha256 {sha256(b'cOntent')}, expected {sha256(b'content')}"
        assert len(hashed) == number, "a wrong file is never recorded as verified"
    path.write_bytes(b"conten")
    assert problem() == "has 6 bytes, expected 7" and len(hashed) == 4
    with open(path, "rb") as file:
        record_verified(file, sha256(b"conten"), str(records))
        assert verify(file, Expected(None, sha256(b"conten")), str(records)) == "" and len(hashed) == 4


# --- the temporary folder --------------------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
from open_lm.data.fetch import FetchFolder
folder = FetchFolder()
open(folder.name + "/shard.tar", "wb").write(bytes(1000))
print(folder.name, flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.processes
def test_folders_are_removed_when_a_process_ends_or_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = partial(
        subprocess.run, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    ended = run([sys.executable, "-c", KILLED, "end"])
    assert ended.returncode == 0 and not os.path.exists(ended.stdout.strip())
    alive = FetchFolder()
    killed = run([sys.executable, "-c", KILLED, "kill"])
    assert killed.returncode == -signal.SIGKILL and os.path.exists(killed.stdout.strip())
    another = FetchFolder()
    assert not os.path.exists(killed.stdout.strip())
    assert os.path.isdir(alive.name) and os.path.isdir(another.name)
    alive.cleanup()
    assert not os.path.exists(alive.name) and os.path.isdir(another.name)
    del another
    assert os.listdir(tmp_path) == []


@pytest.mark.processes
def test_a_folder_stays_while_a_forked_child_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = KILLED.replace("print(", "os.fork() or (os.close(1), os.close(2), sys.stdin.read(), os._exit(0))\nprint(")
    command = [sys.executable, "-c", code, "kill"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stdin is not None
        name = process.stdout.read().decode().strip()
        assert process.wait() == -signal.SIGKILL
        FetchFolder().cleanup()
        assert os.path.isdir(name), "its child is alive"
        lock = open(f"{name}/alive", "rb")  # noqa: SIM115
        process.stdin.close()
    fcntl.flock(lock, fcntl.LOCK_EX)  # the child has ended
    lock.close()
    FetchFolder().cleanup()
    assert not os.path.exists(name)


# --- the flags -------------------------------------------------------------------------------------------------------
def test_settings_come_from_the_flags(tmp_path: Path) -> None:
    assert FetchSettings.from_config(DataConfig(read_timeout=7.0, cache_limit="no size"), "f") == FetchSettings(
        "f", None, 0, 7.0
    )
    from_flags = FetchSettings.from_config(DataConfig(cache_dir=f"file://{tmp_path}/c", cache_limit="1.5GB"), "f")
    assert from_flags == FetchSettings("f", f"{tmp_path}/c", 1_500_000_000, 60.0)
    with pytest.raises(ConfigError, match="--cache-limit: expected a size such as 4GB or 512MiB, found '5 apples'"):
        FetchSettings.from_config(DataConfig(cache_dir="c", cache_limit="5 apples"), None)
    with pytest.raises(ConfigError, match="--cache-dir s3://b/c: expected a local folder"):
        FetchSettings.from_config(DataConfig(cache_dir="s3://b/c"), None)
