"""Stored distributions of a teacher next to the shards that they belong to (--distill-cache).

A cache is a folder with `teacher.json`, the settings, and one file for each shard, `{stem}.safetensors`. Any library
for safetensors reads these files: a header in JSON, then the arrays. n sequences of T tokens with E stored ids:

    counts     (n,T) uint8 or uint16    stored ids of each token
    starts     (n+1,) int64             first stored id of each sequence
    ids        (E,) uint16 or uint32    token ids
    weights    (E,)                     method sample: how often the id was drawn, uint8 or uint16; method top-k: its
                                        probability, float32
    entropies  (n,T) float32            of the teacher's complete distributions
    data       (n,) uint64              hashes of the sequences' token ids
    records    (n,) uint64              hashes of what is stored for each sequence

Position t of a sequence has the distribution of token t + 1. A reader compares both hashes for every sequence, so that
no distribution is ever used for other tokens than its own. Files appear completely or not at all.
Legend: B sequences of a batch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch

from open_lm import storage
from open_lm.data.block_shards import allow_open_files
from open_lm.data.manifest import join_limited, shard_stem
from open_lm.data.order import Samples, Source
from open_lm.errors import ConfigError, DataError
from open_lm.kernels.sparse_targets import SparseTargets

SETTINGS_FILE, SUFFIX, FORMAT = "teacher.json", ".safetensors", 1
METHODS = ("sample", "top-k")
_DTYPES = {np.dtype(kind): name for kind, name in (("u1", "U8"), ("u2", "U16"), ("u4", "U32"), ("u8", "U64"))}
_DTYPES |= {np.dtype("i8"): "I64", np.dtype("f4"): "F32"}
_ALIGNMENT = 8
_MIN_OPEN_FILES = 64
_RECREATE = "remove the file and repeat open_lm.finetune.cache_teacher"


@dataclass(frozen=True)
class CacheSettings:
    """What the distributions of a cache depend on.

    Attributes:
        teacher: hash of the teacher's weights and architecture.
        method: an entry of METHODS.
        count: draws of each token, or stored ids of method top-k.
        temperature: by which the teacher's logits are divided.
        seed: of the draws; 0 for top-k.
        num_ids: number of ids that the distributions cover.
        seq_len: tokens T of a sequence.
        end_of_text_id: the id that ends a document, if the teacher's attention stays within documents.
        precision: of the teacher's weights and computation.
    """

    teacher: str
    method: str
    count: int
    temperature: float
    seed: int
    num_ids: int
    seq_len: int
    end_of_text_id: int | None
    precision: str

    @cached_property
    def digest(self) -> str:
        """A hash of the settings, which is in every file of the cache."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def differences(self, other: CacheSettings) -> list[str]:
        """Describe the settings that differ from those of `other`."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return [f"{name} is {own!r}, not {theirs!r}" for name, own, theirs in pairs if own != theirs]


def write_settings(folder: str, settings: CacheSettings, notes: Mapping[str, Any]) -> None:
    """Write teacher.json with further `notes` for people."""
    content = {"format": FORMAT, "settings": asdict(settings), **notes}
    storage.write_text(storage.join(folder, SETTINGS_FILE), json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_settings(folder: str) -> CacheSettings | None:
    """Return the settings of a cache; None if the folder has none. DataError for a damaged or unknown file."""
    url = storage.join(folder, SETTINGS_FILE)
    if storage.info(url) is None:
        return None
    try:
        content = json.loads(storage.read_text(url))
        if content["format"] != FORMAT:
            raise DataError(f"{url}: has format {content['format']}, expected {FORMAT}; create the cache again")
        return CacheSettings(**content["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{url}: not the settings of a cache of a teacher ({error}); create the cache again") from error


def file_path(folder: str, shard: str) -> str:
    """Return the path of a shard's file, for the address of the shard."""
    return storage.join(folder, shard_stem(shard) + SUFFIX)


# --- files -----------------------------------------------------------------------------------------------------------
def sequence_hashes(ids: np.ndarray) -> np.ndarray:
    """Return hashes of sequences of ids (n, T + 1) as a reader returns them: uint64 (n,)."""
    return np.array([_hash(row) for row in ids.astype(np.int64)], np.uint64)


def _hash(*arrays: np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return int.from_bytes(digest.digest(), "little")


def write_shard(folder: str, shard: str, arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> int:
    """Write the file of a shard atomically, with hashes of the sequences' records; return its size in bytes.

    `arrays` are those of the module's table but `records`; `notes` go to the header.
    """
    starts = arrays["starts"].tolist()
    records = [
        _hash(arrays["counts"][n], *(arrays[name][first:end] for name in ("ids", "weights")), arrays["entropies"][n])
        for n, (first, end) in enumerate(itertools.pairwise(starts))
    ]
    arrays = {**arrays, "records": np.array(records, np.uint64)}
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    offset = 0
    for name in sorted(arrays, key=lambda name: -arrays[name].itemsize):  # so that every array is aligned
        end = offset + arrays[name].nbytes
        header[name] = {
            "dtype": _DTYPES[arrays[name].dtype],
            "shape": arrays[name].shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, allow_nan=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with storage.atomic_write(file_path(folder, shard)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            if name in arrays:
                file.write(np.ascontiguousarray(arrays[name]).data)
    return 8 + len(text) + offset


class CachedShard:
    """The open file of a shard: its arrays, without copying them, and the notes of its header."""

    def __init__(self, folder: str, shard: str) -> None:
        """Map the file; DataError if there is none or it is damaged."""
        self.path = file_path(folder, shard)
        try:
            with open(storage.local_path(self.path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            self.notes: dict[str, str] = header.pop("__metadata__")
            dtypes = {name: dtype for dtype, name in _DTYPES.items()}
            self.arrays = {}
            for name, info in header.items():
                start, end = info["data_offsets"]
                array = np.frombuffer(data, dtypes[info["dtype"]], (end - start) // dtypes[info["dtype"]].itemsize,
                                      8 + length + start)  # fmt: skip
                self.arrays[name] = array.reshape(info["shape"])
        except FileNotFoundError as error:
            raise DataError(
                f"{self.path}: no such file; complete the cache with open_lm.finetune.cache_teacher"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: damaged ({error}); {_RECREATE}") from error

    def __len__(self) -> int:
        return len(self.arrays["data"])

    def read(self, member: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return counts (T,), ids (e,), weights (e,) and entropies (T,) of a sequence with token ids (T + 1,).

        DataError if it has other token ids, or if what is stored has changed.
        """
        arrays = self.arrays
        if member >= len(self) or _hash(ids.astype(np.int64)) != arrays["data"][member]:
            raise DataError(
                f"{self.path}: sequence {member} was made for other token ids; use the cache of this data, or "
                "create it again"
            )
        stored = slice(*arrays["starts"][member : member + 2].tolist())
        found = arrays["counts"][member], arrays["ids"][stored], arrays["weights"][stored], arrays["entropies"][member]
        if _hash(*found) != arrays["records"][member]:
            raise DataError(f"{self.path}: sequence {member} has changed since it was written; {_RECREATE}")
        return found


def shard_problem(folder: str, shard: str, settings: CacheSettings, size: int | None, sha256: str) -> str:
    """Describe why the file of a shard cannot be used; "" if it can. size, sha256: of the shard, if known."""
    try:
        cached = CachedShard(folder, shard)
    except DataError as error:
        return str(error)
    notes = cached.notes
    if notes.get("settings") != settings.digest:
        return f"{cached.path}: belongs to another cache (hash {notes.get('settings')}, not {settings.digest})"
    if size is not None and len(cached) != size:
        return f"{cached.path}: has {len(cached)} sequences, but the shard has {size}"
    if sha256 and notes.get("shard_sha256") not in ("", sha256):
        return f"{cached.path}: was made for a shard with sha256 {notes['shard_sha256'][:12]}…, not {sha256[:12]}…"
    return ""


# --- reading ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StoredTargets:
    """The distributions of a batch: counts (B,T), ids (E,), weights (E,), whose sums are 1 for each token, entropies
    (B,T), and the number of ids that the distributions cover."""

    counts: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    entropies: np.ndarray
    num_ids: int

    def on_device(self, device: torch.device) -> SparseTargets:
        """Return the distributions with padding: ids and weights (B,T,M)."""
        counts, ids, weights, entropies = (
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (self.counts.astype(np.int64), self.ids, self.weights, self.entropies)
        )
        width, flat = max(int(self.counts.max(initial=0)), 1), counts.flatten()
        rows = torch.repeat_interleave(torch.arange(len(flat), device=device), flat, output_size=len(self.ids))
        columns = torch.arange(len(self.ids), device=device) - (flat.cumsum(0) - flat)[rows]
        padded_ids = torch.zeros(len(flat), width, dtype=torch.int64, device=device)
        padded_weights = torch.zeros(len(flat), width, device=device)
        padded_ids[rows, columns] = ids.to(torch.int64)
        padded_weights[rows, columns] = weights
        shape = (*counts.shape, width)
        return SparseTargets(padded_ids.view(shape), padded_weights.view(shape), entropies, self.num_ids)


@dataclass(frozen=True)
class CacheSpec:
    """The caches of a run's sources, one folder for each, as plain values that can be sent to a worker."""

    folders: tuple[str, ...]
    settings: CacheSettings


class TargetReader:
    """A reader of the distributions for the samples of a batch."""

    def __init__(self, spec: CacheSpec, sources: Sequence[Source]) -> None:
        self._spec, self._sources = spec, sources
        self._open: OrderedDict[tuple[int, int], CachedShard] = OrderedDict()
        self._capacity = _MIN_OPEN_FILES

    def read(self, samples: Samples, ids: np.ndarray, filled: np.ndarray) -> StoredTargets:
        """Return the distributions of samples with token ids (B, T + 1); those that are not `filled` have none."""
        shards = set(zip(samples.source.tolist(), samples.shard.tolist(), strict=True))
        if 2 * len(shards) > self._capacity:
            self._capacity = 2 * len(shards)
            allow_open_files(self._capacity)
        length, settings = ids.shape[1] - 1, self._spec.settings
        counts, entropies = np.zeros((len(ids), length), np.uint16), np.zeros((len(ids), length), np.float32)
        all_ids, all_weights = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        for row in np.flatnonzero(filled).tolist():
            cached = self._shard(int(samples.source[row]), int(samples.shard[row]))
            counts[row], found, weights, entropies[row] = cached.read(int(samples.member[row]), ids[row])
            all_ids.append(found.astype(np.int32))
            all_weights.append(_normalized(counts[row], weights, settings))
        return StoredTargets(counts, np.concatenate(all_ids), np.concatenate(all_weights), entropies, settings.num_ids)

    def _shard(self, source: int, shard: int) -> CachedShard:
        key = (source, shard)
        if key not in self._open:
            self._open[key] = CachedShard(self._spec.folders[source], self._sources[source].shards[shard])
        self._open.move_to_end(key)
        while len(self._open) > self._capacity:
            self._open.popitem(last=False)
        return self._open[key]


def _normalized(counts: np.ndarray, weights: np.ndarray, settings: CacheSettings) -> np.ndarray:
    """Return weights (e,) float32 that add up to 1 for each token; counts (T,) are the stored ids of each."""
    if settings.method == "sample":
        return weights.astype(np.float32) / np.float32(settings.count)
    present = np.flatnonzero(counts)
    sums = np.add.reduceat(weights.astype(np.float64), np.cumsum(counts, dtype=np.int64)[present] - counts[present])
    return (weights / np.repeat(sums, counts[present])).astype(np.float32)


def open_caches(folders: Sequence[str], sources: Sequence[Source]) -> CacheSpec:
    """Check the caches of --distill-cache against the sources: one folder for each source, with a file for each shard.

    Raises:
        ConfigError: a folder that is no cache, another number of folders, or caches with different settings.
        DataError: files that are missing, damaged or of other shards or caches, all at once.
    """
    flag = "--distill-cache"
    if len(folders) != len(sources):
        raise ConfigError(f"{flag}: found {len(folders)} folders for {len(sources)} sources of data; set one for each")
    found: list[CacheSettings] = []
    for folder in folders:
        if storage.is_remote(folder):
            raise ConfigError(f"{flag} {folder}: expected a local folder; copy the cache to this machine first")
        settings = read_settings(folder)
        if settings is None:
            raise ConfigError(
                f"{flag} {folder}: no {SETTINGS_FILE}; expected a folder of open_lm.finetune.cache_teacher"
            )
        found.append(settings)
        if differences := settings.differences(found[0]):
            raise ConfigError(f"{flag}: the caches differ: in {folder}, {'; '.join(differences)} as in {folders[0]}")
    problems = []
    for folder, source in zip(folders, sources, strict=True):
        for shard, size, sha256 in zip(source.shards, source.sizes, source.sha256, strict=True):
            if problem := shard_problem(folder, shard, found[0], size, sha256):
                problems.append(problem)
    if problems:
        raise DataError(join_limited(problems, f"{flag} does not have the distributions of the training data"))
    return CacheSpec(tuple(folders), found[0])
