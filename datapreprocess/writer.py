"""Sequences to shards, and what lies beside them: manifest.jsonl and dataset.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.shard_format import ManifestEntry, ShardInfo, ShardWriter, write_manifest
from open_lm.datapreprocess.job import Layout, shard_size
from open_lm.datapreprocess.shuffle import Run, gather

MANIFEST, DATASET = "manifest.jsonl", "dataset.json"


@dataclass(frozen=True)
class ShardPlan:
    """A shard of `count` sequences, the first of them number `first` of the whole output."""

    url: str
    folder: int
    first: int
    count: int


@dataclass(frozen=True)
class ShardTask:
    """Neighbouring shards for one worker: `bounds` (runs, 2) is where their sequences lie in the runs.

    `padded` int64 (length,) is the padded last sequence of all, in the task that writes the last shard.
    """

    shards: tuple[ShardPlan, ...]
    runs: tuple[Run, ...]
    bounds: np.ndarray
    padded: np.ndarray | None
    length: int
    kind: str
    dtype: np.dtype[Any]
    work: str


def plan_shards(layout: Layout, num_sequences: int) -> list[ShardPlan]:
    """Shards of like size (the last of a folder may be smaller), folders of equal shares, in output order."""
    per_shard = shard_size(num_sequences, layout.shard_sequences)
    shards: list[ShardPlan] = []
    folders = len(layout.folders)
    for folder in range(folders):
        start, end = num_sequences * folder // folders, num_sequences * (folder + 1) // folders
        for index, first in enumerate(range(start, end, per_shard)):
            shards.append(ShardPlan(layout.shard(folder, index), folder, first, min(per_shard, end - first)))
    return shards


def group_shards(shards: Sequence[ShardPlan], sequence_bytes: int, limit_bytes: int) -> list[list[ShardPlan]]:
    """Neighbouring shards together, as many as fit the memory of one task, at least one."""
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


def write_shards(task: ShardTask) -> dict[int, ShardInfo]:
    """Write the shards of a task that are not there yet: ShardInfo by the number of the shard's first sequence.

    The record of each shard is kept in the work folder.
    """
    records = [_load_record(task.work, shard) for shard in task.shards]
    if None not in records:
        return {shard.first: record for shard, record in zip(task.shards, records, strict=True) if record}
    sequences = gather(task.runs, task.bounds, task.length, task.dtype)
    infos = {}
    for number, (shard, record) in enumerate(zip(task.shards, records, strict=True)):
        start = shard.first - task.shards[0].first
        end = start + shard.count if number + 1 < len(task.shards) else None
        padded = task.padded if end is None else None
        info = record or _write_shard(task, shard, sequences[start:end], padded)
        storage.write_bytes(_record_path(task.work, shard), orjson.dumps(asdict(info)))
        infos[shard.first] = info
    return infos


def _write_shard(task: ShardTask, shard: ShardPlan, sequences: np.ndarray, padded: np.ndarray | None) -> ShardInfo:
    with ShardWriter(shard.url, task.kind, dtype=task.dtype) as writer:
        for number, ids in enumerate(sequences, start=shard.first):
            writer.write(member_key(number), ids)
        if padded is not None:
            writer.write(member_key(shard.first + len(sequences)), padded)
    return writer.info


def member_key(number: int) -> str:
    """The key of the sequence that stands at `number` in the whole output, counted from 0."""
    return f"{number:012d}"


def _record_path(work: str, shard: ShardPlan) -> str:
    return storage.join(work, f"shard-{shard.folder}-{shard.first:012d}.json")


def _load_record(work: str, shard: ShardPlan) -> ShardInfo | None:
    path = _record_path(work, shard)
    if not storage.exists(path) or not storage.exists(shard.url):
        return None
    return ShardInfo(**orjson.loads(storage.read_bytes(path)))


def write_manifests(layout: Layout, shards: Sequence[ShardPlan], infos: Sequence[ShardInfo]) -> None:
    """One manifest.jsonl in every folder that has shards."""
    for folder in sorted({shard.folder for shard in shards}):
        entries = [
            ManifestEntry(
                info.stem,
                info.num_sequences,
                {"num_tokens": info.num_tokens, "num_bytes": info.num_bytes, "sha256": info.sha256},
            )
            for shard, info in zip(shards, infos, strict=True)
            if shard.folder == folder
        ]
        write_manifest(storage.join(layout.folder(folder), MANIFEST), entries)


def write_dataset(layout: Layout, record: dict[str, Any]) -> None:
    """dataset.json in every folder, the last thing a run writes: where it is, the output is whole."""
    data = orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    for folder in reversed(range(len(layout.folders))):
        storage.write_bytes(storage.join(layout.folder(folder), DATASET), data)


def read_dataset(layout: Layout) -> dict[str, Any] | None:
    """The dataset.json of a finished output, None where it is not finished."""
    path = storage.join(layout.folder(0), DATASET)
    if not storage.exists(path):
        return None
    record: dict[str, Any] = orjson.loads(storage.read_bytes(path))
    return record
