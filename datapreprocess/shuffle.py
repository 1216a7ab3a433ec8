"""A global shuffle of sequences in bounded memory: an external sort by pseudo-random keys.

Every sequence gets a 64-bit key that depends on the seed and on where the sequence comes from (unit of work, number in
it), on nothing else. The output order is the order of the keys, so that it is the same for any number of workers, any
memory and any interruption. Units spill sorted runs of bounded size; later each writer reads, from every run, the one
stretch whose keys fall into its part of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from open_lm import storage

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
KEY_BYTES = 8


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 (n,) that scatters its values evenly (SplitMix64; Steele, Lea and Flood 2014)."""
    values = values.astype(np.uint64, copy=True)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def random_keys(seed: int, stream: int, start: int, count: int) -> np.ndarray:
    """The keys number start … start + count - 1 of a stream, uint64 (count,): uniform, the same on every machine."""
    base = mix(np.array([(seed + 1) * int(_GOLDEN) & _MASK], np.uint64))
    base = mix(base + np.array([(stream + 1) * int(_GOLDEN) & _MASK], np.uint64))
    return mix(base + np.arange(start + 1, start + count + 1, dtype=np.uint64) * _GOLDEN)


def ordered_keys(stream: int, start: int, count: int) -> np.ndarray:
    """Keys that keep the order of the input instead: by stream, then by number, uint64 (count,)."""
    return np.arange(start, start + count, dtype=np.uint64) + np.uint64(stream << 40)


@dataclass(frozen=True)
class Run:
    """A spilled file: `count` keys in rising order (uint64), then their sequences (count, length) of `dtype`."""

    url: str
    count: int


class RunWriter:
    """Collects the sequences of one unit of work and spills them as sorted runs of at most `run_bytes`.

    `name` is a template with one field for the run's number. Runs appear whole, each in a file of its own.
    """

    def __init__(self, name: str, stream: int, seed: int | None, run_bytes: int) -> None:
        self._name, self._stream, self._seed, self._run_bytes = name, stream, seed, run_bytes
        self._blocks: list[np.ndarray] = []
        self._bytes = 0
        self.count = 0
        self.runs: list[Run] = []

    def add(self, sequences: np.ndarray) -> None:
        """Take sequences (n, length); a seed of None keeps their order."""
        if len(sequences):
            self._blocks.append(sequences)
            self._bytes += sequences.nbytes
            if self._bytes >= self._run_bytes:
                self.flush()

    def flush(self) -> None:
        """Spill what is held."""
        if not self._blocks:
            return
        sequences = np.concatenate(self._blocks)
        self._blocks, self._bytes = [], 0
        if self._seed is None:
            keys = ordered_keys(self._stream, self.count, len(sequences))
        else:
            keys = random_keys(self._seed, self._stream, self.count, len(sequences))
        order = np.argsort(keys, kind="stable")
        run = Run(self._name.format(len(self.runs)), len(sequences))
        with storage.atomic_write(run.url, "wb") as file:
            file.write(keys[order].tobytes())
            file.write(sequences[order].data)
        self.count += len(sequences)
        self.runs.append(run)


def read_keys(runs: Sequence[Run]) -> list[np.ndarray]:
    """The keys of each run, uint64 (count,) in rising order."""
    keys = []
    for run in runs:
        with storage.open_file(run.url) as file:
            keys.append(np.frombuffer(_read_exactly(file, run.count * KEY_BYTES, run.url), np.uint64))
    return keys


def slices(keys: Sequence[np.ndarray], cuts: Sequence[int]) -> list[np.ndarray]:
    """For each part of the output, where it lies in each run: int64 (runs, 2), first and last + 1.

    `cuts` are the output positions where parts begin, from 0 up, without the end. Equal keys never part ways.
    """
    everything = np.sort(np.concatenate([np.zeros(0, np.uint64), *keys]))
    edges = np.zeros((len(keys), len(cuts) + 1), np.int64)
    for row, run_keys in zip(edges, keys, strict=True):
        for part, cut in enumerate(cuts[1:], start=1):
            beyond = cut >= len(everything)
            row[part] = len(run_keys) if beyond else np.searchsorted(run_keys, everything[cut], side="left")
        row[-1] = len(run_keys)
    return [np.stack([edges[:, part], edges[:, part + 1]], axis=1) for part in range(len(cuts))]


def gather(runs: Sequence[Run], bounds: np.ndarray, length: int, dtype: np.dtype[Any]) -> np.ndarray:
    """The sequences of one part of the output in its order, (n, length) of `dtype`.

    Args:
        bounds: int64 (runs, 2), the stretch of each run that belongs to the part, from `slices`.
    """
    counts = bounds[:, 1] - bounds[:, 0]
    sequences = np.empty((int(counts.sum()), length), dtype)
    keys = np.empty(len(sequences), np.uint64)
    row_bytes = length * dtype.itemsize
    filled = 0
    for run, (first, _), count in zip(runs, bounds.tolist(), counts.tolist(), strict=True):
        if not count:
            continue
        with storage.open_file(run.url) as file:
            file.seek(first * KEY_BYTES)
            keys[filled : filled + count] = np.frombuffer(_read_exactly(file, count * KEY_BYTES, run.url), np.uint64)
            file.seek(run.count * KEY_BYTES + first * row_bytes)
            data = _read_exactly(file, count * row_bytes, run.url)
        sequences[filled : filled + count] = np.frombuffer(data, dtype).reshape(count, length)
        filled += count
    return sequences[np.argsort(keys, kind="stable")]


def _read_exactly(file: IO[bytes], count: int, url: str) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise storage.StorageError(f"{url}: cut short: {count} bytes expected, {len(data)} found; remove it and retry")
    return data
