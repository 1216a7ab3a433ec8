"""Copying a run's folder to remote storage while it runs (`--remote-sync`), without getting in the way.

A thread copies what is new or changed every `every_s` seconds, several files at once, each verified at the other end.
It never deletes anything there. A file is uploaded from a snapshot, so that one which is replaced, grows or is removed
meanwhile arrives as it was at one moment. What makes a checkpoint complete, a step_N folder's checkpoint.json or an
epoch_N.pt, goes after the files beside it: where it is, they are. What is not complete here stays here.
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
# The names of open_lm/checkpoint, which stands above this module.
_INCOMPLETE = ".incomplete"
_INDEX = "checkpoint.json"
_NEVER_CHANGED = (".pt", ".bin")  # in place: they are only replaced, or removed
# What a continued run adds to.
GROWING = ("out.log", "metrics.jsonl", "checkpoints/results.jsonl")


@dataclass
class SyncReport:
    """What one pass did, by relative path: files uploaded, found unchanged, and held back because those that they
    complete did not arrive; and what went wrong."""

    uploaded: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def remote_folder(cfg: LoggingConfig, name: str) -> str | None:
    """Where --remote-sync keeps the copy of the run `name`; with --remote-sync-protocol fsspec an address that
    storage reaches through fsspec, S3 too."""
    if cfg.remote_sync is None:
        return None
    through_fsspec = cfg.remote_sync_protocol == "fsspec" and cfg.remote_sync.startswith("s3://")
    return storage.join((storage.FSSPEC_PREFIX if through_fsspec else "") + cfg.remote_sync, name)


class RemoteSync:
    """Keeps a copy of the folder `local` at the address `remote`, with up to `workers` files at a time on their way."""

    def __init__(self, local: str, remote: str, every_s: float = 300, workers: int = 4) -> None:
        self.local = storage.local_path(local)
        self.remote = storage.local_path(remote).rstrip("/")
        self.every_s = every_s
        self._workers = workers
        self._sent: dict[str, tuple[int, int]] = {}  # relative path -> size and time (ns) of what was uploaded
        self._remote_known = False
        self._one_pass = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Copy once, so that a wrong address or missing permission ends the run at its start, then keep copying."""
        self._remove_old_snapshots()
        report = self.sync_once()
        if report.problems:
            raise StorageError(join_problems(report.problems, f"--remote-sync {self.remote} does not work"))
        self._thread = threading.Thread(target=self._keep_copying, name="remote-sync", daemon=True)
        self._thread.start()

    def finish(self) -> SyncReport:
        """Stop the thread and copy a last time; StorageError with every file that could not be copied."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        report = self.sync_once()
        if report.problems:
            held_back = [f"{path} was held back, because files beside it did not arrive" for path in report.waiting]
            problems = [*report.problems, *held_back]
            raise StorageError(
                join_problems(problems, f"--remote-sync: the last copy to {self.remote} is incomplete")
                + f"\nEverything is complete in {self.local}; copy it by hand"
            )
        logging.info(f"remote sync: {self.remote} is complete")
        return report

    def __enter__(self) -> RemoteSync:
        self.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._thread is None:
            return  # it never worked, which `start` has said
        try:
            self.finish()
        except StorageError as failure:
            if error is None:
                raise
            logging.error(str(failure))  # what ended the run is the error to see

    def sync_once(self) -> SyncReport:
        """Upload what is new or changed since the last pass. Failures are in the report, not raised."""
        with self._one_pass:
            report = SyncReport()
            try:
                if not self._remote_known:
                    self._compare_with_remote()
                changed = self._changed(report)
                last = [path for path in changed if _completes(path)]
                failed = self._upload_all([path for path in changed if path not in last], report)
                # What completes a checkpoint whose other files did not arrive waits for the next pass.
                unready = {os.path.dirname(path) for path in failed}
                report.waiting += [path for path in last if os.path.dirname(path) in unready]
                self._upload_all([path for path in last if path not in report.waiting], report)
            except StorageError as error:
                report.problems.append(str(error))
            if report.problems:
                self._remote_known = False  # who knows what else is lost there: the next pass looks
            return report

    def _keep_copying(self) -> None:
        while not self._stop.wait(self.every_s):
            try:
                problems = self.sync_once().problems
            except Exception as error:  # a thread that dies unseen would leave the run without copies
                problems = [f"{type(error).__name__}: {error}"]
            if problems:
                logging.warning(join_problems(problems, f"remote sync to {self.remote} will try again"))

    def _files(self) -> Iterable[str]:
        for folder, folders, names in os.walk(self.local):
            folders[:] = [name for name in folders if not name.endswith(_INCOMPLETE)]
            for name in names:
                path = os.path.join(folder, name)
                if not storage.is_temporary(name) and not os.path.islink(path):
                    yield os.path.relpath(path, self.local)

    def _changed(self, report: SyncReport) -> list[str]:
        changed: list[str] = []
        for path in sorted(self._files()):
            try:
                same = self._sent.get(path) == _fingerprint(os.path.join(self.local, path))
            except FileNotFoundError:
                continue  # deleted since it was listed
            (report.unchanged if same else changed).append(path)
        return changed

    def _compare_with_remote(self) -> None:
        """What is there already, from this or an earlier run of the program: of the same size, and uploaded from the
        file as it is, or younger than it."""
        there = {item.url[len(self.remote) + 1 :]: item for item in storage.list_infos(self.remote, recursive=True)}
        present: dict[str, tuple[int, int]] = {}
        for path in self._files():
            found = there.get(path.replace(os.sep, "/"))
            try:
                size, changed_ns = _fingerprint(os.path.join(self.local, path))
            except FileNotFoundError:
                continue
            unchanged = self._sent.get(path) == (size, changed_ns)
            if found is not None and found.size == size and (unchanged or found.mtime_s > changed_ns / 1e9):
                present[path] = (size, changed_ns)
        self._sent = present
        self._remote_known = True

    def _upload_all(self, paths: list[str], report: SyncReport) -> list[str]:
        """Upload files, some at a time; returns those that failed."""
        with ThreadPoolExecutor(self._workers, thread_name_prefix="remote-sync") as pool:
            uploads = [(path, pool.submit(self._upload, path)) for path in paths]
        failed = []
        for path, upload in uploads:
            try:
                upload.result()
                report.uploaded.append(path)
            except FileNotFoundError:
                pass  # removed since it was listed, such as a checkpoint that a newer one replaced
            except (StorageError, OSError) as error:
                report.problems.append(str(error))
                failed.append(path)
        return failed

    def _upload(self, path: str) -> None:
        """Upload one file from a snapshot; FileNotFoundError where it is no longer here."""
        source = os.path.join(self.local, path)
        # Not in a step_N folder, which the snapshot would keep from being removed.
        top = os.path.join(self.local, os.path.dirname(path).partition(os.sep)[0])
        snapshot = storage.temporary_name(os.path.join(top, os.path.basename(path)), f"{_SNAPSHOT}{uuid.uuid4().hex}")
        try:
            fingerprint = _take_snapshot(source, snapshot)
            storage.upload(snapshot, storage.join(self.remote, *path.split(os.sep)))
            self._sent[path] = fingerprint
        finally:
            if os.path.exists(snapshot):
                os.unlink(snapshot)

    def _remove_old_snapshots(self) -> None:
        """Those that a killed run left behind."""
        for folder, _, names in os.walk(self.local):
            for name in names:
                if storage.is_temporary(name) and _SNAPSHOT in name:
                    os.unlink(os.path.join(folder, name))


def fetch_logs(remote: str, local: str) -> list[str]:
    """Bring over a run's growing files where the copy is further on, so that a run which continues on another machine
    adds to them instead of replacing them there by shorter ones. Returns what was fetched."""
    fetched = []
    for name in GROWING:
        there, here = storage.info(storage.join(remote, name)), storage.info(storage.join(local, name))
        if there is not None and (here is None or there.size > here.size):
            storage.download(there.url, storage.join(local, name))
            fetched.append(name)
    return fetched


def _completes(path: str) -> bool:
    """Whether a file says that the checkpoint in its folder is complete."""
    name = os.path.basename(path)
    return name == _INDEX or (name.startswith("epoch_") and name.endswith(".pt"))


def _fingerprint(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _take_snapshot(source: str, snapshot: str) -> tuple[int, int]:
    """Make `snapshot` the file as it is now, and return its size and time.

    To a file that is never changed in place a second link costs nothing. Other files grow: they are copied.
    """
    take: Callable[[str, str], object] = os.link if source.endswith(_NEVER_CHANGED) else shutil.copyfile
    fingerprint = _fingerprint(source)
    try:
        take(source, snapshot)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(source, snapshot)
    return _fingerprint(snapshot) if take is os.link else fingerprint
