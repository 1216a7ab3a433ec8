"""Checksums of the blocks of a shard, with which a reader fetches and verifies only the parts that it needs.

The line of a manifest has them for a shard whose members all have the same size and npy header:

    "member_bytes": 5120       bytes from one member to the next, with the tar header; the first member is at byte 0
    "block_bytes": 1048576     bytes of a block; the last one may be shorter
    "block_sums": "q83v…"      the first 16 bytes of the SHA-256 of each block, joined, in base64
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 1 << 20
_SUM_BYTES = 16


@dataclass(frozen=True)
class BlockSums:
    """The checksums of a shard's blocks (see the module)."""

    member_bytes: int
    block_bytes: int
    sums: bytes

    @property
    def num_blocks(self) -> int:
        return len(self.sums) // _SUM_BYTES

    def mismatches(self, blocks: range, chunks: Iterable[bytes | memoryview]) -> list[int]:
        """Return the blocks whose content differs from the chunks, which hold consecutive `blocks`."""
        hasher = BlockHasher(self.block_bytes)
        for chunk in chunks:
            hasher.update(chunk)
        found = hasher.finish(self.member_bytes)
        return [block for number, block in enumerate(blocks) if found.sum_of(number) != self.sum_of(block)]

    def sum_of(self, block: int) -> bytes:
        """Return the checksum of a block."""
        return self.sums[block * _SUM_BYTES : (block + 1) * _SUM_BYTES]

    def to_json(self) -> dict[str, Any]:
        """Return the keys of a manifest's line."""
        sums = base64.b64encode(self.sums).decode("ascii")
        return {"member_bytes": self.member_bytes, "block_bytes": self.block_bytes, "block_sums": sums}

    @classmethod
    def from_json(cls, line: Mapping[str, Any], num_sequences: int, num_bytes: int | None) -> BlockSums | None:
        """Return the checksums in a manifest's line; None if it has none, or they do not fit the shard."""
        member_bytes, block_bytes, text = (line.get(name) for name in ("member_bytes", "block_bytes", "block_sums"))
        if not (isinstance(member_bytes, int) and isinstance(block_bytes, int) and isinstance(text, str)):
            return None
        try:
            sums = base64.b64decode(text, validate=True)
        except binascii.Error:
            return None
        if num_bytes is None or min(member_bytes, block_bytes, num_sequences) < 1:
            return None
        is_complete = len(sums) == -(-num_bytes // block_bytes) * _SUM_BYTES
        return (
            cls(member_bytes, block_bytes, sums) if is_complete and member_bytes * num_sequences <= num_bytes else None
        )


class BlockHasher:
    """Computes the block checksums of a file from its bytes in order."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes, self._sums, self._free = block_bytes, bytearray(), block_bytes
        self._hash = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        view = memoryview(data)
        while view:
            part, view = view[: self._free], view[self._free :]
            self._hash.update(part)
            self._free -= len(part)
            if not self._free:
                self._end_block()

    def _end_block(self) -> None:
        self._sums += self._hash.digest()[:_SUM_BYTES]
        self._hash, self._free = hashlib.sha256(), self._block_bytes

    def finish(self, member_bytes: int) -> BlockSums:
        """Return the checksums; no bytes may follow."""
        if self._free < self._block_bytes:
            self._end_block()
        return BlockSums(member_bytes, self._block_bytes, bytes(self._sums))
