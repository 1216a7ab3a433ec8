"""Copy a run folder to remote storage while the run is training (`--remote-sync`).

A thread uploads new and changed files every `interval_s` seconds, several files in parallel, and verifies each upload.
It never deletes remote files. Each file is uploaded from a snapshot, so that a file which is replaced, appended to or
removed meanwhile arrives in a consistent state. The file that marks a checkpoint as complete (the checkpoint.json of a
step_N folder, or epoch_N.pt) is uploaded after all other files of its folder. Incomplete files are not uploaded.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from open_lm import storage
from open_lm.config.sections import LoggingConfig
from open_lm.errors import StorageError, join_problems

_SNAPSHOT = "sync-"
# The same names as in open_lm/checkpoint, which this package must not import.
_INCOMPLETE = ".incomplete"
_CACHE = ".cache"  # a folder that a resumed run can make again
_INDEX = "checkpoint.json"
_IMMUTABLE_SUFFIXES = (".pt", ".bin")  # never changed in place, only replaced or removed
# Files to which a resumed run appends.
_APPENDED_FILES = ("out.log", "metrics.jsonl", "checkpoints/results.jsonl")


@dataclass
class SyncReport:
    """The result of one synchronization, with relative paths.

    held_back: files that mark a checkpoint as complete, not uploaded because another file of the folder failed.
    problems: error messages.
    """

    uploaded: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    held_back: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def remote_folder(cfg: LoggingConfig, name: str) -> str | None:
    """Return the remote URL of the run `name` (None without --remote-sync); --remote-sync-protocol fsspec uses fsspec
    for S3 too."""
    if cfg.remote_sync is None:
        return None
    through_fsspec = cfg.remote_sync_protocol == "fsspec" and cfg.remote_sync.startswith("s3://")
    return storage.join((storage.FSSPEC_PREFIX if through_fsspec else "") + cfg.remote_sync, name)


class RemoteSync:
    """A background copy of the folder `local` at the URL `remote`, uploading up to `workers` files in parallel."""

    def __init__(self, local: str, remote: str, interval_s: float = 300, workers: int = 4) -> None:
        self.local = storage.local_path(local)
        self.remote = storage.local_path(remote).rstrip("/")
        self.interval_s = interval_s
        self._workers = workers
        self._uploaded: dict[str, tuple[int, int]] = {}  # relative path -> size and mtime (ns) of the uploaded version
        self._remote_listed = False
        self._sync_lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Synchronize once, so that a wrong URL or missing permission fails the run at its start; start the thread."""
        self._remove_old_snapshots()
        report = self.sync_once()
        if report.problems:
            raise StorageError(join_problems(report.problems, f"--remote-sync {self.remote} does not work"))
        self._thread = threading.Thread(target=self._sync_loop, name="remote-sync", daemon=True)
        self._thread.start()

    def finish(self) -> SyncReport:
        """Stop the thread and synchronize a last time; raise StorageError with every file that could not be copied."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        report = self.sync_once()
        if report.problems:
            held_back = [
                f"{path} was not uploaded, because other files of its folder could not be uploaded"
                for path in report.held_back
            ]
            problems = [*report.problems, *held_back]
            raise StorageError(
                join_problems(problems, f"--remote-sync: the last copy to {self.remote} is incomplete")
                + f"\nThe local folder {self.local} is complete; copy it by hand"
            )
        logging.info(f"remote sync: {self.remote} is complete")
        return report

    def __enter__(self) -> RemoteSync:
        self.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._thread is None:
            return  # `start` failed and has raised its error
        try:
            self.finish()
        except StorageError as failure:
            if error is None:
                raise
            logging.error(str(failure))  # do not hide the error that ended the run

    def sync_once(self) -> SyncReport:
        """Upload files that are new or changed since the last call. Failures are in the report, not raised."""
        with self._sync_lock:
            report = SyncReport()
            try:
                if not self._remote_listed:
                    self._compare_with_remote()
                changed = self._changed(report)
                markers = [path for path in changed if _marks_complete(path)]
                failed = self._upload_all([path for path in changed if path not in markers], report)
                # If another file of the folder failed, upload the marker next time.
                incomplete_folders = {os.path.dirname(path) for path in failed}
                report.held_back += [path for path in markers if os.path.dirname(path) in incomplete_folders]
                self._upload_all([path for path in markers if path not in report.held_back], report)
            except StorageError as error:
                report.problems.append(str(error))
            if report.problems:
                self._remote_listed = False  # more remote files may be lost: list them again next time
            return report

    def _sync_loop(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                problems = self.sync_once().problems
            except Exception as error:  # if the thread died, the run would silently have no more copies
                problems = [f"{type(error).__name__}: {error}"]
            if problems:
                logging.warning(join_problems(problems, f"remote sync to {self.remote} failed and will try again"))

    def _files(self) -> Iterable[str]:
        for folder, folders, names in os.walk(self.local):
            folders[:] = [name for name in folders if not name.endswith((_INCOMPLETE, _CACHE))]
            for name in names:
                path = os.path.join(folder, name)
                if not storage.is_temporary(name) and not os.path.islink(path):
                    yield os.path.relpath(path, self.local)

    def _changed(self, report: SyncReport) -> list[str]:
        changed: list[str] = []
        for path in sorted(self._files()):
            try:
                is_same = self._uploaded.get(path) == _fingerprint(os.path.join(self.local, path))
            except FileNotFoundError:
                continue  # deleted since it was listed
            (report.unchanged if is_same else changed).append(path)
        return changed

    def _compare_with_remote(self) -> None:
        """Find the files that need no upload, because this or an earlier process uploaded them.

        The remote file must have the same size, and be uploaded from the current version or be newer than it.
        """
        remote = {item.url[len(self.remote) + 1 :]: item for item in storage.list_infos(self.remote, recursive=True)}
        current: dict[str, tuple[int, int]] = {}
        for path in self._files():
            copy = remote.get(path.replace(os.sep, "/"))
            try:
                size, mtime_ns = _fingerprint(os.path.join(self.local, path))
            except FileNotFoundError:
                continue
            is_same = self._uploaded.get(path) == (size, mtime_ns)
            if copy is not None and copy.size == size and (is_same or copy.mtime_s > mtime_ns / 1e9):
                current[path] = (size, mtime_ns)
        self._uploaded = current
        self._remote_listed = True

    def _upload_all(self, paths: list[str], report: SyncReport) -> list[str]:
        """Upload files in parallel, and return those that failed."""
        with ThreadPoolExecutor(self._workers, thread_name_prefix="remote-sync") as pool:
            uploads = [(path, pool.submit(self._upload, path)) for path in paths]
        failed = []
        for path, upload in uploads:
            try:
                upload.result()
                report.uploaded.append(path)
            except FileNotFoundError:
                pass  # removed since it was listed, e.g. a checkpoint that a newer one replaced
            except (StorageError, OSError) as error:
                report.problems.append(str(error))
                failed.append(path)
        return failed

    def _upload(self, path: str) -> None:
        """Upload one file from a snapshot; raise FileNotFoundError if it was removed."""
        source = os.path.join(self.local, path)
        # Not in a step_N folder: the snapshot would prevent its removal.
        top = os.path.join(self.local, os.path.dirname(path).partition(os.sep)[0])
        snapshot = storage.temporary_name(os.path.join(top, os.path.basename(path)), f"{_SNAPSHOT}{uuid.uuid4().hex}")
        try:
            fingerprint = _take_snapshot(source, snapshot)
            storage.upload(snapshot, storage.join(self.remote, *path.split(os.sep)))
            self._uploaded[path] = fingerprint
        finally:
            if os.path.exists(snapshot):
                os.unlink(snapshot)

    def _remove_old_snapshots(self) -> None:
        """Remove the snapshots that a killed run left."""
        for folder, _, names in os.walk(self.local):
            for name in names:
                if storage.is_temporary(name) and _SNAPSHOT in name:
                    os.unlink(os.path.join(folder, name))


def fetch_logs(remote: str, local: str) -> list[str]:
    """Download the logs of a run that are longer in the remote copy, and return their names.

    A run that resumes on another machine then appends to them, and does not overwrite the remote logs with shorter
    ones.
    """
    fetched = []
    for name in _APPENDED_FILES:
        remote_info, local_info = storage.info(storage.join(remote, name)), storage.info(storage.join(local, name))
        if remote_info is not None and (local_info is None or remote_info.size > local_info.size):
            storage.download(remote_info.url, storage.join(local, name))
            fetched.append(name)
    return fetched


def _marks_complete(path: str) -> bool:
    """Return whether a file marks the checkpoint in its folder as complete."""
    name = os.path.basename(path)
    return name == _INDEX or (name.startswith("epoch_") and name.endswith(".pt"))


def _fingerprint(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _take_snapshot(source: str, snapshot: str) -> tuple[int, int]:
    """Create a snapshot of a file, and return its size and modification time (ns).

    A file that is never changed in place is hard-linked, which is free. Other files may grow and are copied.
    """
    copy: Callable[[str, str], object] = os.link if source.endswith(_IMMUTABLE_SUFFIXES) else shutil.copyfile
    fingerprint = _fingerprint(source)
    try:
        copy(source, snapshot)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, snapshot)
    return _fingerprint(snapshot) if copy is os.link else fingerprint
