"""Helpers: small data sets with known content, and shortcuts for the inspect_shards command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from open_lm import storage
from open_lm.data.shard_format import ManifestEntry, ShardWriter, read_manifest, write_manifest
from open_lm.utils.inspect_shards import BrokenDataSet, main

EOT = 3
# seq_len 7. Lengths of pieces between end-of-text ids: 3 2 3 | 8 | 1 7 | 4 1, then three padding ids.
SEQUENCES = [
    [10, 11, 3, 12, 3, 13, 14, 15],
    [16, 17, 18, 19, 10, 11, 12, 13],
    [3, 20, 21, 22, 23, 24, 25, 26],
    [27, 28, 29, 3, 99, -1, -1, -1],
]
HISTOGRAM = {"1": 2, "2": 3, "4": 2, "8": 1}


def make_folder(
    folder: Path | str, shards: dict[str, list[list[int]]], source: str | None = None, kind: str = "npy"
) -> list[ManifestEntry]:
    entries = []
    for name, sequences in shards.items():
        with ShardWriter(storage.join(folder, f"{name}.tar"), kind) as writer:
            for number, ids in enumerate(sequences):
                writer.write(f"{number:06d}", np.array(ids, dtype=np.int32))
        info = writer.info
        extra: dict[str, Any] = {
            "num_tokens": info.num_tokens,
            "num_bytes": info.num_bytes,
            "sha256": info.sha256,
            **info.block_sums,
        }
        if source:
            extra["sources"] = {source: info.num_tokens}
        entries.append(ManifestEntry(name, info.num_sequences, extra))
    write_manifest(storage.join(folder, "manifest.jsonl"), entries)
    return entries


def record(entries: list[ManifestEntry], **changes: Any) -> dict[str, Any]:
    tokens = sum(entry.extra["num_tokens"] for entry in entries)
    settings = {
        "tokenizer": None, "tokenizer_fingerprint": "ab" * 32, "eot_id": EOT, "vocab_size": 100, "seq_len": 7,
        "format": "npy", "content_key": "text", "seed": 5, "shuffle": True,
    }  # fmt: skip
    return {
        "tool": {"name": "open_lm", "version": "1.2"},
        "settings": settings | changes.pop("settings", {}),
        "inputs": [{"url": "a.jsonl", "num_bytes": 1_500_000}, {"url": "b.jsonl", "num_bytes": 500_000}],
        "counts": {
            "documents": 7, "characters": 1234, "tokens": tokens, "shards": len(entries),
            "sequences": sum(entry.num_sequences for entry in entries),
            "bytes": sum(entry.extra["num_bytes"] for entry in entries), "bad_documents": 2, "pads": 3,
        },
        "sources": {"wiki": {"tokens": tokens}},
        "mixture": None,
        "bad_documents": {"not_json": 2},
        "bad_documents_first": [{"url": "a.jsonl", "line": 4, "kind": "not_json", "detail": "cut"}],
        "broken_files": [],
        "tail": {"fate": "padded", "tokens": 5, "pads": 3, "shard": "s1", "key": "000001"},
    } | changes  # fmt: skip


def make_set(folder: Path | str, **changes: Any) -> None:
    entries = make_folder(folder, {"s0": SEQUENCES[:2], "s1": SEQUENCES[2:]}, "wiki")
    storage.write_bytes(storage.join(folder, "dataset.json"), orjson.dumps(record(entries, **changes)))


def facts(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    main([*args, "--json", "--num-workers", "1"])
    return json.loads(capsys.readouterr().out)


def problems(*args: str) -> str:
    with pytest.raises(BrokenDataSet) as caught:
        main([*args, "--num-workers", "1"])
    return str(caught.value)


def edit_manifest(folder: Path, **changes: Any) -> None:
    first, *others = read_manifest(str(folder / "manifest.jsonl"))
    count = changes.pop("num_sequences", first.num_sequences)
    write_manifest(folder / "manifest.jsonl", [ManifestEntry(first.shard, count, first.extra | changes), *others])
