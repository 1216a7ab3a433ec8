"""Sequences drawn at random from shards, as text in which ends of documents and pads are seen."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.data.shard_format import PAD_ID, decode_member, index_shard
from open_lm.errors import DataError, UserError
from open_lm.tokenizer import Tokenizer
from open_lm.utils.shard_survey import samples


def choose(counts: Mapping[str, int], number: int, seed: int) -> dict[str, list[int]]:
    """Positions of `number` sequences by shard, each sequence as likely as any other, from shards of `counts`."""
    total = sum(counts.values())
    places = sorted(random.Random(seed).sample(range(total), min(number, total)))
    chosen: dict[str, list[int]] = {}
    first = 0
    for url, count in counts.items():
        if inside := [place - first for place in places if first <= place < first + count]:
            chosen[url] = inside
        first += count
    return chosen


def read_samples(
    url: str, positions: Sequence[int], tokenizer: Tokenizer | None, eot_id: int | None, tmp_dir: str | None = None
) -> Iterator[dict[str, Any]]:
    """The sequences at some positions of a shard: {shard, position, key, tokens, pads, pieces}, or a `problem`.

    A piece is {"text" or "ids", "ended"}; `ended`: an end-of-text id followed. Without a tokenizer there are only ids.
    """
    try:
        with tempfile.TemporaryDirectory(dir=tmp_dir) as folder:
            path = storage.local_path(url)
            if storage.is_remote(url):
                path = os.path.join(folder, "shard.tar")
                storage.download(url, path)
            with open(path, "rb") as file:
                members = samples(index_shard(file, url))
                for position in positions:
                    if position >= len(members):
                        raise DataError(f"{url}: it holds {len(members):,} sequences, its manifest says more")
                    member = members[position]
                    file.seek(member.offset)
                    ids = decode_member(file.read(member.size), member.kind, eot_id=eot_id or 0)
                    kept = ids[ids != PAD_ID]
                    yield {
                        "shard": url, "position": position, "key": member.key, "tokens": len(kept),
                        "pads": len(ids) - len(kept), "pieces": _pieces(kept, tokenizer, eot_id),
                    }  # fmt: skip
    except (UserError, OSError) as error:
        yield {"shard": url, "problem": str(error) if url in str(error) else f"{url}: {error}"}


def _pieces(ids: np.ndarray, tokenizer: Tokenizer | None, eot_id: int | None) -> list[dict[str, Any]]:
    ends = np.flatnonzero(ids == eot_id) if eot_id is not None else np.zeros(0, np.int64)
    pieces: list[dict[str, Any]] = []
    start = 0
    for end in ends:
        pieces.append({**_decoded(ids[start:end].tolist(), tokenizer), "ended": True})
        start = int(end) + 1
    if start < len(ids):
        pieces.append({**_decoded(ids[start:].tolist(), tokenizer), "ended": False})
    return pieces


def _decoded(ids: list[int], tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"ids": ids}
    try:
        return {"text": tokenizer.decode(ids)}
    except ValueError as error:
        return {"ids": ids, "note": str(error)}
