"""How the bytes of a shard come to this machine, and how they are known to be the right ones.

Remote files come through `open_lm.storage`, in parallel parts; commands and the few schemes that only webdataset knows
as the output of a process. What comes is hashed on the way and compared with what the manifest says before anyone
reads it. What this module fetches lies in files that `cache.py` keeps.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import select
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.shard_format import iter_files
from open_lm.data.verify import Expected
from open_lm.errors import ConfigError, DataError, StorageError

_ATTEMPTS = 3
_PIPE_BYTES = 1 << 20
_FOLDER_PREFIX = "open_lm-shards-"
_ALIVE = "alive"  # the lock that a living run holds in its temporary folder
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchSettings:
    """How shards reach a reader; plain values that can be sent to a worker.

    `folder` is a `FetchFolder`, which all workers of a rank share: what is known to be whole is noted there, and remote
    shards are kept there while they are read. Where there is a `cache_dir`, it keeps them instead, for longer, up to
    `cache_limit_bytes`. A read that brings no byte for `read_timeout_s` seconds is given up and tried again.
    """

    folder: str | None = None
    cache_dir: str | None = None
    cache_limit_bytes: int = 0
    read_timeout_s: float = DataConfig.read_timeout

    @classmethod
    def of(cls, data: DataConfig, folder: str | None) -> FetchSettings:
        """The settings of the flags; ConfigError for a --cache-limit that is no size and a --cache-dir not local."""
        if data.cache_dir is None:
            return cls(folder, read_timeout_s=data.read_timeout)
        if storage.is_remote(data.cache_dir):
            raise ConfigError(f"--cache-dir {data.cache_dir}: expected a local folder")
        try:
            limit = storage.parse_bytes(data.cache_limit)
        except ValueError as error:
            raise ConfigError(f"--cache-limit: {error}") from error
        path = os.path.abspath(os.path.expanduser(storage.local_path(data.cache_dir)))
        return cls(folder, path, limit, data.read_timeout)


def needs_fetch(url: str) -> bool:
    """Whether a shard has to be fetched before it can be read."""
    return url.startswith("pipe:") or storage.is_remote(url)


# --- the temporary folder of a run -----------------------------------------------------------------------------------
class FetchFolder:
    """A temporary folder of one rank, removed when this object goes or the process ends.

    A lock tells that it is in use: workers that are forked hold it too. Folders whose holders were all killed are
    removed by the next that is made.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        while True:
            self.name = tempfile.mkdtemp(prefix=_FOLDER_PREFIX)
            lock = os.open(os.path.join(self.name, _ALIVE), os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.fstat(lock).st_nlink:  # else another process took it for abandoned just before it was locked
                break
            os.close(lock)
        self._remove = weakref.finalize(self, _remove_own, self.name, lock, os.getpid())

    def cleanup(self) -> None:
        """Remove it now."""
        self._remove()


def _remove_own(name: str, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # and not a forked child
        shutil.rmtree(name, ignore_errors=True)
        os.close(lock)


def _remove_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*/{_ALIVE}"):
        with contextlib.suppress(OSError), open(path, "rb+") as lock:  # another user's, or in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


# --- fetching --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Origin:
    """A shard where it comes from: what names its present content (the more is known the surer), and how long it is.

    `found` is None for the output of a command; an unknown size is -1.
    """

    url: str
    identity: str
    num_bytes: int
    found: storage.FileInfo | None


def look_up(url: str, expected: Expected, timeout_s: float) -> Origin:
    """What can be known of a remote shard before it is fetched; no request where its sha256 and size are known.

    StorageError where it is looked for and not there.
    """
    if _is_command(url):
        size = -1 if expected.num_bytes is None else expected.num_bytes
        return Origin(url, f"{url}\n{expected.num_bytes} {expected.sha256}", size, None)
    if expected.sha256 and expected.num_bytes is not None:
        found = storage.FileInfo(url, expected.num_bytes, 0.0)
        return Origin(url, f"{url}\n{expected.num_bytes} {expected.sha256}", found.size, found)
    looked = storage.info(url, timeout_s)
    if looked is None:
        raise StorageError(f"{url}: no such file")
    identity = f"{url}\n{looked.size} {looked.etag or looked.mtime_s} {expected.sha256}"
    return Origin(url, identity, looked.size, looked)


def fetch(origin: Origin, expected: Expected, timeout_s: float, file: IO[bytes], grow: Callable[[int], None]) -> str:
    """Fill `file` with the shard and return its sha256 in hex.

    `grow(num_bytes)` is called before the file becomes that long. What differs from `expected` is fetched anew, and so
    is what nothing vouches for and is no whole tar: DataError after some attempts. StorageError: what storage could not
    get over.
    """
    problem = ""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            problem, sha256 = _fetch_once(origin, expected, timeout_s, file, grow)
        except (storage.Stalled, subprocess.CalledProcessError) as error:  # a command's; storage tries on its own
            problem, sha256 = _command_problem(error), ""
        except storage.OtherSize as error:
            problem, sha256 = Expected(origin.num_bytes).problem(error.num_bytes, ""), ""
        if not problem:
            return sha256
        if attempt < _ATTEMPTS:
            logger.warning(f"{origin.url}: {problem}; attempt {attempt} of {_ATTEMPTS} is given up, another follows")
            storage.back_off(attempt)
    advice = "make or copy the shard again, or make the manifest anew"
    if _is_command(origin.url):
        advice = "the command's own messages are above, run it by hand to see why"
    raise DataError(f"{origin.url}: {problem}, in the last of {_ATTEMPTS} attempts; {advice}")


def _fetch_once(
    origin: Origin, expected: Expected, timeout_s: float, file: IO[bytes], grow: Callable[[int], None]
) -> tuple[str, str]:
    """What is wrong with what came, or an empty string, and its sha256."""
    digest, size, announced = hashlib.sha256(), 0, -1
    file.seek(0)
    if origin.found is None:
        parts = _output(origin.url, timeout_s)
    else:
        announced = origin.found.size
        if announced >= 0 and expected.num_bytes not in (None, announced):
            return expected.problem(announced, ""), ""
        parts = storage.read_parts(origin.found, timeout_s)
    with storage.full_disk_explained(origin.url, os.path.dirname(file.name)), contextlib.closing(parts):
        for part in parts:
            size += len(part)
            grow(size)
            file.write(part)
            digest.update(part)
        file.flush()
        os.ftruncate(file.fileno(), size)
    problem = expected.problem(size, digest.hexdigest())
    if not problem and announced < 0 and expected == Expected():
        problem = _tar_problem(file)
    return problem, digest.hexdigest()


def _tar_problem(file: IO[bytes]) -> str:
    """Why a file is no whole tar; empty where it is one. An answer without a length may end anywhere."""
    if not os.fstat(file.fileno()).st_size:
        return "is empty"
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for _ in iter_files(data, "it"):
                pass
        except DataError as error:
            return str(error)
    return ""


# --- commands --------------------------------------------------------------------------------------------------------
def _is_command(url: str) -> bool:
    return url.startswith("pipe:") or not storage.has_backend(url)


def _command_problem(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit status {error.returncode}"
    return str(error).partition(": ")[2]


def _output(url: str, timeout_s: float) -> Generator[bytes, None, None]:
    """What a command prints; Stalled where nothing comes for `timeout_s` seconds, CalledProcessError where it fails."""
    with _started(url) as (process, allowed):
        assert process.stdout is not None
        pipe, poll = process.stdout.fileno(), select.poll()
        poll.register(pipe, select.POLLIN | select.POLLHUP)
        while True:
            if not poll.poll(timeout_s * 1000):
                raise storage.Stalled(url, timeout_s)
            data = os.read(pipe, _PIPE_BYTES)
            if not data:
                break
            yield data
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise storage.Stalled(url, timeout_s) from None
        if status not in allowed:
            raise subprocess.CalledProcessError(status, url)


@contextlib.contextmanager
def _started(url: str) -> Iterator[tuple[subprocess.Popen[bytes], tuple[int, ...]]]:
    """The process that prints a shard and the exit statuses that mean success; one that is given up is killed.

    `pipe:` commands are started here and not by webdataset, whose handler neither sees a stall nor can end what the
    shell has started. Its handlers serve the schemes that no file system of storage knows (ais, scp, ftps, htgs): each
    starts a single process.
    """
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
        opened, allowed = None, [0]
    else:
        from webdataset import gopen

        try:
            opened = gopen(url)
        except (ValueError, OSError) as error:
            told = "neither a file system nor a command for this kind of address is installed"
            raise StorageError(f"{url}: {told} ({error})") from error
        process, allowed = opened.proc, opened.ignore_status
    assert process.stdout is not None
    try:
        yield process, tuple(allowed)
    finally:
        if process.poll() is None and opened is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
