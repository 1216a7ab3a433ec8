"""Random token ids in place of shards (--dataset-type synthetic)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from open_lm.data.hashing import hash_key, hash_range
from open_lm.data.order import Piece, Samples
from open_lm.data.token_flags import stored_dtype

if TYPE_CHECKING:
    from open_lm.data.stream import Notice, StreamSpec


class SyntheticReader:
    """Random ids of the vocabulary that depend only on the sample's key, for speed measurements and tests."""

    needs_prefetch = False

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.notices: list[Notice] = []

    def size_of(self, source: int, shard: int) -> int:
        raise AssertionError("the size of synthetic data is always known")

    def prefetch(self, upcoming: Sequence[Piece]) -> None:
        """Do nothing: there is nothing to fetch."""

    def read(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        """Return ids (n, seq_len + 1) of `stored_dtype`, and that all rows hold data (n,) bool."""
        ids = np.empty((len(samples.source), self.spec.seq_len + 1), stored_dtype(self.spec.vocab_size))
        for row, (member, key) in enumerate(zip(samples.member.tolist(), samples.key.tolist(), strict=True)):
            ids[row] = hash_range(hash_key(key, member), ids.shape[1]) % np.uint64(self.spec.vocab_size)
        return ids, np.ones(len(ids), bool)
