"""Which source a file belongs to, and how often each of its documents is taken."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.datapreprocess.shuffle import random_keys
from open_lm.errors import ConfigError, join_problems

logger = logging.getLogger(__name__)
UNKNOWN = "UNKNOWN"  # the source of a file that belongs to none, where sources are named
ALL_FILES = "all"  # the source of every file where none is named
_MAX_SHOWN = 5
_STREAM = 1 << 48  # keeps these draws apart from the keys of the shuffle


@dataclass(frozen=True)
class Sampling:
    """What decides about a file and its documents; plain data.

    markers: source -> substrings of paths; factors: source -> copies of each document (1 where not named);
    files: file -> source, for what patterns assign, which counts before any marker (`from_listing` makes it).
    """

    markers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def from_listing(
        listing: Mapping[str, Sequence[str]],
        markers: Mapping[str, Sequence[str]] | None = None,
        factors: Mapping[str, float] | None = None,
    ) -> Sampling:
        """Assign the files that each source's patterns were found to stand for; one of two sources is a ConfigError."""
        files: dict[str, str] = {}
        claimed_twice: list[str] = []
        for source, urls in listing.items():
            for url in urls:
                other = files.setdefault(_place(url), source)
                if other != source:
                    claimed_twice.append(f"{url} belongs to {other} and to {source}")
        if claimed_twice:
            hidden = len(claimed_twice) - _MAX_SHOWN
            more = [f"and {hidden} more"] if hidden > 0 else []
            heading = "A file can belong to one source only; make the patterns of the sources narrower"
            raise ConfigError(join_problems([*claimed_twice[:_MAX_SHOWN], *more], heading))
        return Sampling(markers or {}, factors or {}, files)

    def source_of(self, url: str) -> str:
        """The source that the file is assigned to, else the first with a marker in the path, else UNKNOWN."""
        if not self.markers and not self.files:
            return ALL_FILES
        found = self.files.get(_place(url)) if self.files else None
        marked = (name for name, marks in self.markers.items() if any(mark in url for mark in marks))
        return found or next(marked, UNKNOWN)

    def factor(self, source: str) -> float:
        return float(self.factors.get(source, 1.0))

    def passes(self, source: str) -> int:
        """How many times the files of a source are read, each time taking every document at most once."""
        return math.ceil(self.factor(source))

    def record(self) -> dict[str, Any]:
        """What must be equal for two runs to sample alike, JSON-able; long lists of files as their digests."""
        listing: dict[str, list[str]] = {}
        for url, source in sorted(self.files.items()):
            listing.setdefault(source, []).append(url)
        return {
            "markers": {name: list(marks) for name, marks in self.markers.items()},
            "factors": dict(self.factors),
            "files": {
                name: {"count": len(urls), "sha256": hashlib.sha256("\n".join(urls).encode()).hexdigest()}
                for name, urls in listing.items()
            },
        }


def _place(url: str) -> str:
    """The same for all spellings of a file: a relative local path is made absolute."""
    return url if storage.is_remote(url) else os.path.abspath(storage.local_path(url))


def log_sampling(sampling: Sampling, urls: Sequence[str]) -> None:
    """Log how often the documents of each source's files are taken, and which files belong to no source."""
    files: dict[str, list[str]] = {}
    for url in urls:
        files.setdefault(sampling.source_of(url), []).append(url)
    for source, found in sorted(files.items()):
        logger.info("sampling: %d files of %s, factor %g", len(found), source, sampling.factor(source))
    if UNKNOWN in files:
        shown = ", ".join(files[UNKNOWN][:_MAX_SHOWN])
        logger.warning("sampling: no pattern and no marker of any source fits %s", shown)


def selection_mask(  # noqa: PLR0917 - seed, place, share: an order that callers rely on
    seed: int, group: int, first: int, count: int, factor: float, copy: int
) -> np.ndarray:
    """Which of the documents number first … first + count - 1 of a group pass number `copy` takes: bool (count,).

    The first floor(factor) passes take every document, the one after them takes each with the chance that is left. A
    document's draw depends on the seed, the group and its number, on nothing else.
    """
    whole = math.floor(factor)
    if copy < whole:
        return np.ones(count, bool)
    draws = (random_keys(seed, _STREAM + group, first, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws < factor - whole
