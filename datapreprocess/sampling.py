"""Sources of documents and how often each of their documents is taken.

A YAML file tells which source a file belongs to and the source's factor:

    sources:
      - {source: WIKIPEDIA, markers: [wikipedia, wiki-]}     # substrings of the file's path; the first match counts
    sampling_frequencies:
      WIKIPEDIA: 2.5          # each document twice, and half of the documents a third time
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from open_lm import storage
from open_lm.datapreprocess.shuffle import random_keys
from open_lm.errors import ConfigError, join_problems

logger = logging.getLogger(__name__)
UNKNOWN = "UNKNOWN"
_STREAM = 1 << 48  # keeps these draws apart from the keys of the shuffle


@dataclass(frozen=True)
class Sampling:
    """markers: source -> substrings of paths; factors: source -> copies of each document (1 where not named)."""

    markers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)

    def source_of(self, url: str) -> str:
        """The first source with a marker in the path, else UNKNOWN."""
        return next((name for name, marks in self.markers.items() if any(mark in url for mark in marks)), UNKNOWN)

    def factor(self, source: str) -> float:
        return float(self.factors.get(source, 1.0))

    def passes(self, source: str) -> int:
        """How many times the files of a source are read, each time taking every document at most once."""
        return math.ceil(self.factor(source))


def tell_sampling(sampling: Sampling, urls: Sequence[str]) -> None:
    """Log how often the documents of each source's files are taken, and which files belong to no source."""
    files: dict[str, list[str]] = {}
    for url in urls:
        files.setdefault(sampling.source_of(url), []).append(url)
    for source, found in sorted(files.items()):
        logger.info("sampling: %d files of %s, factor %g", len(found), source, sampling.factor(source))
    if UNKNOWN in files:
        logger.warning("sampling: no marker of any source is in the path of %s", ", ".join(files[UNKNOWN][:5]))


def takes_mask(  # noqa: PLR0917 - seed, place, share: an order that callers rely on
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


def takes(seed: int, group: int, number: int, factor: float, copy: int) -> bool:
    """`takes_mask` of a single document."""
    return bool(takes_mask(seed, group, number, 1, factor, copy)[0])


def load_sampling(path: str) -> Sampling:
    """Read a sampling YAML; a ConfigError lists everything that is wrong with it."""
    import yaml

    try:
        content = yaml.safe_load(storage.read_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from error
    problems: list[str] = []
    sources = content.get("sources") if isinstance(content, dict) else None
    factors = content.get("sampling_frequencies") if isinstance(content, dict) else None
    markers: dict[str, list[str]] = {}
    if not isinstance(sources, list):
        problems.append(f'{path}: "sources" must be a list of {{source, markers}}')
    for entry in sources if isinstance(sources, list) else []:
        name = entry.get("source") if isinstance(entry, dict) else None
        marks = entry.get("markers") or [] if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(marks, list) or not all(isinstance(mark, str) for mark in marks):
            problems.append(f"{path}: expected {{source: NAME, markers: [text, …]}}, found {entry!r}")
        elif name in markers:
            problems.append(f"{path}: source {name} is there twice")
        else:
            markers[name] = marks
    if not isinstance(factors, dict):
        problems.append(f'{path}: "sampling_frequencies" must map sources to factors')
        factors = {}
    for name, factor in factors.items():
        if name not in markers and name != UNKNOWN:
            problems.append(f'{path}: sampling_frequencies names {name}, which is not among the "sources"')
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < 1000:
            problems.append(f"{path}: the factor of {name} must be a number from 0 up, found {factor!r}")
    if problems:
        raise ConfigError(join_problems(problems, "The sampling file cannot be used"))
    return Sampling(markers, factors)
