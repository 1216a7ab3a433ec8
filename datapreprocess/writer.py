"""Plan and write the shards of an output, its manifests and its dataset.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.shard_format import (
    DATASET_NAME,
    MANIFEST_NAME,
    PAD_ID,
    ManifestEntry,
    ShardInfo,
    ShardWriter,
    write_manifest,
)
from open_lm.datapreprocess.cluster import Shared
from open_lm.datapreprocess.job import Layout, shard_size
from open_lm.datapreprocess.shuffle import MIXED, Runs, SequenceBlock
from open_lm.errors import ConfigError
from open_lm.system.names import escaped, unescaped


@dataclass(frozen=True)
class ShardPlan:
    """A shard of `count` sequences, which starts at sequence number `first` of its output."""

    url: str
    folder: str
    first: int
    count: int


@dataclass(frozen=True)
class Tail:
    """The ids at the end of an output that do not fill a sequence, and the number of tokens by source number."""

    ids: np.ndarray
    tokens_by_source: dict[int, int]


@dataclass(frozen=True)
class ShardTask:
    """Consecutive shards for one worker.

    padded: the padded last sequence of the output, int64 (length,), with its tokens by source; only in the task that
        writes the last shard.
    has_flags: the ids have flags (open_lm.data.token_flags), so that padding is unsigned too.
    """

    shards: tuple[ShardPlan, ...]
    runs: Shared[Runs]
    sources: tuple[str, ...]
    padded: Tail | None
    kind: str
    dtype: np.dtype[Any]
    has_flags: bool
    work: str


@dataclass
class WrittenShard:
    """A finished shard, with its number of tokens by source name."""

    url: str
    info: ShardInfo
    sources: dict[str, int] = field(default_factory=dict)


def plan_shards(layout: Layout, folders: Sequence[str], num_sequences: int) -> list[ShardPlan]:
    """Divide the sequences evenly among the folders and then into shards, and return the shards in output order.

    All shards have the same size; only the last shard of a folder may be smaller.
    """
    per_shard = shard_size(num_sequences, layout.shard_sequences)
    shards: list[ShardPlan] = []
    for number, folder in enumerate(folders):
        start, end = num_sequences * number // len(folders), num_sequences * (number + 1) // len(folders)
        for index, first in enumerate(range(start, end, per_shard)):
            shards.append(ShardPlan(layout.shard(folder, index), folder, first, min(per_shard, end - first)))
    return shards


def group_shards(shards: Sequence[ShardPlan], sequence_bytes: int, limit_bytes: int) -> list[list[ShardPlan]]:
    """Group consecutive shards so that each group has at most `limit_bytes` of ids, but at least one shard."""
    groups: list[list[ShardPlan]] = []
    group_bytes = 0
    for shard in shards:
        shard_bytes = shard.count * sequence_bytes
        if not groups or group_bytes + shard_bytes > limit_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(shard)
        group_bytes += shard_bytes
    return groups


def write_shards(task: ShardTask) -> list[WrittenShard]:
    """Write the missing shards of a task, save a record of each in the work folder, and return all records."""
    records = [_load_record(task.work, shard) for shard in task.shards]
    missing = [number for number, record in enumerate(records) if record is None]
    if not missing:
        return [record for record in records if record]
    shards = task.shards[missing[0] : missing[-1] + 1]
    first, end = shards[0].first, shards[-1].first + shards[-1].count
    pads_last = task.padded is not None and shards[-1] is task.shards[-1]
    sequences = _SequenceReader(task.runs.get().blocks(first, end - first - pads_last))
    for number, shard in enumerate(shards, start=missing[0]):
        is_padded = pads_last and shard is shards[-1]
        blocks = sequences.take(shard.count - is_padded)
        if records[number] is None:
            records[number] = _write_shard(task, shard, blocks, task.padded if is_padded else None)
        else:
            for _ in blocks:  # skip the sequences of a shard that exists already
                pass
    return [record for record in records if record]


class _SequenceReader:
    """A reader of a given number of sequences at a time from blocks of other sizes."""

    def __init__(self, blocks: Iterator[SequenceBlock]) -> None:
        self._blocks, self._buffer = blocks, SequenceBlock(np.zeros((0, 0)), np.zeros(0, np.uint16), {})

    def take(self, count: int) -> Iterator[SequenceBlock]:
        """Yield the next `count` sequences; the caller must exhaust the iterator before the next call."""
        while count:
            if not len(self._buffer.ids):
                self._buffer = next(self._blocks)
            block, self._buffer = self._buffer.split(count)
            count -= len(block.ids)
            yield block


def _write_shard(
    task: ShardTask, shard: ShardPlan, blocks: Iterator[SequenceBlock], padded: Tail | None
) -> WrittenShard:
    tokens = np.zeros(len(task.sources), np.int64)
    number = shard.first
    with ShardWriter(shard.url, task.kind, dtype=task.dtype) as writer:
        for block in blocks:
            ids = block.ids.astype(task.dtype) if task.has_flags else block.ids  # PAD_ID becomes all bits set
            _write_sequences(writer, number, ids, task.dtype)
            _count_tokens(block, tokens)
            number += len(block.ids)
        if padded is not None:
            writer.write_numbered(number, padded.ids[None])
            for source, count in padded.tokens_by_source.items():
                tokens[source] += count
    sources = {name: count for name, count in zip(task.sources, tokens.tolist(), strict=True) if count}
    written = WrittenShard(shard.url, writer.info, sources)
    write_record(_record_path(task.work, shard), asdict(written))
    return written


def _write_sequences(writer: ShardWriter, number: int, ids: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Write sequences (n, length) from number `number` on; those without padding in the unsigned `dtype`."""
    if ids.dtype.kind == "u":
        writer.write_numbered(number, ids)
        return
    is_padded = ids[:, -1] == PAD_ID  # padding is at the end of a sequence
    edges = np.flatnonzero(np.diff(is_padded)) + 1
    for part, has_pads in zip(np.split(ids, edges), is_padded[np.append(0, edges)].tolist(), strict=True):
        writer.write_numbered(number, part if has_pads else part.astype(dtype))
        number += len(part)


def _count_tokens(block: SequenceBlock, tokens: np.ndarray) -> None:
    """Add the tokens of the block, without padding, to `tokens`, int64 (sources,)."""
    if block.ids.dtype.kind == "u":
        lengths = np.full(len(block.ids), block.ids.shape[1], np.int64)
    else:
        lengths = np.count_nonzero(block.ids != PAD_ID, axis=1)
    single = block.sources != MIXED
    np.add.at(tokens, block.sources[single], lengths[single])
    for tokens_by_source in block.mixed_tokens.values():
        for source, count in tokens_by_source.items():
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
    """Write a manifest.jsonl to every folder that contains shards."""
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
                    **({"num_masked": result.info.num_masked} if result.info.num_masked else {}),
                    **result.info.block_sums,
                },
            )
            for shard, result in zip(shards, written, strict=True)
            if shard.folder == folder
        ]
        write_manifest(storage.join(layout.folder(folder), MANIFEST_NAME), entries)


def dataset_url(layout: Layout) -> str:
    """Return the URL of the dataset.json that is written last and marks the output as finished."""
    return storage.join(layout.root if layout.per_source else layout.folder(layout.folders[0]), DATASET_NAME)


def write_dataset(url: str, record: dict[str, Any]) -> None:
    """Write a dataset.json."""
    write_record(url, record, orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def read_dataset(layout: Layout) -> dict[str, Any] | None:
    """Return the dataset.json of a finished output, or None if the output is not finished."""
    path = dataset_url(layout)
    if not storage.exists(path):
        return None
    return read_record(path)


def write_record(url: str, record: Mapping[str, Any], option: int = 0) -> None:
    """Write a JSON object with escaped names; `option` is that of orjson."""
    storage.write_bytes(url, orjson.dumps(escaped(record), option=option))


def read_record(url: str) -> dict[str, Any]:
    """Return a JSON object that `write_record` wrote.

    Raise ConfigError if it is damaged, since runs write files atomically.
    """
    try:
        record = orjson.loads(storage.read_bytes(url))
    except orjson.JSONDecodeError as error:
        raise ConfigError(
            f"{url}: damaged, expected a JSON object ({error}); remove the folder that contains it to start over"
        ) from error
    if not isinstance(record, dict):
        raise ConfigError(
            f"{url}: expected a JSON object, found {type(record).__name__}; this file was not written by a "
            "preprocessing run"
        )
    return dict(unescaped(record))
