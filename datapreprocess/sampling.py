"""Assign input files to sources, and sample the documents of each source by a factor."""

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
UNKNOWN = "UNKNOWN"  # source of files that match none of the defined sources
ALL_FILES = "all"  # source of every file if no sources are defined
_MAX_LISTED = 5
_STREAM = 1 << 48  # makes these random numbers independent of the shuffle keys


@dataclass(frozen=True)
class Sampling:
    """Rules that assign files to sources and sample their documents.

    Attributes:
        markers: source -> substrings of file paths.
        factors: source -> copies of each document; 1 for other sources.
        files: file -> source, as assigned by patterns (see `from_listing`); takes precedence over markers.
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
        """Assign the listed files to their sources; ConfigError if a file is listed for two sources."""
        files: dict[str, str] = {}
        conflicts: list[str] = []
        for source, urls in listing.items():
            for url in urls:
                other = files.setdefault(_absolute(url), source)
                if other != source:
                    conflicts.append(f"{url} belongs to {other} and to {source}")
        if conflicts:
            num_unlisted = len(conflicts) - _MAX_LISTED
            unlisted = [f"and {num_unlisted} more"] if num_unlisted > 0 else []
            heading = "A file can belong to only one source; make the patterns of the sources more specific"
            raise ConfigError(join_problems([*conflicts[:_MAX_LISTED], *unlisted], heading))
        return Sampling(markers or {}, factors or {}, files)

    def source_of(self, url: str) -> str:
        """Return the source that the file is assigned to, else the first with a marker in its path, else UNKNOWN."""
        if not self.markers and not self.files:
            return ALL_FILES
        assigned = self.files.get(_absolute(url)) if self.files else None
        matches = (name for name, markers in self.markers.items() if any(marker in url for marker in markers))
        return assigned or next(matches, UNKNOWN)

    def factor(self, source: str) -> float:
        return float(self.factors.get(source, 1.0))

    def passes(self, source: str) -> int:
        """Return how often the files of a source are read; each pass uses every document at most once."""
        return math.ceil(self.factor(source))

    def record(self) -> dict[str, Any]:
        """Return a JSON-serializable record that is equal for equal sampling; lists of files are stored as digests."""
        listing: dict[str, list[str]] = {}
        for url, source in sorted(self.files.items()):
            listing.setdefault(source, []).append(url)
        return {
            "markers": {name: list(markers) for name, markers in self.markers.items()},
            "factors": dict(self.factors),
            "files": {
                name: {"count": len(urls), "sha256": hashlib.sha256(os.fsencode("\n".join(urls))).hexdigest()}
                for name, urls in listing.items()
            },
        }


def _absolute(url: str) -> str:
    """Return the url, or the absolute path of a local file, so that all spellings of a path are equal."""
    return url if storage.is_remote(url) else os.path.abspath(storage.local_path(url))


def log_sampling(sampling: Sampling, urls: Sequence[str]) -> None:
    """Log the number of files of each source, and its factor if any is sampled; warn about files without a source."""
    files: dict[str, list[str]] = {}
    for url in urls:
        files.setdefault(sampling.source_of(url), []).append(url)
    for source, source_files in sorted(files.items()):
        if sampling.factors:
            logger.info("sampling: %d files of %s, factor %g", len(source_files), source, sampling.factor(source))
        else:
            logger.info("source %s: %d files", source, len(source_files))
    if UNKNOWN in files:
        first_files = ", ".join(files[UNKNOWN][:_MAX_LISTED])
        logger.warning("%d files match no source, for example %s", len(files[UNKNOWN]), first_files)


def selection_mask(  # noqa: PLR0917 - the argument order is part of the interface
    seed: int, group: int, first: int, count: int, factor: float, copy: int
) -> np.ndarray:
    """Return which of the documents [first, first + count) of a group are used in pass number `copy`: bool (count,).

    The first floor(factor) passes use every document. The next pass uses each document with the probability of the
    fractional part. The choice depends only on the seed, the group and the number of the document.
    """
    num_full_passes = math.floor(factor)
    if copy < num_full_passes:
        return np.ones(count, bool)
    draws = (random_keys(seed, _STREAM + group, first, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws < factor - num_full_passes
