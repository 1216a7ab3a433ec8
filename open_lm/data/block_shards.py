"""Shards of which only the needed blocks are fetched or verified, with the block checksums of a manifest.

A remote shard is a sparse local file. A map of one byte per block marks the blocks that were fetched and verified. All
processes that pass the same private folder share both files, so each block is fetched once and hashed once. A lock on
the map is held while blocks are added. The files are removed by the last process that closes the shard.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import mmap
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial
from itertools import chain
from tarfile import BLOCKSIZE
from typing import IO, NamedTuple

import numpy as np

from open_lm import storage
from open_lm.data.fetch_threads import FetchThreads
from open_lm.data.shard_format import decode_member, split_name
from open_lm.data.verify import Expected
from open_lm.errors import DataError, StorageError

_MAX_ATTEMPTS = 3
_MAX_REQUEST_BYTES = 8 << 20
_MAX_NPY_HEADER = 4096
_NUM_PARALLEL = 16  # requests for blocks that are needed now
_NUM_FILLING = 4  # pieces that are fetched ahead at a time
_OTHER_OPEN_FILES = 256


class BlockShard:
    """An open shard of npy members of one size, whose blocks `ensure` makes readable. Its interface is `Shard`'s.

    `path` is the file of a local shard; None for a remote one, which is stored in `folder` while it is open.
    """

    kind = "npy"

    def __init__(self, url: str, expected: Expected, folder: str, path: str | None) -> None:
        assert expected.block_sums is not None and expected.num_bytes is not None
        self.url, self._sums, self._size = url, expected.block_sums, expected.num_bytes
        self._count, self._is_remote = expected.num_sequences, path is None
        identity = f"{url}\n{self._size} {expected.sha256} {self._sums.sums.hex()}"
        if path is not None:
            status = os.stat(path)
            if status.st_size != self._size:
                problem = expected.problem(status.st_size, "")
                raise DataError(f"{url}: {problem} from its manifest; copy the shard again, or recreate the manifest")
            identity += f"\n{status.st_ino} {status.st_size} {status.st_mtime_ns}"
        base = os.path.join(folder, "blocks-" + hashlib.sha256(os.fsencode(identity)).hexdigest()[:32])
        self._map_path, self._path = f"{base}.map", path or f"{base}.tar"
        self._open()
        self.npy: BlockRows | None = None
        self.is_closed = False
        self.pieces: list[range] = []  # members that are read together

    def _open(self) -> None:
        """Open both files; the shared lock of the map keeps them from being removed."""
        while True:
            lock = os.open(self._map_path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self._map_path)):
                    break
            os.close(lock)
        self._lock = lock
        _allocate(lock, self._sums.num_blocks)
        self._map_bytes = mmap.mmap(lock, self._sums.num_blocks)
        self._map = np.frombuffer(self._map_bytes, np.uint8)
        flags = os.O_RDWR | os.O_CREAT if self._is_remote else os.O_RDONLY
        with open(self._path, "rb", opener=lambda name, _: os.open(name, flags, 0o600)) as file:
            if self._is_remote:
                os.ftruncate(file.fileno(), self._size)
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Remove the files unless another process has the shard open; arrays of its data stay valid."""
        self.is_closed = True
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_remote:
                os.unlink(self._path)
            os.unlink(self._map_path)
            os.unlink(f"{self._map_path}.lock")
        os.close(self._lock)

    # --- blocks ------------------------------------------------------------------------------------------------------
    def missing(self, start: int, stop: int) -> list[int]:
        """Return the blocks of members `start` to `stop` that are not readable yet."""
        first = start * self._sums.member_bytes // self._sums.block_bytes
        last = (stop * self._sums.member_bytes - 1) // self._sums.block_bytes
        return (np.flatnonzero(self._map[first : last + 1] == 0) + first).tolist()

    def is_readable(self, member: int) -> bool:
        """Return whether a member is readable; False also for one that is larger than a block."""
        start = member * self._sums.member_bytes
        first, last = start // self._sums.block_bytes, (start + self._sums.member_bytes - 1) // self._sums.block_bytes
        return bool(self._map_bytes[first] and self._map_bytes[last] and last - first < 2)

    def missing_of(self, members: np.ndarray) -> list[int]:
        """Return the blocks of some members (n,) that are not readable yet."""
        offsets = members * self._sums.member_bytes
        first = offsets // self._sums.block_bytes
        last = (offsets + (self._sums.member_bytes - 1)) // self._sums.block_bytes
        ranges = (range(start, stop + 1) for start, stop in zip(first.tolist(), last.tolist(), strict=True))
        return [block for block in sorted(set(chain.from_iterable(ranges))) if not self._map[block]]

    def missing_with_pieces(self, members: np.ndarray) -> list[int]:
        """Return the blocks that `missing_of` returns, and those of their pieces that need only one request."""
        blocks = set(self.missing_of(members))
        for piece in self.pieces if blocks else ():
            if any(member in piece for member in members.tolist()):
                missing = self.missing(piece.start, piece.stop)
                if len(missing) * self._sums.block_bytes <= _MAX_REQUEST_BYTES:
                    blocks.update(missing)
        return sorted(blocks)

    def ensure(self, blocks: list[int], timeout_s: float, wait: bool = True) -> bool:
        """Fetch and verify blocks. Without `wait`, return False if another process is adding blocks.

        DataError if a block differs from the manifest, StorageError if it cannot be read.
        """
        for run in _runs(blocks, max(1, _MAX_REQUEST_BYTES // self._sums.block_bytes)):
            with _exclusive(self._map_path, wait) as has_lock:
                if not has_lock:
                    return False
                needed = [block for block in run if not self._map[block]]
                for part in _runs(needed, len(run)):
                    self._add(part, timeout_s)
        return True

    def _add(self, blocks: range, timeout_s: float) -> None:
        start = blocks.start * self._sums.block_bytes
        stop = min(blocks.stop * self._sums.block_bytes, self._size)
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            chunks = self._read(start, stop, timeout_s)
            bad = self._sums.mismatches(blocks, chunks)
            if not bad:
                break
            if attempt == _MAX_ATTEMPTS or not self._is_remote:
                first = bad[0] * self._sums.block_bytes
                raise DataError(
                    f"{self.url}: the bytes {first} to {min(first + self._sums.block_bytes, self._size)} differ from "
                    "the checksum in its manifest; copy the shard again, or recreate the manifest"
                )
            storage.back_off(attempt)
        if self._is_remote:
            self._write(start, chunks)
        self._map[blocks.start : blocks.stop] = 1

    def _read(self, start: int, stop: int, timeout_s: float) -> Sequence[bytes | memoryview]:
        if not self._is_remote:
            return [memoryview(self.data)[start:stop]]
        return storage.read_range_chunks(self.url, start, stop - start, timeout_s)

    def _write(self, start: int, chunks: Sequence[bytes | memoryview]) -> None:
        try:
            with open(self._path, "r+b", buffering=0) as file:
                file.seek(start)
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]
        except OSError as error:
            message = f"{os.path.dirname(self._path)}: cannot store shards there ({error.strerror or error})"
            raise StorageError(f"{message}; choose another folder (TMPDIR)") from error

    # --- members -----------------------------------------------------------------------------------------------------
    def prepare(self, member: int) -> None:
        """Read the npy header, from a member that is readable; all others have the same."""
        if self.npy is None:
            start = member * self._sums.member_bytes + BLOCKSIZE
            with io.BytesIO(self.data[start : start + _MAX_NPY_HEADER]) as header:
                if np.lib.format.read_magic(header) != (1, 0):
                    raise DataError(f"{self.url}: member {member} is not in version 1.0 of the npy format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(header)
                offset = BLOCKSIZE + header.tell()
            self.npy = BlockRows(self.data, self._count, self._sums.member_bytes, offset, shape[0], dtype)

    def ids(self, number: int) -> np.ndarray:
        """Return the ids of a readable member as stored, int64 (any length,)."""
        start = number * self._sums.member_bytes
        try:
            return decode_member(self.data[start + BLOCKSIZE : start + self._sums.member_bytes], self.kind)
        except DataError as error:
            raise DataError(f"{self.url}, member {self.member_name(number)}: {error}") from error

    def member_name(self, number: int) -> str:
        """Return the name of a readable member."""
        start = number * self._sums.member_bytes
        key, kind = split_name(self.data[start : start + 100].partition(b"\0")[0].decode("utf-8", "surrogateescape"))
        return f"{key}.{kind}"


class BlockRows:
    """The members of a `BlockShard` as rows of one array on its bytes, like `NpyRows`: each is a row."""

    def __init__(self, data: mmap.mmap, count: int, stride: int, offset: int, length: int, dtype: np.dtype) -> None:  # noqa: PLR0917
        self.length = length
        self.is_row = np.ones(count, bool)
        self.rows: np.ndarray = np.ndarray((count, length), dtype, data, offset, (stride, dtype.itemsize))

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """Return a copy of the ids of readable members `numbers` (n,): (n, length) in the stored type."""
        ids: np.ndarray = self.rows[numbers]
        return ids


class ShardPiece(NamedTuple):
    """Members `start` to `stop` of the shard at an address, all if `stop` is None."""

    url: str
    start: int
    stop: int | None


class BlockFiller:
    """Fetches blocks in background threads: those that are needed now at once, others one piece after the other."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._now, self._ahead = FetchThreads(_NUM_PARALLEL), FetchThreads(_NUM_FILLING)
        self._first_jobs: list[Callable[[], None]] | None = []  # ahead, which wait for the first `fetch`

    def fetch(self, parts: Sequence[tuple[BlockShard, np.ndarray]]) -> None:
        """Return when the members of the shards are readable; an error is raised when they are requested again.

        The first time, fetch only their blocks; later, also the other blocks of small pieces, with one request each.
        """
        blocks_of = BlockShard.missing_with_pieces if self._first_jobs is None else BlockShard.missing_of
        jobs = [(shard, blocks) for shard, members in parts if (blocks := blocks_of(shard, members))]
        wait([self._now.submit(partial(shard.ensure, blocks, self._timeout_s)) for shard, blocks in jobs])
        first_jobs, self._first_jobs = self._first_jobs or (), None
        for job in first_jobs:
            self._ahead.submit(job)

    def fill(self, pieces: Sequence[tuple[BlockShard, ShardPiece]]) -> None:
        """Fetch pieces in the background, each once, in this order after those of earlier calls."""
        for shard, piece in pieces:
            members = range(piece.start, len(shard) if piece.stop is None else piece.stop)
            if members not in shard.pieces:
                shard.pieces.append(members)
                job = partial(self._fill, shard, members)
                self._ahead.submit(job) if self._first_jobs is None else self._first_jobs.append(job)

    def _fill(self, shard: BlockShard, piece: range, wait: bool = False) -> None:
        if not shard.is_closed and not shard.ensure(shard.missing(piece.start, piece.stop), self._timeout_s, wait):
            self._ahead.submit(partial(self._fill, shard, piece, wait=True))  # another process is fetching it


def _allocate(file: int, size: int) -> None:
    """Extend a file with zeros that have space on the disk, so that a mapping of it can be written to."""
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system without it
                raise


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files if the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
            )


def _runs(blocks: list[int], limit: int) -> Iterator[range]:
    """Yield ranges of consecutive blocks, of at most `limit` blocks each."""
    start = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or blocks[end] != blocks[end - 1] + 1 or end - start == limit:
            yield range(blocks[start], blocks[end - 1] + 1)
            start = end


@contextlib.contextmanager
def _exclusive(map_path: str, wait: bool) -> Iterator[bool]:
    """Lock the blocks of a shard against other threads and processes; yield whether the lock was acquired."""
    lock: IO[bytes]
    with open(f"{map_path}.lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child forked in the meantime has the file open too
