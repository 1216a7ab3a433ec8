"""Write a folder that appears completely or not at all, and continue after an interruption.

A local folder is `DEST.incomplete` until it is complete, locked against other processes. In a bucket, a marker file is
written last. Until then conversion.json states what is converted, and the size and the CRC-32 of each finished weight
file. The same conversion keeps these files if their contents match. Another one starts again, or is refused in a
bucket, which has no locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

from open_lm import storage
from open_lm.errors import CheckpointError, ConfigError, StorageError
from open_lm.storage.paths import is_open_at, temporary_name

PROGRESS = "conversion.json"
_INCOMPLETE = ".incomplete"


class OutputFolder:
    """The folder that a conversion writes.

    Attributes:
        folder: path or URL to write to.
    """

    def __init__(self, folder: str, identity: Mapping[str, Any]) -> None:
        """Read and verify the finished files of an earlier attempt at the same conversion.

        Raises:
            ConfigError: a bucket has files of another conversion.
        """
        self.folder = folder
        self._identity = json.loads(json.dumps(identity, allow_nan=False))  # tuples become lists, as in the stored file
        self._files: dict[str, dict[str, Any]] = {}
        progress = self._read_progress()
        if progress is None:
            return
        if progress["identity"] != self._identity:
            self._refuse_in_bucket()
            logging.warning(f"{folder}: removing the files of another conversion that was interrupted")
            return
        for name, record in progress["files"].items():
            if self._is_intact(name, record):
                self._files[name] = record
            else:
                logging.warning(f"{storage.join(folder, name)}: changed since it was written; writing it again")
        if self._files:
            num_bytes = sum(record["size"] for record in self._files.values())
            logging.info(f"{folder}: continuing with {len(self._files)} finished files of {num_bytes / 1e9:.2f} GB")

    def _read_progress(self) -> dict[str, Any] | None:
        url = storage.join(self.folder, PROGRESS)
        if storage.info(url) is None:
            return None
        try:
            content: dict[str, Any] = json.loads(storage.read_text(url))
            return content if {"identity", "files"} <= set(content) else None
        except ValueError:
            return None

    def _refuse_in_bucket(self) -> None:
        if storage.is_remote(self.folder):
            raise ConfigError(
                f"{self.folder}: contains the files of another unfinished conversion ({PROGRESS} states which); repeat "
                "its command, remove the folder, or choose another one"
            )

    def _is_intact(self, name: str, record: Mapping[str, Any]) -> bool:
        info = storage.info(storage.join(self.folder, name))
        if info is None or info.size != record["size"]:
            return False
        checksum = 0
        for part in storage.read_parts(info):
            checksum = zlib.crc32(part, checksum)
        return checksum == int(record["checksum"])

    def facts(self, name: str) -> dict[str, Any] | None:
        """Return the facts that were recorded with a finished file; None for a file that must be written."""
        record = self._files.get(name)
        return None if record is None else dict(record["facts"])

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[ChecksumFile]:
        """Write a file atomically, and record it as finished with the `facts` of the yielded file."""
        with storage.atomic_write(storage.join(self.folder, name)) as file:
            output = ChecksumFile(file)
            yield output
        self._files[name] = {"size": output.num_bytes, "checksum": output.checksum, "facts": output.facts}
        self.record()

    def record(self) -> None:
        """Write conversion.json. Raise ConfigError if another conversion has started in the same bucket."""
        self.check_owner()
        content = {"identity": self._identity, "files": self._files}
        storage.write_text(storage.join(self.folder, PROGRESS), json.dumps(content, allow_nan=False))

    def check_owner(self) -> None:
        """Raise ConfigError if conversion.json is that of another conversion to the same bucket."""
        progress = self._read_progress() if storage.is_remote(self.folder) else None
        if progress is not None and progress["identity"] != self._identity:
            self._refuse_in_bucket()

    def remove_others(self) -> None:
        """Remove files of a local folder that are not finished."""
        kept = {*self._files, PROGRESS, os.path.basename(lock_path(self.folder))}
        for path, _, names in os.walk(self.folder, topdown=False):
            for name in names:
                file = os.path.join(path, name)
                if os.path.relpath(file, self.folder) not in kept:
                    os.unlink(file)


class ChecksumFile:
    """A file that is written, with its size and CRC-32.

    Attributes:
        facts: values to record with the file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes, self.checksum = 0, 0
        self.facts: dict[str, Any] = {}

    def write(self, data: Any) -> None:
        """Append bytes."""
        self._file.write(data)
        self.num_bytes += memoryview(data).nbytes
        self.checksum = zlib.crc32(data, self.checksum)


@contextlib.contextmanager
def output_folder(target: str, marker: str, identity: Mapping[str, Any]) -> Iterator[OutputFolder]:
    """Yield the folder to write, which becomes `target` when the block ends; the block writes the file `marker` last.

    `identity` describes the conversion: its source with sizes, and all settings.

    Raises:
        ConfigError: `target` exists and is not empty, or another process converts to it.
        StorageError: `target` cannot be written.
    """
    target = target.rstrip("/")
    if storage.is_remote(target):
        _check_absent_in_bucket(target, marker)
        output = OutputFolder(target, identity)
        output.record()
        yield output
        storage.remove(storage.join(target, PROGRESS))
        return
    local = storage.local_path(target)
    check_absent(local, target)
    incomplete = local + _INCOMPLETE
    with locked_folder(incomplete):
        check_absent(local, target)  # another process may have completed it before this one had the lock
        try:
            output = OutputFolder(incomplete, identity)
            output.remove_others()
            output.record()
            yield output
        except (ConfigError, CheckpointError):
            shutil.rmtree(incomplete, ignore_errors=True)  # repeating the command would fail again
            raise
        _publish(incomplete, local, target)


def _check_absent_in_bucket(target: str, marker: str) -> None:
    if storage.info(storage.join(target, marker)) is not None:
        raise ConfigError(f"{target}: has a {marker} already; remove the folder, or choose another one")


def check_absent(local: str, target: str) -> None:
    """Raise ConfigError if the local folder `local`, named `target` in the message, exists and is not empty."""
    if os.path.lexists(local) and not (os.path.isdir(local) and not os.listdir(local)):
        raise ConfigError(f"{target}: exists already; remove it, or choose another folder")


def lock_path(folder: str) -> str:
    """Return the lock file of a folder."""
    return temporary_name(os.path.join(folder, "conversion"), "lock")


@contextlib.contextmanager
def locked_folder(folder: str) -> Iterator[None]:
    """Create a folder and lock it; the operating system unlocks it when the process ends, however it ends."""
    path = lock_path(folder)
    while True:
        storage.makedirs(folder)
        try:
            file = open(path, "w")  # noqa: SIM115  (closed below)
        except FileNotFoundError:  # the folder was renamed
            continue
        except OSError as error:
            message = f"{path}: cannot be written ({error.strerror or error})"
            raise StorageError(f"{message}; make its folder writable, or choose another one") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # some network file systems have no locks
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ConfigError(
                        f"{folder}: another process writes to it; wait until it ends, or choose another folder"
                    ) from None
            if is_open_at(file, path):
                yield
                return


def _publish(incomplete: str, local: str, target: str) -> None:
    try:
        if os.path.isdir(local):
            os.rmdir(local)
        os.rename(incomplete, local)
        for path in (os.path.join(local, PROGRESS), lock_path(local)):
            os.unlink(path)
        storage.sync_folder(os.path.dirname(os.path.abspath(local)))
    except OSError as error:
        raise StorageError(f"{incomplete} could not be renamed to {target} ({error})") from error


@contextlib.contextmanager
def whole_folder(target: str, marker: str, identity: Mapping[str, Any]) -> Iterator[str]:
    """Yield the folder to write, as `output_folder` does, for a result that starts again after an interruption."""
    with output_folder(target, marker, identity) as output:
        yield output.folder
