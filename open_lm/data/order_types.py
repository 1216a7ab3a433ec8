"""Types of the data order: the sources of a mixture, settings, and samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from open_lm.data.block_sums import BlockSums
from open_lm.data.hashing import hash_each, hash_key, hash_range, permutation
from open_lm.data.mixture import integer_weights
from open_lm.errors import DataError

SizeOf = Callable[[int, int], int]  # (source, shard) -> number of sequences


@dataclass(frozen=True)
class Source:
    """One data set of a mixture: its shards and its share of the samples.

    `sizes` are the numbers of sequences of the shards, None if unknown until the shard is read. `repeats` are the
    upsampling factors of the shards (relative chances when shards are drawn); empty means 1 for all. `num_bytes`,
    `sha256` (hex) and `block_sums` come from a manifest; None and "" without one. `data_key` is the requested member
    kind. `datasets` holds the dataset.json of each folder of shards (provenance.read_dataset).
    """

    name: str
    shards: tuple[str, ...]
    sizes: tuple[int | None, ...]
    weight: Fraction = Fraction(1)
    repeats: tuple[Fraction, ...] = ()
    num_bytes: tuple[int | None, ...] = ()
    sha256: tuple[str, ...] = ()
    data_key: str = ""
    datasets: tuple[dict[str, Any], ...] = ()
    block_sums: tuple[BlockSums | None, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_bytes", self.num_bytes or (None,) * len(self.shards))
        object.__setattr__(self, "sha256", self.sha256 or ("",) * len(self.shards))
        object.__setattr__(self, "block_sums", self.block_sums or (None,) * len(self.shards))

    @cached_property
    def has_sizes(self) -> bool:
        """Whether the sizes of all shards are known."""
        return None not in self.sizes

    @cached_property
    def num_sequences(self) -> int | None:
        """Sequences of the first pass, None if a size is not known."""
        return int(np.dot(np.array(self.sizes, np.int64), copies_in_pass(self, 0))) if self.has_sizes else None

    @cached_property
    def fingerprint(self) -> str:
        """Four hashes joined by ":" that identify the data, independent of its folder.

        They cover the shards' names, order and factors; their numbers of sequences; their sha256; their dataset.json.
        A hash is empty if nothing is known.
        """
        stems = "\n".join(url.rpartition("/")[2] for url in self.shards)
        repeats = ",".join(map(str, self.repeats)) if any(factor != 1 for factor in self.repeats) else ""
        sizes = ["" if size is None else str(size) for size in self.sizes]
        digests = [dataset["digest"] for dataset in self.datasets]
        known = [",".join(values) if any(values) else "" for values in (sizes, self.sha256, digests)]
        texts = [f"{stems}\n{repeats}", *known]
        return ":".join(text and hashlib.sha256(os.fsencode(text)).hexdigest()[:16] for text in texts)


def copies_in_pass(source: Source, pass_number: int) -> np.ndarray:
    """Return how often each shard is visited in a pass, int64 (shards,).

    The average over many passes is exactly the shard's factor. Shards with the same fractional factor get their extra
    visit in different passes; the shard's number decides in which ones.
    """
    copies = np.ones(len(source.shards), np.int64)
    numbers = {factor: number for number, factor in enumerate(dict.fromkeys(source.repeats))}
    factor_of_shard = np.array([numbers[factor] for factor in source.repeats])
    for factor, number in numbers.items():
        shards = np.flatnonzero(factor_of_shard == number)
        shifts = hash_each(len(copies))[shards] % np.uint64(factor.denominator)
        start = shifts.astype(object) + factor.numerator * pass_number  # Python integers, which do not overflow
        copies[shards] = (start + factor.numerator) // factor.denominator - start // factor.denominator
    return copies


def visits_of_pass(source: Source, seed: int, stream: int, pass_number: int, settings: OrderSettings) -> np.ndarray:
    """Return the shards that a pass visits, in order: int64 (visits,).

    With replacement, the visits are as many independent draws as there are shards.
    """
    if settings.resampled:
        chances = np.cumsum(integer_weights(source.repeats or [Fraction(1)] * len(source.shards)))
        draws = hash_range(hash_key(seed, stream, pass_number, -2), len(source.shards)) % np.uint64(chances[-1])
        return np.searchsorted(chances, draws.astype(np.int64), side="right")
    shards = np.repeat(np.arange(len(source.shards)), copies_in_pass(source, pass_number))
    if settings.shuffle_shards:
        shards = shards[permutation(hash_key(seed, stream, pass_number, -1), len(shards))]
    return shards


class Samples(NamedTuple):
    """Consecutive samples of the data order; all arrays (n,)."""

    source: np.ndarray  # int64: index of the source
    shard: np.ndarray  # int64: index of the shard in its source
    member: np.ndarray  # int64: index of the sequence in its shard, in file order
    key: np.ndarray  # uint64: key of the visit, for any random choice about the sample

    def slice(self, start: int, stop: int) -> Samples:
        return Samples(*(array[start:stop] for array in self))


@dataclass(frozen=True)
class OrderSettings:
    """Options of the order: with replacement or in passes, shuffled or as stored, and the maximum number of passes.

    `lanes` is the number of sequences of a round, each from another lane (see order.py).
    """

    resampled: bool = False
    shuffle_shards: bool = True
    shuffle_samples: bool = True
    max_passes: int | None = None
    lanes: int = 1


class Piece(NamedTuple):
    """Sequences of a shard that are read together: members `start` to `stop` in file order, all if `stop` is None."""

    source: int
    shard: int
    start: int = 0
    stop: int | None = None


def unknown_size(source: int, shard: int) -> int:
    """Raise DataError: the order needs a size that neither a manifest nor a reader provides."""
    raise DataError(f"the size of shard {shard} of source {source} is not known")
