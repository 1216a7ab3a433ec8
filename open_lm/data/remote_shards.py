"""Open shards as local files after downloading them or making them from raw text.

The files are in --cache-dir if it has space, else in the run's temporary folder.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import IO

from open_lm.data.cache import Cache, CacheFullError, Fill, StalledDownloadError
from open_lm.data.fetch import FetchSettings, fetch, look_up
from open_lm.data.manifest import TEXT_PREFIX
from open_lm.data.verify import Expected, record_verified, verify
from open_lm.errors import StorageError

_MAX_DAMAGED_COPIES = 3
logger = logging.getLogger(__name__)


class RemoteShards:
    """A downloader of remote shards and of the output of commands, which opens them in a cache."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        stall_s = 10 * settings.read_timeout_s + 60  # longer than any download runs without receiving a byte
        self._cache = self._text_cache = None
        if settings.cache_dir:
            self._cache = Cache(settings.cache_dir, settings.cache_limit_bytes, stall_s)
            self._text_cache = Cache(settings.cache_dir, settings.cache_limit_bytes, stall_s, evicts="newest")
        self._temporary = Cache(settings.folder, None, stall_s) if settings.folder else None
        self._has_warned = self._has_temporary = False

    def open(self, url: str, expected: Expected) -> IO[bytes]:
        """Return the complete, verified file, which is not removed while it is open or mapped."""
        if self._temporary is None:
            raise ValueError("remote shards need a folder to be downloaded to")
        identity, num_bytes, fill = self._source(url, expected)
        # The last place is private to this process, in case another one hangs while it downloads the shard.
        places = [(self._temporary, identity), (self._temporary, f"{identity}\n{os.getpid()}")]
        kept = self._text_cache if url.startswith(TEXT_PREFIX) else self._cache
        if kept is not None:
            places.insert(0, (kept, identity))
        for cache, identity in places:
            try:
                return self._open_in(cache, identity, num_bytes, fill, url, expected)
            except CacheFullError:
                self._warn_cache_full(url)
            except StalledDownloadError as error:
                logger.warning(
                    f"{url}: another process downloads it to {cache.folder} but {error}; look for a stopped process. "
                    "This process downloads the shard separately"
                )
        raise StorageError(f"{url}: other processes download it but make no progress; look for stopped processes")

    def _source(self, url: str, expected: Expected) -> tuple[str, int, Fill]:
        """Return the identity and the size of a shard in a cache, and the function that downloads or makes it."""
        if url.startswith(TEXT_PREFIX):
            from open_lm.data.text_folder import unit_of  # here, because it loads the readers and the tokenizer

            folder, unit = unit_of(url)
            size = -1 if expected.num_bytes is None else expected.num_bytes
            return unit.identity, size, partial(folder.write_unit, unit, expected)
        origin = look_up(url, expected, self._settings.read_timeout_s)
        return origin.identity, origin.num_bytes, partial(fetch, origin, expected, self._settings.read_timeout_s)

    def trim(self) -> None:
        """Remove temporary files that are no longer read."""
        if self._temporary and self._has_temporary:
            self._temporary.trim()

    def _open_in(  # noqa: PLR0917 - the first four are those of `Cache.get`
        self, cache: Cache, identity: str, num_bytes: int, fill: Fill, url: str, expected: Expected
    ) -> IO[bytes]:
        """Open the file in a cache, and download it again if the copy is damaged or not the expected one.

        The identity of a unit of text contains no checksum, so its copy may be from another version of the tokenizer's
        library.
        """
        self._has_temporary |= cache is self._temporary
        for _ in range(_MAX_DAMAGED_COPIES):
            try:
                entry = cache.get(identity, num_bytes, fill)
                if entry.is_new:
                    record_verified(entry.file, entry.sha256, self._settings.folder)
                    return entry.file
                problem = expected.problem(os.fstat(entry.file.fileno()).st_size, entry.sha256)
                problem = problem or verify(entry.file, Expected(None, entry.sha256), self._settings.folder)
                if not problem:
                    return entry.file
                logger.warning(f"{url}: its copy in {cache.folder} {problem}; downloading it again")
                cache.discard(entry)
            except StorageError:
                raise
            except OSError as error:
                message = f"{cache.folder}: cannot store shards there ({error.strerror or error})"
                raise StorageError(f"{message}; choose another folder (--cache-dir, or TMPDIR)") from error
        raise StorageError(
            f"{url}: {_MAX_DAMAGED_COPIES} copies in {cache.folder} in a row were damaged; check that disk"
        )

    def _warn_cache_full(self, url: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{url}: --cache-dir {self._settings.cache_dir} has no space for it: the shards in use fill "
                f"--cache-limit {self._settings.cache_limit_bytes} bytes. Such shards are stored in a temporary folder "
                "while they are read, and downloaded (or made from their text) again the next time"
            )
