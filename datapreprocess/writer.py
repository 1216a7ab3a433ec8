"""Sequences to shards, and what lies beside them: manifest.jsonl, dataset.json, rejects.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.shard_format import PAD_ID, ManifestEntry, ShardInfo, ShardWriter, write_manifest
from open_lm.datapreprocess.cluster import Shared
from open_lm.datapreprocess.job import Layout, shard_size
from open_lm.datapreprocess.shuffle import MIXED, Rows, Runs
from open_lm.errors import ConfigError

MANIFEST, DATASET, REJECTS = "manifest.jsonl", "dataset.json", "rejects.jsonl"


@dataclass(frozen=True)
class ShardPlan:
    """A shard of `count` sequences, the first of them number `first` of its output."""

    url: str
    folder: str
    first: int
    count: int


@dataclass(frozen=True)
class Tail:
    """The ids that fill no sequence at the end of an output, with the tokens of each source in them."""

    ids: np.ndarray
    shares: dict[int, int]


@dataclass(frozen=True)
class ShardTask:
    """Neighbouring shards for one worker. `padded` is the padded last sequence of all, int64 (length,), with its
    tokens by source, in the task that writes the last shard."""

    shards: tuple[ShardPlan, ...]
    runs: Shared[Runs]
    sources: tuple[str, ...]
    padded: Tail | None
    kind: str
    dtype: np.dtype[Any]
    work: str


@dataclass
class WrittenShard:
    """A finished shard, with the tokens of each source in it."""

    url: str
    info: ShardInfo
    sources: dict[str, int] = field(default_factory=dict)


def plan_shards(layout: Layout, folders: Sequence[str], num_sequences: int) -> list[ShardPlan]:
    """Shards of like size (the last of a folder may be smaller), folders of equal shares, in output order."""
    per_shard = shard_size(num_sequences, layout.shard_sequences)
    shards: list[ShardPlan] = []
    for number, folder in enumerate(folders):
        start, end = num_sequences * number // len(folders), num_sequences * (number + 1) // len(folders)
        for index, first in enumerate(range(start, end, per_shard)):
            shards.append(ShardPlan(layout.shard(folder, index), folder, first, min(per_shard, end - first)))
    return shards


def group_shards(shards: Sequence[ShardPlan], sequence_bytes: int, limit_bytes: int) -> list[list[ShardPlan]]:
    """Neighbouring shards together, as many as fit the limit, at least one."""
    groups: list[list[ShardPlan]] = []
    held = 0
    for shard in shards:
        size = shard.count * sequence_bytes
        if not groups or held + size > limit_bytes:
            groups.append([])
            held = 0
        groups[-1].append(shard)
        held += size
    return groups


def write_shards(task: ShardTask) -> list[WrittenShard]:
    """Write the shards of a task that are not there yet; the record of each is kept in the work folder."""
    records = [_load_record(task.work, shard) for shard in task.shards]
    missing = [number for number, record in enumerate(records) if record is None]
    if not missing:
        return [record for record in records if record]
    shards = task.shards[missing[0] : missing[-1] + 1]
    first, end = shards[0].first, shards[-1].first + shards[-1].count
    padded_here = task.padded is not None and shards[-1] is task.shards[-1]
    rows = _Cursor(task.runs.get().rows(first, end - first - padded_here))
    for number, shard in enumerate(shards, start=missing[0]):
        is_last = padded_here and shard is shards[-1]
        parts = rows.take(shard.count - is_last)
        if records[number] is None:
            records[number] = _write_shard(task, shard, parts, task.padded if is_last else None)
        else:
            for _ in parts:  # pass over what is there already
                pass
    return [record for record in records if record]


class _Cursor:
    """Rows in whichever portions they come, taken in the portions of shards."""

    def __init__(self, rows: Iterator[Rows]) -> None:
        self._rows, self._held = rows, Rows(np.zeros((0, 0)), np.zeros(0, np.uint16), {})

    def take(self, count: int) -> Iterator[Rows]:
        """The next `count` rows, which must be used up before any more are taken."""
        while count:
            if not len(self._held.ids):
                self._held = next(self._rows)
            part, self._held = self._held.split(count)
            count -= len(part.ids)
            yield part


def _write_shard(task: ShardTask, shard: ShardPlan, parts: Iterator[Rows], padded: Tail | None) -> WrittenShard:
    tokens = np.zeros(len(task.sources), np.int64)
    number = shard.first
    with ShardWriter(shard.url, task.kind, dtype=task.dtype) as writer:
        for rows in parts:
            _write_rows(writer, number, rows.ids, task.dtype)
            _count_tokens(rows, tokens)
            number += len(rows.ids)
        if padded is not None:
            writer.write_numbered(number, padded.ids[None])
            for source, count in padded.shares.items():
                tokens[source] += count
    sources = {name: count for name, count in zip(task.sources, tokens.tolist(), strict=True) if count}
    written = WrittenShard(shard.url, writer.info, sources)
    storage.write_bytes(_record_path(task.work, shard), orjson.dumps(asdict(written)))
    return written


def _write_rows(writer: ShardWriter, number: int, ids: np.ndarray, dtype: np.dtype[Any]) -> None:
    if ids.dtype.kind == "u":
        writer.write_numbered(number, ids)
        return
    padded = ids[:, -1] == PAD_ID  # pads stand at the end; rows without any are of the unsigned type
    edges = np.flatnonzero(np.diff(padded)) + 1
    for part, has_pads in zip(np.split(ids, edges), padded[np.append(0, edges)].tolist(), strict=True):
        writer.write_numbered(number, part if has_pads else part.astype(dtype))
        number += len(part)


def _count_tokens(rows: Rows, tokens: np.ndarray) -> None:
    """Add to `tokens`, int64 (sources,), those of the rows; pads are none."""
    if rows.ids.dtype.kind == "u":
        lengths = np.full(len(rows.ids), rows.ids.shape[1], np.int64)
    else:
        lengths = np.count_nonzero(rows.ids != PAD_ID, axis=1)
    single = rows.sources != MIXED
    np.add.at(tokens, rows.sources[single], lengths[single])
    for share in rows.shares.values():
        for source, count in share.items():
            tokens[source] += count


def _record_path(work: str, shard: ShardPlan) -> str:
    return storage.join(work, f"shard-{shard.folder.replace('/', '~')}-{shard.first:012d}.json")


def _load_record(work: str, shard: ShardPlan) -> WrittenShard | None:
    path = _record_path(work, shard)
    if not storage.exists(path) or not storage.exists(shard.url):
        return None
    record = read_record(path)
    return WrittenShard(record["url"], ShardInfo(**record["info"]), record["sources"])


def write_manifests(layout: Layout, shards: Sequence[ShardPlan], written: Sequence[WrittenShard]) -> None:
    """One manifest.jsonl in every folder that has shards."""
    for folder in sorted({shard.folder for shard in shards}):
        entries = [
            ManifestEntry(
                result.info.stem,
                result.info.num_sequences,
                {
                    "num_tokens": result.info.num_tokens,
                    "num_bytes": result.info.num_bytes,
                    "sha256": result.info.sha256,
                    "sources": result.sources,
                },
            )
            for shard, result in zip(shards, written, strict=True)
            if shard.folder == folder
        ]
        write_manifest(storage.join(layout.folder(folder), MANIFEST), entries)


def dataset_url(layout: Layout) -> str:
    """The dataset.json that tells that the whole output is there: the last one that is written."""
    return storage.join(layout.root if layout.per_source else layout.folder(layout.folders[0]), DATASET)


def write_dataset(url: str, record: dict[str, Any]) -> None:
    """Write a dataset.json."""
    storage.write_bytes(url, orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_dataset(layout: Layout) -> dict[str, Any] | None:
    """The dataset.json of a finished output, None where it is not finished."""
    path = dataset_url(layout)
    if not storage.exists(path):
        return None
    return read_record(path)


def read_record(url: str) -> dict[str, Any]:
    """A JSON object that a run keeps; ConfigError where it is none, since no run leaves half a file."""
    try:
        record = orjson.loads(storage.read_bytes(url))
    except orjson.JSONDecodeError as error:
        raise ConfigError(
            f"{url}: damaged, not the JSON that was written ({error}); remove the folder it lies in to start again"
        ) from error
    if not isinstance(record, dict):
        raise ConfigError(f"{url}: expected a JSON object, found {type(record).__name__}; it was not written by a run")
    return record
