"""Shards with recognizable sequences for the tests of the training data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from open_lm.data.block_sums import BlockHasher
from open_lm.data.shard_format import ManifestEntry, ShardWriter, token_dtype, write_manifest

SEQ_LEN = 8
VOCAB_SIZE = 1000
BLOCK_BYTES = 4096  # four npy members of 1,024 bytes


def sequence(source: int, shard: int, member: int, length: int = SEQ_LEN + 1) -> np.ndarray:
    """Return ids (length,) whose first three are source, shard and member."""
    ids = np.arange(length) % VOCAB_SIZE
    ids[:3] = (source, shard, member)
    return ids


def write_shard(path: Path, sequences: Sequence[np.ndarray], kind: str = "npy") -> str:
    """Write a shard of the sequences; return its path."""
    dtype = token_dtype(VOCAB_SIZE) if kind == "npy" and all(ids.min() >= 0 for ids in sequences if len(ids)) else None
    with ShardWriter(path, kind, dtype=dtype) as writer:
        for number, ids in enumerate(sequences):
            writer.write(f"{number:06d}", ids)
    return str(path)


def write_source(folder: Path, sizes: Sequence[int], source: int = 0, kind: str = "npy", manifest: bool = True) -> str:
    """Write shards 00000.tar, … of these sizes; return the path of their manifest, or without one their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        write_shard(folder / f"{shard:05d}.tar", [sequence(source, shard, m) for m in range(size)], kind)
    if not manifest:
        return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"
    entries = [ManifestEntry(f"{shard:05d}", size) for shard, size in enumerate(sizes)]
    write_manifest(folder / "manifest.jsonl", entries)
    return str(folder / "manifest.jsonl")


def write_block_source(folder: Path, sizes: Sequence[int]) -> str:
    """Write npy shards and their manifest with checksums of small blocks; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for shard, size in enumerate(sizes):
        path = folder / f"{shard:05d}.tar"
        write_shard(path, [sequence(0, shard, member) for member in range(size)])
        hasher = BlockHasher(BLOCK_BYTES)
        hasher.update(path.read_bytes())
        sums = hasher.finish(1024).to_json()
        entries.append(ManifestEntry(path.stem, size, {"num_bytes": path.stat().st_size, "sha256": "0" * 64, **sums}))
    write_manifest(folder / "manifest.jsonl", entries)
    return str(folder / "manifest.jsonl")


def places(sequences: np.ndarray) -> list[tuple[int, ...]]:
    """Return (source, shard, member) of the sequences (n, T)."""
    return [tuple(ids[:3]) for ids in sequences.tolist()]


def jsonable(state: object) -> object:
    """Return the state after a round trip through JSON, as in a checkpoint."""
    return json.loads(json.dumps(state))
