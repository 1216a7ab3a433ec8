"""Shards as a reader opens them: local files mapped into memory, remote ones and `pipe:` commands fetched first."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from open_lm import storage
from open_lm.data.npy_block import NpyRows
from open_lm.data.shard_format import MEMBER_KINDS, Member, decode_member, index_shard
from open_lm.errors import DataError, StorageError

END_OF_TEXT_ID = 0  # what the string "<|endoftext|>" in old txt members stands for: gpt-neox-20b's end of text
_COMMAND_ATTEMPTS = 3


class Shard:
    """An open shard: its members of one kind, in file order, and their bytes."""

    def __init__(self, url: str, path: str, wanted_kind: str | None) -> None:
        """Open the local file `path` of the shard `url`; DataError where it is not a whole tar of ids."""
        self.url = url
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise DataError(f"{url}: the file is empty; make or copy the shard again")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        members = index_shard(self.data, url)
        kinds = {member.kind for member in members}
        self.kind = wanted_kind if wanted_kind in kinds else next(kind for kind in MEMBER_KINDS if kind in kinds)
        self.members: list[Member] = [member for member in members if member.kind == self.kind]

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def rows(self) -> NpyRows | None:
        """The members as rows of one array; None where they are not npy or the first of them is not plain."""
        if self.kind == "npy":
            with contextlib.suppress(ValueError):
                return NpyRows(self.data, self.members)
        return None

    def ids(self, number: int) -> np.ndarray:
        """The ids of a member, int64 (any length,), as stored; DataError that names shard and member."""
        member = self.members[number]
        data = self.data[member.offset : member.offset + member.size]
        try:
            return decode_member(data, member.kind, eot_id=END_OF_TEXT_ID)
        except DataError as error:
            raise DataError(f"{self.url}, member {member.key}.{member.kind}: {error}") from error


class ShardStore:
    """The shards in use: the last `capacity` ones stay open, remote ones are kept as files in `folder`."""

    def __init__(self, capacity: int, folder: str | None) -> None:
        self._capacity, self._folder = capacity, folder
        self._open: OrderedDict[tuple[str, str | None], Shard] = OrderedDict()
        self._fetching: dict[str, Future[str]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def get(self, url: str, wanted_kind: str | None) -> Shard:
        """The open shard; DataError or StorageError where it cannot be read."""
        key = (url, wanted_kind)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        shard = self._load(url, wanted_kind) if needs_fetch(url) else _open_local(url, wanted_kind)
        self._open[key] = shard
        while len(self._open) > self._capacity:
            self._open.popitem(last=False)
        return shard

    def prefetch(self, url: str) -> None:
        """Begin to fetch a remote shard; what goes wrong is reported when the shard is asked for."""
        if not needs_fetch(url) or url in self._fetching or any(name == url for name, _ in self._open):
            return
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="shard-fetch")
        self._fetching[url] = self._pool.submit(fetch, url, self._required_folder)

    @property
    def _required_folder(self) -> str:
        if self._folder is None:
            raise ValueError("remote shards need a folder to be fetched into")
        return self._folder

    def _load(self, url: str, wanted_kind: str | None) -> Shard:
        fetched = self._fetching.pop(url, None)
        if fetched is not None:
            with contextlib.suppress(DataError, StorageError):  # tried once more below
                fetched.result()
        for _ in range(10):
            path = fetch(url, self._required_folder)
            with contextlib.suppress(FileNotFoundError):  # another worker has made room just now
                shard = Shard(url, path, wanted_kind)
                _make_room(Path(path).parent, keep=2 * self._capacity + 2)
                return shard
        raise DataError(f"{url}: disappears from {self._required_folder} while it is opened")


def needs_fetch(url: str) -> bool:
    return url.startswith("pipe:") or storage.is_remote(url)


def _open_local(url: str, wanted_kind: str | None) -> Shard:
    try:
        return Shard(url, storage.local_path(url), wanted_kind)
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error.strerror or error}); copy the shard there again") from error


def fetch(url: str, folder: str) -> str:
    """Fetch a remote shard into `folder`, once for all processes that ask; the path of the whole file."""
    path = os.path.join(folder, hashlib.sha256(url.encode()).hexdigest()[:32] + ".tar")
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
        elif url.startswith("pipe:"):
            _run_command(url, path)
        else:
            storage.download(url, path)
    return path


def _run_command(url: str, path: str) -> None:
    """The output of a `pipe:` command as a file, whole or not at all."""
    from webdataset import gopen

    for attempt in range(_COMMAND_ATTEMPTS):
        try:
            with storage.atomic_write(path, "wb") as file, gopen(url) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
            return
        except OSError as error:
            if attempt == _COMMAND_ATTEMPTS - 1:
                raise DataError(
                    f"{url}: the command failed {_COMMAND_ATTEMPTS} times; its own messages are above, run it by hand "
                    f"to see why ({error})"
                ) from error


def _make_room(folder: Path, keep: int) -> None:
    """Delete the files used longest ago; a process that still reads one keeps it until it is done."""
    ages: list[tuple[float, Path]] = []
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):
            ages.append((path.stat().st_mtime, path))
    for _, path in sorted(ages, reverse=True)[keep:]:
        path.unlink(missing_ok=True)
