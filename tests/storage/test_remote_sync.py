"""Test the remote copy of a run folder on S3 (a real server on loopback), through fsspec and on other stores."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import boto3
import pytest
from faulty_proxy import FaultyProxy, Rule

from open_lm import storage
from open_lm.checkpoint.folders import INCOMPLETE, INDEX, remove_folder
from open_lm.config.sections import LoggingConfig
from open_lm.errors import StorageError
from open_lm.storage import remote_sync
from open_lm.storage import s3 as storage_s3
from open_lm.storage.remote_sync import RemoteSync, remote_folder

FILES = {
    "out.log": b"line\n",
    "params.txt": b"lr: 1\n",
    "checkpoints/epoch_1.pt": b"model" * 100,
    "checkpoints/optimizer_1.pt": b"moments" * 100,
    "checkpoints/results.jsonl": b"[]\n",
    "tensorboard/events.out": b"\x00\x01",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "logs" / "run"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(params=["s3", "s3 through fsspec", "memory", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the remote URL of the run."""
    kind, _, through = request.param.partition(" through ")
    folder = f"{tmp_path}/copy" if kind == "file" else uuid.uuid4().hex
    if kind == "s3":
        folder = request.getfixturevalue("s3_bucket")
    cfg = LoggingConfig(remote_sync=f"{kind}://{folder}", remote_sync_protocol="fsspec" if through else "s3")
    address = remote_folder(cfg, "run")
    assert address is not None
    return address


def content(remote: str) -> dict[str, bytes]:
    root = storage.local_path(remote)
    root = root.replace("memory://", "memory:///") if root.startswith("memory://") else root
    return {url[len(root) + 1 :]: storage.read_bytes(url) for url in storage.list_files(remote, recursive=True)}


def test_uploads_all_files_then_only_changes_and_deletes_nothing(run: Path, remote: str) -> None:
    sync = RemoteSync(str(run), remote)
    assert sorted(sync.sync_once().uploaded) == sorted(FILES)
    assert content(remote) == FILES

    assert sync.sync_once().uploaded == []
    with open(run / "out.log", "ab") as file:
        file.write(b"more\n")
    (run / "checkpoints" / "epoch_1.pt").unlink()
    report = sync.finish()
    assert report.uploaded == ["out.log"] and len(report.unchanged) == len(FILES) - 2
    assert content(remote) == {**FILES, "out.log": b"line\nmore\n"}


def test_a_restarted_process_uploads_only_new_files(run: Path, s3_bucket: str) -> None:
    address = f"s3://{s3_bucket}/runs/run"
    for path in run.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    RemoteSync(str(run), address).sync_once()
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "params.txt").write_text("lr: 2\n")  # the same size, but newer than the copy
    os.utime(run / "params.txt", (4_000_000_000, 4_000_000_000))
    assert sorted(RemoteSync(str(run), address).sync_once().uploaded) == ["metrics.jsonl", "params.txt"]
    assert content(address)["params.txt"] == b"lr: 2\n"


def test_incomplete_files_are_not_uploaded(run: Path, remote: str) -> None:
    with pytest.raises(RuntimeError), storage.atomic_write(str(run / "checkpoints" / "epoch_2.pt")) as file:
        file.write(b"half")
        file.flush()
        RemoteSync(str(run), remote).sync_once()
        raise RuntimeError
    assert set(content(remote)) == set(FILES)
    assert not any(storage.is_temporary(path) for path in run.rglob("*")), "the snapshots are removed"


def test_a_file_replaced_during_its_upload_arrives_in_its_old_version(
    run: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = storage.upload

    def upload_after_change(source: str, url: str) -> None:
        if "epoch_1" in url:
            storage.write_bytes(str(run / "checkpoints" / "epoch_1.pt"), b"another")
        if "out.log" in url:
            (run / "out.log").write_bytes(b"another line\n" * 1000)
        upload(source, url)

    sync = RemoteSync(str(run), f"s3://{s3_bucket}/run")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", upload_after_change)
        assert sync.sync_once().problems == []
    copy = content(f"s3://{s3_bucket}/run")
    assert (copy["checkpoints/epoch_1.pt"], copy["out.log"]) == (FILES["checkpoints/epoch_1.pt"], FILES["out.log"])
    assert sorted(sync.finish().uploaded) == ["checkpoints/epoch_1.pt", "out.log"]
    assert content(f"s3://{s3_bucket}/run")["checkpoints/epoch_1.pt"] == b"another"


def fail_uploads(monkeypatch: pytest.MonkeyPatch, *names: str) -> Callable[[], None]:
    """Make uploads fail whose URL contains one of these names; return a function that repairs them."""
    upload = storage.upload
    broken = set(names)

    def upload_or_fail(source: str, url: str) -> None:
        if any(name in url for name in broken):
            raise StorageError(f"{url}: injected failure")
        upload(source, url)

    monkeypatch.setattr(storage, "upload", upload_or_fail)
    return broken.clear


def test_the_model_is_not_uploaded_before_its_optimizer(
    run: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repair = fail_uploads(monkeypatch, "optimizer_1")
    sync = RemoteSync(str(run), f"s3://{s3_bucket}/run")
    report = sync.sync_once()
    assert len(report.problems) == 1 and "optimizer_1.pt" in report.problems[0]
    assert set(content(f"s3://{s3_bucket}/run")) == set(FILES) - {
        "checkpoints/epoch_1.pt",
        "checkpoints/optimizer_1.pt",
    }
    repair()
    assert sync.sync_once().uploaded == ["checkpoints/optimizer_1.pt", "checkpoints/epoch_1.pt"]


def test_a_failed_last_copy_is_reported_with_every_file(
    run: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_uploads(monkeypatch, "out.log", "params.txt")
    sync = RemoteSync(str(run), f"s3://{s3_bucket}/run")
    with pytest.raises(StorageError) as error:
        sync.finish()
    for part in ("out.log", "params.txt", "the last copy", f"The local folder {run} is complete"):
        assert part in str(error.value)


def test_the_thread_copies_in_the_background_and_retries_after_a_failure(
    run: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"s3://{s3_bucket}/run"
    sync = RemoteSync(str(run), address, interval_s=0.01)
    sync_once, num_done, done = sync.sync_once, [0], threading.Condition()

    def counted() -> object:
        report = sync_once()
        with done:
            num_done[0] += 1
            done.notify_all()
        return report

    def wait_for_a_full_sync() -> None:
        with done:
            target = num_done[0] + 2  # the next one to finish may have started before
            assert done.wait_for(lambda: num_done[0] >= target, timeout=60)

    monkeypatch.setattr(sync, "sync_once", counted)
    with caplog.at_level(logging.WARNING), sync:
        repair = fail_uploads(monkeypatch, "late.txt")
        (run / "late.txt").write_text("late")
        wait_for_a_full_sync()
        assert "late.txt" not in content(address)
        repair()
        wait_for_a_full_sync()
        assert content(address)["late.txt"] == b"late"
    assert "late.txt: injected failure" in caplog.text and "will try again" in caplog.text
    assert not any(thread.name.startswith("remote-sync") for thread in threading.enumerate())


def test_a_wrong_url_fails_the_run_at_its_start(run: Path, s3_bucket: str) -> None:
    for prefix in ("", storage.FSSPEC_PREFIX):
        with pytest.raises(StorageError, match="no such bucket"):
            RemoteSync(str(run), f"{prefix}s3://{s3_bucket}-not/run").start()


def test_the_fsspec_protocol_uses_fsspec(run: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "_connect", lambda *args: pytest.fail("boto3 was used"))
    cfg = LoggingConfig(remote_sync=f"s3://{s3_bucket}/runs/", remote_sync_protocol="fsspec")
    remote = remote_folder(cfg, "run")
    assert remote is not None and remote.endswith(f"{s3_bucket}/runs/run")
    assert RemoteSync(str(run), remote).sync_once().problems == []
    assert content(remote) == FILES


def test_an_error_of_the_copy_does_not_hide_the_error_of_the_run(
    run: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), RemoteSync(str(run), f"s3://{s3_bucket}/run"):
        fail_uploads(monkeypatch, "new.txt")
        (run / "new.txt").write_text("new")
        raise ZeroDivisionError
    assert "new.txt: injected failure" in caplog.text


def test_snapshots_of_a_killed_run_are_removed(run: Path, s3_bucket: str) -> None:
    snapshot = run / "checkpoints" / ".epoch_1.pt.open-lm-part-sync-0123"
    os.link(run / "checkpoints" / "epoch_1.pt", snapshot)
    with RemoteSync(str(run), f"s3://{s3_bucket}/run"):
        assert not snapshot.exists()
    assert (run / "checkpoints" / "epoch_1.pt").read_bytes() == FILES["checkpoints/epoch_1.pt"]


# ---------------------------------------------------------------------------------------------- sharded checkpoints
STEP = {"rank_00000_000.bin": b"0" * 3000, "rank_00001_000.bin": b"1" * 3000, "checkpoint.json": b'{"format": 1}'}


@pytest.fixture
def step(run: Path) -> Path:
    """Create a complete and an incomplete step_N folder in the run; return the complete one."""
    for folder in ("step_00000007", "step_00000009.incomplete"):
        for name, data in STEP.items():
            (run / "checkpoints" / folder).mkdir(exist_ok=True)
            (run / "checkpoints" / folder / name).write_bytes(data)
    return run / "checkpoints" / "step_00000007"


def in_step(names: Iterable[str]) -> list[str]:
    return [f"checkpoints/step_00000007/{name}" for name in names]


def test_the_names_match_those_of_the_checkpoint_package() -> None:
    assert (remote_sync._INDEX, remote_sync._INCOMPLETE) == (INDEX, INCOMPLETE)


def test_the_index_is_uploaded_last_and_incomplete_folders_never(run: Path, step: Path, remote: str) -> None:
    report = RemoteSync(str(run), remote).sync_once()
    expected = {**FILES, **{f"checkpoints/step_00000007/{name}": data for name, data in STEP.items()}}
    assert content(remote) == expected
    assert sorted(report.uploaded[-2:]) == ["checkpoints/epoch_1.pt", "checkpoints/step_00000007/checkpoint.json"]


def test_only_the_index_is_held_back_when_a_file_fails(
    run: Path, step: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"s3://{s3_bucket}/run"
    repair = fail_uploads(monkeypatch, "rank_00001")
    sync = RemoteSync(str(run), address)
    report = sync.sync_once()
    assert report.held_back == in_step(["checkpoint.json"]) and len(report.problems) == 1
    assert set(content(address)) == {*FILES, *in_step(["rank_00000_000.bin"])}
    with pytest.raises(StorageError, match=r"step_00000007/checkpoint\.json was not uploaded") as error:
        sync.finish()
    assert "rank_00001_000.bin: injected failure" in str(error.value)
    repair()
    assert sync.sync_once().uploaded == in_step(["rank_00001_000.bin", "checkpoint.json"])


def test_a_folder_removed_during_the_upload_is_no_error(
    run: Path, step: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = storage.upload

    def upload_after_removal(source: str, url: str) -> None:
        if "rank_0000" in url:
            remove_folder(str(step))
        upload(source, url)

    sync = RemoteSync(str(run), f"s3://{s3_bucket}/run", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", upload_after_removal)
        report = sync.sync_once()
    assert report.problems == [] and not step.exists()
    copy = content(f"s3://{s3_bucket}/run")
    assert copy == {**FILES, "checkpoints/step_00000007/rank_00000_000.bin": STEP["rank_00000_000.bin"]}
    assert sync.finish().uploaded == []
    assert content(f"s3://{s3_bucket}/run") == copy, "remote files are never deleted"


def test_a_restarted_process_does_not_upload_checkpoints_twice(run: Path, step: Path, s3_bucket: str) -> None:
    address = f"s3://{s3_bucket}/run"
    for path in run.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    RemoteSync(str(run), address).sync_once()
    step.with_name("step_00000009.incomplete").rename(step.with_name("step_00000009"))
    uploaded = RemoteSync(str(run), address).sync_once().uploaded
    assert sorted(uploaded) == sorted(f"checkpoints/step_00000009/{name}" for name in STEP)


# ---------------------------------------------------------------------------------------------- failing stores
@pytest.mark.parametrize("kind", ["503", "500", "reset", "reset_after", "stall"])
def test_a_store_with_occasional_faults_only_delays_the_copy(
    run: Path, step: Path, faulty_s3: FaultyProxy, kind: str
) -> None:
    faulty_s3.rules += [Rule(kind, method=method, times=3, skip=2, seconds=0.05) for method in ("PUT", "HEAD")]
    sync = RemoteSync(str(run), f"s3://{faulty_s3.bucket}/run")
    assert sync.finish().problems == [] and faulty_s3.injected[kind] == 6
    expected = {**FILES, **dict(zip(in_step(STEP), STEP.values(), strict=True))}
    assert content(f"s3://{faulty_s3.bucket}/run") == expected


def test_a_bucket_that_disappears_and_comes_back(
    run: Path, step: Path, s3_bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    address, store = f"s3://{s3_bucket}/run", boto3.client("s3")
    sync = RemoteSync(str(run), address)
    sync.sync_once()
    for name in content(address):
        store.delete_object(Bucket=s3_bucket, Key=f"run/{name}")
    store.delete_bucket(Bucket=s3_bucket)
    with open(run / "out.log", "ab") as file:
        file.write(b"more\n")
    assert "no such bucket" in sync.sync_once().problems[0]
    with pytest.raises(StorageError, match=r"(?s)the last copy .* is incomplete.*no such bucket"):
        sync.finish()
    store.create_bucket(Bucket=s3_bucket)
    assert sync.finish().problems == []
    assert set(content(address)) == {*FILES, *in_step(STEP)}, "all files are uploaded again"


@pytest.mark.processes
def test_a_killed_upload_leaves_nothing_that_looks_complete(run: Path, step: Path, faulty_s3: FaultyProxy) -> None:
    arrived, end = threading.Event(), threading.Event()

    def hold(seconds: float) -> None:
        arrived.set()
        end.wait(60)

    faulty_s3.wait = hold  # type: ignore[method-assign]
    faulty_s3.rules += [Rule("delay", method="PUT", path=name) for name in ("rank_00001", "optimizer_1")]
    address = f"s3://{faulty_s3.bucket}/run"
    code = f"from open_lm.storage.remote_sync import RemoteSync; RemoteSync({str(run)!r}, {address!r}).sync_once()"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert arrived.wait(60)
        process.kill()
    copied = set(content(address))
    end.set()
    assert not copied & {*in_step(["checkpoint.json"]), "checkpoints/epoch_1.pt"}
    faulty_s3.rules.clear()
    with RemoteSync(str(run), address):
        assert set(content(address)) == {*FILES, *in_step(STEP)}
    assert not any(storage.is_temporary(path) for path in run.rglob("*")), "its snapshots are removed"
