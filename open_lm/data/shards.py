"""Shards as a reader opens them: verified, mapped into memory; remote ones and commands' output fetched first."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import IO

import numpy as np

from open_lm import storage
from open_lm.data.cache import Cache, Fill
from open_lm.data.fetch import FetchSettings, fetch, look_up, needs_fetch
from open_lm.data.npy_block import NpyRows
from open_lm.data.shard_format import MEMBER_KINDS, Member, decode_member, index_shard
from open_lm.data.verify import Expected, note_verified, verify
from open_lm.errors import DataError, StorageError, UserError

END_OF_TEXT_ID = 0  # what the string "<|endoftext|>" in old txt members stands for: gpt-neox-20b's end of text
_AT_ONCE = 4
_AHEAD_BYTES = 256 << 20
_MOST_BROKEN_COPIES = 3
_NOTHING = Expected()
logger = logging.getLogger(__name__)


class Shard:
    """An open shard: its members of one kind, in file order, and their bytes."""

    def __init__(self, url: str, file: IO[bytes], wanted_kind: str | None) -> None:
        """Map the open local file of the shard `url`; DataError where it is not a whole tar of ids.

        The mapping goes on holding the locks of `file`, which may be closed.
        """
        self.url = url
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
    """The shards in use: the last `capacity` ones stay open, so that those which were fetched stay where they are.

    `expected` is what manifests say of the shards' files, by address; it is checked before a shard is handed out.
    """

    def __init__(self, capacity: int, settings: FetchSettings, expected: Mapping[str, Expected]) -> None:
        self._capacity, self._settings, self._expected = capacity, settings, expected
        self._open: OrderedDict[tuple[str, str | None], Shard] = OrderedDict()
        self._ahead: dict[str, Future[IO[bytes]]] = {}
        self._ahead_bytes = min(_AHEAD_BYTES, settings.cache_limit_bytes // 4) if settings.cache_dir else _AHEAD_BYTES
        self._largest_bytes = 0  # of the shards so far: about what one of unknown length takes
        self._remote = RemoteShards(settings)

    def get(self, url: str, wanted_kind: str | None) -> Shard:
        """The open shard; DataError or StorageError where it cannot be read or is not what its manifest says."""
        key = (url, wanted_kind)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        begun = self._ahead.pop(url, None)
        with self._file(url) if begun is None else begun.result() as file:
            shard = Shard(url, file, wanted_kind)
        self._open[key] = shard
        self._largest_bytes = max(self._largest_bytes, len(shard.data))
        if len(self._open) > self._capacity:
            self._open.popitem(last=False)
            self._remote.trim()
        return shard

    def prefetch(self, urls: Sequence[str]) -> None:
        """Begin to fetch remote shards and to verify local ones; what goes wrong is raised when the shard is asked for.

        `urls` come in the order in which they are needed. As many are begun as may be on their way at a time, and as
        lie within some bytes, but at least one of each source; what is left the caller asks for again. What was begun
        before and is not among them is let go: other workers read it.
        """
        for url in self._ahead.keys() - set(urls):
            if self._ahead[url].done():
                with contextlib.suppress(UserError), self._ahead.pop(url).result():
                    pass
        running = sum(not future.done() for future in self._ahead.values())
        ahead_bytes = 0
        for number, url in enumerate(url for url in dict.fromkeys(urls) if not self._is_open(url)):
            expected = self._expected.get(url, _NOTHING)
            ahead_bytes += expected.num_bytes or self._largest_bytes or self._ahead_bytes
            if running >= _AT_ONCE or (ahead_bytes > self._ahead_bytes and number >= self._capacity // 2):
                return
            if url not in self._ahead and (needs_fetch(url) or expected.sha256):
                self._ahead[url] = storage.in_background(partial(self._file, url))
                running += 1

    def _is_open(self, url: str) -> bool:
        return any(name == url for name, _ in self._open)

    def _file(self, url: str) -> IO[bytes]:
        """The open, verified file of a shard."""
        expected = self._expected.get(url, _NOTHING)
        if needs_fetch(url):
            return self._remote.open(url, expected)
        try:
            file = open(storage.local_path(url), "rb")  # noqa: SIM115  (handed out)
            problem = verify(file, expected, self._settings.folder)
        except OSError as error:
            told = f"{url}: cannot be read ({error.strerror or error}); copy the shard there again"
            raise DataError(told) from error
        if problem:
            file.close()
            raise DataError(f"{url}: {problem} by its manifest; copy the shard again, or make the manifest anew")
        return file


class RemoteShards:
    """Remote shards as open local files: from --cache-dir where it has them or has room, else from the run's folder."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        patience_s = 10 * settings.read_timeout_s + 60  # longer than any fetching goes on without a byte
        self._kept = Cache(settings.cache_dir, settings.cache_limit_bytes, patience_s) if settings.cache_dir else None
        self._passing = Cache(settings.folder, None, patience_s) if settings.folder else None
        self._has_warned = self._has_passing = False

    def open(self, url: str, expected: Expected) -> IO[bytes]:
        """The whole, verified file, which stays where it is while it is open or mapped."""
        if self._passing is None:
            raise ValueError("remote shards need a folder to be fetched into")
        origin = look_up(url, expected, self._settings.read_timeout_s)
        fill = partial(fetch, origin, expected, self._settings.read_timeout_s)
        places = [(self._passing, origin.identity), (self._passing, f"{origin.identity}\n{os.getpid()}")]
        if self._kept is not None:
            places.insert(0, (self._kept, origin.identity))
        for cache, identity in places:
            file = self._from(cache, identity, origin.num_bytes, fill, url)
            if file is not None:
                return file
            if cache is self._kept:
                self._warn(url)
        raise StorageError(f"{url}: another process fetches it and does not get on; look for one that was stopped")

    def trim(self) -> None:
        """Remove what is not read any more and is not to be kept."""
        if self._passing and self._has_passing:
            self._passing.trim()

    def _from(self, cache: Cache, identity: str, num_bytes: int, fill: Fill, url: str) -> IO[bytes] | None:
        """The file from a cache; a copy that was damaged there is fetched again. None where the cache has no room."""
        self._has_passing |= cache is self._passing
        for _ in range(_MOST_BROKEN_COPIES):
            try:
                held = cache.hold(identity, num_bytes, fill)
                if held is None:
                    return None
                if held.is_new:
                    note_verified(held.file, held.sha256, self._settings.folder)
                    return held.file
                problem = verify(held.file, Expected(None, held.sha256), self._settings.folder)
                if not problem:
                    return held.file
                logger.warning(f"{url}: its copy in {cache.folder} {problem}; it is fetched anew")
                cache.discard(held)
            except StorageError:
                raise
            except OSError as error:
                told = f"{cache.folder}: shards cannot be kept there ({error.strerror or error}); choose another folder"
                raise StorageError(f"{told} (--cache-dir, or TMPDIR)") from error
        raise StorageError(
            f"{url}: each of {_MOST_BROKEN_COPIES} copies in {cache.folder} was damaged; check that disk"
        )

    def _warn(self, url: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{url}: --cache-dir {self._settings.cache_dir} has no room for it beside what is in use, within "
                f"--cache-limit {self._settings.cache_limit_bytes} bytes: such shards are kept in a temporary folder "
                "while they are read, and fetched again the next time"
            )
