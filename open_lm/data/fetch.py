"""Download shards and verify their checksums.

Remote files are downloaded with `open_lm.storage`, in parallel parts; commands, and the few schemes that only
webdataset knows, through the output of a process. The bytes are hashed on arrival and compared with the manifest before
the file is used. `cache.py` manages the downloaded files.
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
import stat
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.manifest import TEXT_PREFIX
from open_lm.data.shard_format import iter_files
from open_lm.data.verify import Expected
from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.system.names import user_path

if TYPE_CHECKING:
    from open_lm.data.block_sums import BlockSums
    from open_lm.data.order import Source

_MAX_ATTEMPTS = 3
_PIPE_BYTES = 1 << 20
_FOLDER_PREFIX = "open_lm-shards-"
_LOCK_NAME = "alive"  # locked by a running process in its temporary folder
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchSettings:
    """Settings for reading shards, as plain values that can be sent to a worker.

    `folder` is the path of a `FetchFolder`, which the ranks and workers of a node share: it records which files are
    verified, and stores remote shards while they are read. A `cache_dir` stores them instead, for later passes and
    runs, up to `cache_limit_bytes`. A read without a byte for `read_timeout_s` seconds is retried.
    """

    folder: str | None = None
    cache_dir: str | None = None
    cache_limit_bytes: int = 0
    read_timeout_s: float = DataConfig.read_timeout

    @classmethod
    def from_config(cls, data: DataConfig, folder: str | None) -> FetchSettings:
        """Return the settings of the flags; ConfigError for an invalid --cache-limit or a remote --cache-dir."""
        if data.cache_dir is None:
            return cls(folder, read_timeout_s=data.read_timeout)
        if storage.is_remote(data.cache_dir):
            raise ConfigError(f"--cache-dir {data.cache_dir}: expected a local folder")
        try:
            limit = storage.parse_bytes(data.cache_limit)
        except ValueError as error:
            raise ConfigError(f"--cache-limit: {error}") from error
        path = os.path.abspath(user_path(storage.local_path(data.cache_dir)))
        return cls(folder, path, limit, data.read_timeout)


def needs_fetch(url: str) -> bool:
    """Return whether a shard must be downloaded, or made from raw text, before it can be read."""
    return url.startswith(("pipe:", TEXT_PREFIX)) or storage.is_remote(url)


def is_read_in_blocks(url: str, block_sums: BlockSums | None, has_cache: bool) -> bool:
    """Return whether parts of a shard can be read and verified, and no cache needs the whole shard."""
    return block_sums is not None and (not needs_fetch(url) or (url.startswith("s3://") and not has_cache))


# --- the temporary folder of a run -----------------------------------------------------------------------------------
class FetchFolder:
    """A temporary folder that all ranks of a node share, removed when the last of them ends or drops this object.

    A lock shows that the folder is in use; forked workers hold it too. Creating a new folder removes those whose
    processes were all killed.
    """

    @classmethod
    def if_needed(cls, sources: Sequence[Source]) -> FetchFolder | None:
        """Return the folder, new or of another rank, if any shard must be downloaded or verified."""
        return cls() if cls.is_needed(sources) else None

    @staticmethod
    def is_needed(sources: Sequence[Source]) -> bool:
        """Return whether any shard must be downloaded or verified."""
        return any(
            sha256 or needs_fetch(url)
            for source in sources
            for url, sha256 in zip(source.shards, source.sha256, strict=True)
        )

    def __init__(self) -> None:
        _remove_abandoned()
        while True:
            self.name = _shared_folder() or tempfile.mkdtemp(prefix=_FOLDER_PREFIX)
            with contextlib.suppress(FileNotFoundError):  # another process removed it as abandoned
                lock = os.open(os.path.join(self.name, _LOCK_NAME), os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.flock(lock, fcntl.LOCK_SH)
                if os.fstat(lock).st_nlink:
                    break
                os.close(lock)
        self._remove = weakref.finalize(self, _remove_folder, self.name, lock, os.getpid())

    def cleanup(self) -> None:
        """Remove the folder now, unless other ranks use it."""
        self._remove()


def _shared_folder() -> str | None:
    """Create a folder with a name that only the ranks of this run on this node derive; None for a single rank."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID")
    run = "\n".join(os.environ.get(name, "") for name in names)
    if int(os.environ.get("LOCAL_WORLD_SIZE") or 1) < 2 or "MASTER_PORT" not in os.environ:
        return None
    folder = os.path.join(tempfile.gettempdir(), _FOLDER_PREFIX + hashlib.sha256(run.encode()).hexdigest()[:16])
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return None
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return folder if is_ours else None


def _remove_folder(name: str, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(name, ignore_errors=True)
        os.close(lock)


def _remove_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*/{_LOCK_NAME}"):
        with contextlib.suppress(OSError), open(path, "rb+") as lock:  # of another user, or in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


# --- fetching --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Origin:
    """The origin of a shard: `identity` identifies its present content as well as possible, `num_bytes` is its size.

    `num_bytes` is -1 if unknown. `info` is None for the output of a command.
    """

    url: str
    identity: str
    num_bytes: int
    info: storage.FileInfo | None


def look_up(url: str, expected: Expected, timeout_s: float) -> Origin:
    """Look up a remote shard before its download; no request is needed if its sha256 and size are known.

    StorageError if it does not exist.
    """
    if _is_command(url):
        size = -1 if expected.num_bytes is None else expected.num_bytes
        return Origin(url, f"{url}\n{expected.num_bytes} {expected.sha256}", size, None)
    if expected.sha256 and expected.num_bytes is not None:
        info = storage.FileInfo(url, expected.num_bytes, 0.0)
        return Origin(url, f"{url}\n{expected.num_bytes} {expected.sha256}", info.size, info)
    found = storage.info(url, timeout_s)
    if found is None:
        raise StorageError(f"{url}: no such file")
    identity = f"{url}\n{found.size} {found.etag or found.mtime_s} {expected.sha256}"
    return Origin(url, identity, found.size, found)


def fetch(origin: Origin, expected: Expected, timeout_s: float, file: IO[bytes], grow: Callable[[int], None]) -> str:
    """Download the shard to `file` and return its sha256 in hex.

    Call `grow(num_bytes)` before the file becomes that long. A shard that differs from `expected` is downloaded again,
    and so is an incomplete tar of unknown size and checksum: DataError after a few attempts. StorageError from storage,
    which has its own retries.
    """
    problem = ""
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            problem, sha256 = _fetch_once(origin, expected, timeout_s, file, grow)
        except (storage.Stalled, subprocess.CalledProcessError) as error:  # of a command; storage has its own retries
            problem, sha256 = _command_problem(error), ""
        except storage.SizeMismatch as error:
            problem, sha256 = Expected(origin.num_bytes).problem(error.num_bytes, ""), ""
        if not problem:
            return sha256
        if attempt < _MAX_ATTEMPTS:
            logger.warning(f"{origin.url}: {problem}; attempt {attempt} of {_MAX_ATTEMPTS} failed, trying again")
            storage.back_off(attempt)
    advice = "create or copy the shard again, or recreate the manifest"
    if _is_command(origin.url):
        advice = "see the command's own messages above, or run it by hand"
    raise DataError(f"{origin.url}: {problem}, in the last of {_MAX_ATTEMPTS} attempts; {advice}")


def _fetch_once(
    origin: Origin, expected: Expected, timeout_s: float, file: IO[bytes], grow: Callable[[int], None]
) -> tuple[str, str]:
    """Download once; return the problem with the result ("" if there is none) and its sha256."""
    digest, size, known_bytes = hashlib.sha256(), 0, -1
    file.seek(0)
    if origin.info is None:
        parts = _command_output(origin.url, timeout_s)
    else:
        known_bytes = origin.info.size
        if known_bytes >= 0 and expected.num_bytes not in (None, known_bytes):
            return expected.problem(known_bytes, ""), ""
        parts = storage.read_parts(origin.info, timeout_s)
    with storage.wrap_disk_full_errors(origin.url, os.path.dirname(file.name)), contextlib.closing(parts):
        for part in parts:
            size += len(part)
            grow(size)
            file.write(part)
            digest.update(part)
        file.flush()
        os.ftruncate(file.fileno(), size)
    problem = expected.problem(size, digest.hexdigest())
    if not problem and known_bytes < 0 and expected == Expected():
        problem = _tar_problem(file)
    return problem, digest.hexdigest()


def _tar_problem(file: IO[bytes]) -> str:
    """Describe why a file is not a complete tar; "" if it is. A download of unknown length may have ended early."""
    if not os.fstat(file.fileno()).st_size:
        return "is empty"
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for _ in iter_files(data, "tar"):
                pass
        except DataError as error:
            return str(error).removeprefix("tar: ")
    return ""


# --- commands --------------------------------------------------------------------------------------------------------
def _is_command(url: str) -> bool:
    return url.startswith("pipe:") or not storage.has_backend(url)


def _command_problem(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit status {error.returncode}"
    return str(error).partition(": ")[2]


def _command_output(url: str, timeout_s: float) -> Generator[bytes, None, None]:
    """Yield a command's output; Stalled after `timeout_s` seconds without output, CalledProcessError if it fails."""
    with _start(url) as (process, allowed):
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
def _start(url: str) -> Iterator[tuple[subprocess.Popen[bytes], tuple[int, ...]]]:
    """Start the process that prints a shard; yield it and the exit statuses that mean success. Kill it at the end.

    `pipe:` commands are not started by webdataset: its handler detects no stalls and cannot end the processes that the
    shell started. Its handlers are used for the schemes that storage has no file system for (ais, scp, ftps, htgs),
    each of which starts a single process.
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
            message = "neither a file system nor a command for this kind of address is installed"
            raise StorageError(f"{url}: {message} ({error})") from error
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
