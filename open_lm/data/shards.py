"""Open shards: verified, mapped into memory, and fetched ahead if they are remote.

Batch path: stream.py reads the members of the open shards; next: the finished batch goes through device.py (to the GPU,
one batch ahead) to training/step.py.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import IO

import numpy as np

from open_lm import storage
from open_lm.data.block_shards import BlockFiller, BlockShard, ShardPiece, allow_open_files
from open_lm.data.fetch import FetchSettings, is_read_in_blocks, needs_fetch
from open_lm.data.fetch_threads import FetchThreads
from open_lm.data.npy_block import NpyRows
from open_lm.data.remote_shards import RemoteShards
from open_lm.data.shard_format import MEMBER_KINDS, Member, decode_member, index_shard
from open_lm.data.verify import Expected, verify
from open_lm.errors import ConfigError, DataError, UserError

END_OF_TEXT_ID = 0  # of the string "<|endoftext|>" in old txt members: gpt-neox-20b's end of text
_MAX_DOWNLOADS = 4
_AHEAD_BYTES = 256 << 20
_FILES_PER_SHARD = 3
_UNKNOWN = Expected()
# What the process or its temporary folder has too little of, which says nothing about a shard.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.ENOLCK}


def sequence_members(members: Sequence[Member], data_key: str | None = None) -> list[Member]:
    """Return the members of a shard that are its sequences, in file order: those of one kind.

    The kind is `data_key` if the shard has it, else the most frequent one, and the first of MEMBER_KINDS among equally
    frequent ones. Other members, such as a single meta.json or a second format of each sample, are not sequences.
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

    def is_readable(self, member: int) -> bool:
        """Return True: the whole file is verified."""
        return True

    def close(self) -> None:
        """Do nothing: the mapping ends with the last reference to it."""

    def member_name(self, number: int) -> str:
        """Return the name of a member."""
        return f"{self.members[number].key}.{self.kind}"

    def ids(self, number: int) -> np.ndarray:
        """Return the ids of a member as stored, int64 (any length,); DataError that names shard and member."""
        member = self.members[number]
        data = self.data[member.offset : member.offset + member.size]
        try:
            return decode_member(data, member.kind, eot_id=END_OF_TEXT_ID)
        except DataError as error:
            raise DataError(f"{self.url}, member {self.member_name(number)}: {error}") from error


class ShardStore:
    """The shards in use: the last `capacity` ones stay open, which also keeps their downloaded files.

    `expected` holds the manifests' sizes and checksums by address. `get` checks them before it returns a shard, or with
    checksums of blocks, `make_readable` checks those of the requested members.
    """

    def __init__(self, capacity: int, settings: FetchSettings, expected: Mapping[str, Expected]) -> None:
        self._capacity, self._settings, self._expected = capacity, settings, expected
        self._min_ahead = capacity // 2  # shards, so that each source has one
        self._open: OrderedDict[tuple[str, str | None], Shard | BlockShard] = OrderedDict()
        self._threads = FetchThreads(_MAX_DOWNLOADS)
        self._ahead: dict[str, Future[IO[bytes]]] = {}  # whole shards that are fetched before they are opened
        self._upcoming: list[str] = []  # those to fetch next, the nearest first
        self._ahead_bytes = min(_AHEAD_BYTES, settings.cache_limit_bytes // 4) if settings.cache_dir else _AHEAD_BYTES
        self._largest_bytes = 0  # of the shards so far: the estimate for a shard of unknown size
        self._remote = RemoteShards(settings)
        self.on_close: Callable[[str], object] = lambda url: None  # called with the address of a shard that is closed
        self._filler = BlockFiller(settings.read_timeout_s)

    def keep_open(self, count: int) -> None:
        """Keep at least this many shards open, as a batch has sequences of so many."""
        if count > self._capacity:
            self._capacity = count
            allow_open_files(_FILES_PER_SHARD * count)

    def get(self, url: str, data_key: str | None) -> Shard | BlockShard:
        """Return the open shard; DataError or StorageError if it cannot be read or differs from its manifest."""
        key = (url, data_key)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        shard = self._open_blocks(url) if self._has_blocks(url) else self._open_whole(url, data_key)
        self._open[key] = shard
        if len(self._open) > self._capacity:
            self._close_oldest()
            self._remote.trim()  # removes the file, since nothing refers to the shard any more
        return shard

    def _close_oldest(self) -> None:
        (url, _), shard = self._open.popitem(last=False)
        shard.close()
        self.on_close(url)

    def mark_used(self, url: str, data_key: str | None) -> None:
        """Keep an open shard as if `get` had returned it."""
        self._open.move_to_end((url, data_key))

    def _open_whole(self, url: str, data_key: str | None) -> Shard:
        started = self._ahead.pop(url, None)
        with self._file(url) if started is None else started.result() as file:
            shard = Shard(url, file, data_key)
        self._largest_bytes = max(self._largest_bytes, len(shard.data))
        if url in self._upcoming:
            self._upcoming.remove(url)
        self._fetch_upcoming()
        return shard

    def _has_blocks(self, url: str) -> bool:
        """Return whether parts of a shard can be fetched and verified, and no cache needs the whole shard."""
        block_sums, has_cache = self._expected.get(url, _UNKNOWN).block_sums, self._settings.cache_dir is not None
        return self._settings.folder is not None and is_read_in_blocks(url, block_sums, has_cache)

    def _open_blocks(self, url: str) -> BlockShard:
        assert self._settings.folder is not None
        path = None if needs_fetch(url) else storage.local_path(url)
        with self._explain_errors(url, path):
            return BlockShard(url, self._expected[url], self._settings.folder, path)

    def make_readable(self, shard: Shard | BlockShard, members: np.ndarray) -> None:
        """Fetch and verify some members (n,) of a shard. DataError, StorageError as in `get`."""
        if isinstance(shard, BlockShard) and len(members):
            shard.ensure(shard.missing_of(members), self._settings.read_timeout_s)
            shard.prepare(int(members[0]))

    def fetch(self, parts: Sequence[tuple[str, np.ndarray]], data_key: str | None = None) -> None:
        """Fetch and verify members (n,) of the shards at some addresses in parallel, before they are requested.

        Return when parts of shards are readable; whole shards are awaited when they are requested. Errors are raised
        then, too.
        """
        whole = [url for url, _ in parts if not self._has_blocks(url)]
        for url in reversed(self._not_open(dict.fromkeys(whole))):
            waiting = self._ahead.get(url)
            if self._must_fetch(url) and (waiting is None or waiting.cancel()):
                self._ahead[url] = self._threads.submit(partial(self._file, url), first=True)
        if len(whole) < len(parts):
            with contextlib.suppress(UserError):
                shards = [(self.get(url, data_key), members) for url, members in parts if self._has_blocks(url)]
                self._filler.fetch([(shard, members) for shard, members in shards if isinstance(shard, BlockShard)])

    def prefetch(self, pieces: Sequence[ShardPiece], data_key: str | None = None) -> None:
        """Start to fetch remote shards and to verify local ones, the nearest first, in place of those of the last call.

        Errors are raised when the shard is requested.
        """
        ahead = [piece for piece in pieces if self._has_blocks(piece.url)]
        if len(ahead) < len(pieces):
            self._upcoming = list(dict.fromkeys(piece.url for piece in pieces if not self._has_blocks(piece.url)))
            self._release_others()
            self._fetch_upcoming()
        if ahead:
            with contextlib.suppress(UserError):
                shards = [(self.get(piece.url, data_key), piece) for piece in ahead]
                self._filler.fill([(shard, piece) for shard, piece in shards if isinstance(shard, BlockShard)])

    def _release_others(self) -> None:
        """Drop the fetched shards, and those whose fetch has not started, that are not among the upcoming ones."""
        for url in self._ahead.keys() - set(self._upcoming):
            if self._ahead[url].cancel():
                self._ahead.pop(url)
            elif self._ahead[url].done():
                with contextlib.suppress(UserError), self._ahead.pop(url).result():
                    pass

    def _fetch_upcoming(self) -> None:
        """Start to fetch the nearest upcoming shards, up to a number of bytes, but at least one of each source."""
        ahead_bytes = 0
        for number, url in enumerate(self._not_open(self._upcoming)):
            expected = self._expected.get(url, _UNKNOWN)
            ahead_bytes += expected.num_bytes or self._largest_bytes or self._ahead_bytes
            if ahead_bytes > self._ahead_bytes and number >= self._min_ahead:
                return
            if url not in self._ahead and self._must_fetch(url):
                self._ahead[url] = self._threads.submit(partial(self._file, url))

    def _must_fetch(self, url: str) -> bool:
        """Return whether a whole shard must be downloaded or verified before it is opened."""
        return needs_fetch(url) or bool(self._expected.get(url, _UNKNOWN).sha256)

    def _not_open(self, urls: Iterable[str]) -> list[str]:
        open_urls = {url for url, _ in self._open}
        return [url for url in urls if url not in open_urls]

    def _file(self, url: str) -> IO[bytes]:
        """Return the open, verified file of a shard."""
        expected = self._expected.get(url, _UNKNOWN)
        if needs_fetch(url):
            return self._remote.open(url, expected)
        path = storage.local_path(url)
        with self._explain_errors(url, path):
            file = open(path, "rb")  # noqa: SIM115  (returned)
            problem = verify(file, expected, self._settings.folder)
        if problem:
            file.close()
            raise DataError(f"{url}: {problem} from its manifest; copy the shard again, or recreate the manifest")
        return file

    @contextlib.contextmanager
    def _explain_errors(self, url: str, path: str | None) -> Iterator[None]:
        """Raise DataError for a local shard at `path` that cannot be read, ConfigError for what the process lacks."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            if error.errno not in _EXHAUSTED and error.filename in (None, path):
                raise DataError(f"{url}: cannot be read ({reason}); copy the shard there again") from error
            problem = ConfigError(
                f"{self._settings.folder or url}: cannot hold the open shards ({reason}); raise `ulimit -n`, or free "
                "space there (TMPDIR)"
            )
            problem.on_every_rank = False
            raise problem from error
