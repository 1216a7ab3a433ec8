"""Open shards: verified, mapped into memory, and fetched ahead if they are remote.

Batch path: stream.py reads the members of the open shards; next: the finished batch goes through device.py (to the GPU,
one batch ahead) to training/step.py.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import IO

import numpy as np

from open_lm import storage
from open_lm.data.fetch import FetchSettings, needs_fetch
from open_lm.data.npy_block import NpyRows
from open_lm.data.remote_shards import RemoteShards
from open_lm.data.shard_format import MEMBER_KINDS, Member, decode_member, index_shard
from open_lm.data.verify import Expected, verify
from open_lm.errors import DataError, UserError

END_OF_TEXT_ID = 0  # of the string "<|endoftext|>" in old txt members: gpt-neox-20b's end of text
_MAX_DOWNLOADS = 4
_AHEAD_BYTES = 256 << 20
_UNKNOWN = Expected()


def sequence_members(members: Sequence[Member], data_key: str | None = None) -> list[Member]:
    """Return the members of a shard that are its sequences, in file order: those of one kind.

    The kind is `data_key` if the shard has it, else the most frequent one, and the first of MEMBER_KINDS among equally
    frequent ones. Other members, such as a single meta.json or a second format of each sample, are no sequences.
    """
    counts = Counter(member.kind for member in members)
    kind = data_key if data_key in counts else max(MEMBER_KINDS, key=lambda kind: counts[kind])
    return [member for member in members if member.kind == kind]


class Shard:
    """An open shard: its members of one kind, in file order, and their bytes."""

    def __init__(self, url: str, file: IO[bytes], data_key: str | None) -> None:
        """Map the open local file of the shard `url`; DataError if it is not a complete tar of ids.

        The mapping keeps the locks of `file`, which may be closed.
        """
        self.url = url
        if os.fstat(file.fileno()).st_size == 0:
            raise DataError(f"{url}: the file is empty; create or copy the shard again")
        self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.members = sequence_members(index_shard(self.data, url), data_key)
        self.kind = self.members[0].kind

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def npy(self) -> NpyRows | None:
        """The members as rows of one array; None if they are not npy, or the first one is not a plain array."""
        if self.kind == "npy":
            with contextlib.suppress(ValueError):
                return NpyRows(self.data, self.members)
        return None

    def ids(self, number: int) -> np.ndarray:
        """Return the ids of a member as stored, int64 (any length,); DataError that names shard and member."""
        member = self.members[number]
        data = self.data[member.offset : member.offset + member.size]
        try:
            return decode_member(data, member.kind, eot_id=END_OF_TEXT_ID)
        except DataError as error:
            raise DataError(f"{self.url}, member {member.key}.{member.kind}: {error}") from error


class ShardStore:
    """The shards in use: the last `capacity` ones stay open, which also keeps their downloaded files.

    `expected` holds the manifests' sizes and checksums by address. `get` checks them before it returns a shard.
    """

    def __init__(self, capacity: int, settings: FetchSettings, expected: Mapping[str, Expected]) -> None:
        self._capacity, self._settings, self._expected = capacity, settings, expected
        self._open: OrderedDict[tuple[str, str | None], Shard] = OrderedDict()
        self._ahead: dict[str, Future[IO[bytes]]] = {}
        self._ahead_bytes = min(_AHEAD_BYTES, settings.cache_limit_bytes // 4) if settings.cache_dir else _AHEAD_BYTES
        self._largest_bytes = 0  # of the shards so far: the estimate for a shard of unknown size
        self._remote = RemoteShards(settings)

    def keep_open(self, count: int) -> None:
        """Keep at least this many shards open, as a batch has sequences of so many."""
        self._capacity = max(self._capacity, count)

    def get(self, url: str, data_key: str | None) -> Shard:
        """Return the open shard; DataError or StorageError if it cannot be read or differs from its manifest."""
        key = (url, data_key)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        started = self._ahead.pop(url, None)
        with self._file(url) if started is None else started.result() as file:
            shard = Shard(url, file, data_key)
        self._open[key] = shard
        self._largest_bytes = max(self._largest_bytes, len(shard.data))
        if len(self._open) > self._capacity:
            self._open.popitem(last=False)
            self._remote.trim()
        return shard

    def prefetch(self, urls: Sequence[str]) -> None:
        """Start to fetch remote shards and to verify local ones; errors are raised when the shard is requested.

        `urls` are in the order of their use. The number of downloads at a time and their bytes are limited, but each
        source gets at least one; the caller asks again for the others. Finished downloads that are not among `urls` are
        released: other workers read those shards.
        """
        for url in self._ahead.keys() - set(urls):
            if self._ahead[url].done():
                with contextlib.suppress(UserError), self._ahead.pop(url).result():
                    pass
        running = sum(not future.done() for future in self._ahead.values())
        ahead_bytes = 0
        for number, url in enumerate(url for url in dict.fromkeys(urls) if not self._is_open(url)):
            expected = self._expected.get(url, _UNKNOWN)
            ahead_bytes += expected.num_bytes or self._largest_bytes or self._ahead_bytes
            if running >= _MAX_DOWNLOADS or (ahead_bytes > self._ahead_bytes and number >= self._capacity // 2):
                return
            if url not in self._ahead and (needs_fetch(url) or expected.sha256):
                self._ahead[url] = storage.run_in_background(partial(self._file, url))
                running += 1

    def _is_open(self, url: str) -> bool:
        return any(name == url for name, _ in self._open)

    def _file(self, url: str) -> IO[bytes]:
        """Return the open, verified file of a shard."""
        expected = self._expected.get(url, _UNKNOWN)
        if needs_fetch(url):
            return self._remote.open(url, expected)
        try:
            file = open(storage.local_path(url), "rb")  # noqa: SIM115  (returned)
            problem = verify(file, expected, self._settings.folder)
        except OSError as error:
            message = f"{url}: cannot be read ({error.strerror or error}); copy the shard there again"
            raise DataError(message) from error
        if problem:
            file.close()
            raise DataError(f"{url}: {problem} from its manifest; copy the shard again, or recreate the manifest")
        return file
