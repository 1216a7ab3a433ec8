"""Read random sequences from shards and decode them, with visible document ends and padding."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.data.shard_format import PAD_ID, decode_member, index_shard
from open_lm.data.shards import sequence_members
from open_lm.data.token_flags import without_flags
from open_lm.errors import DataError, UserError
from open_lm.tokenizer import Tokenizer


def choose_positions(counts: Mapping[str, int], number: int, seed: int) -> dict[str, list[int]]:
    """Draw `number` sequences uniformly from shards with `counts` sequences; return their positions by shard."""
    total = sum(counts.values())
    drawn = sorted(random.Random(seed).sample(range(total), min(number, total)))
    positions: dict[str, list[int]] = {}
    first = 0
    for url, count in counts.items():
        if in_shard := [index - first for index in drawn if first <= index < first + count]:
            positions[url] = in_shard
        first += count
    return positions


def read_samples(
    url: str, positions: Sequence[int], tokenizer: Tokenizer | None, eot_id: int | None, tmp_dir: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the sequences at `positions` of a shard: {shard, position, key, tokens, pads, pieces}, or {shard, problem}.

    A piece is {"text" or "ids", "ended"}; "ended" is whether an end-of-text id follows. Without a tokenizer, pieces
    have ids.
    """
    try:
        with tempfile.TemporaryDirectory(dir=tmp_dir) as folder:
            path = storage.local_path(url)
            if storage.is_remote(url):
                path = os.path.join(folder, "shard.tar")
                storage.download(url, path)
            with open(path, "rb") as file:
                members = sequence_members(index_shard(file, url))
                for position in positions:
                    if position >= len(members):
                        raise DataError(f"{url}: contains {len(members):,} sequences, fewer than its manifest says")
                    member = members[position]
                    file.seek(member.offset)
                    ids = without_flags(decode_member(file.read(member.size), member.kind, eot_id=eot_id or 0))
                    tokens = ids[ids != PAD_ID]
                    yield {
                        "shard": url, "position": position, "key": member.key, "tokens": len(tokens),
                        "pads": len(ids) - len(tokens), "pieces": _pieces(tokens, tokenizer, eot_id),
                    }  # fmt: skip
    except (UserError, OSError) as error:
        yield {"shard": url, "problem": str(error) if url in str(error) else f"{url}: {error}"}


def _pieces(ids: np.ndarray, tokenizer: Tokenizer | None, eot_id: int | None) -> list[dict[str, Any]]:
    """Split token ids (T,) at end-of-text ids and decode the pieces."""
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
