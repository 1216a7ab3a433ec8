"""Split byte streams at separators: into parts (lines or texts), or into chunks of many parts.

One process decompresses a huge file (`FileChunks`) and others parse the chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from open_lm.datapreprocess.readers.base import BrokenFile


@dataclass(frozen=True)
class Chunk:
    """Complete lines (or texts) from the middle of a file; `first_line` is the number of the first, counted from 1."""

    number: int
    data: bytes
    first_line: int


def split_parts(blocks: Iterable[bytes], separator: bytes) -> Iterator[list[bytes]]:
    """Yield the parts between the separators, as one list for each block in which a part ends.

    Non-empty bytes after the last separator are a part, too. If reading the blocks fails, only the incomplete part is
    lost.
    """
    pending: list[bytes] = []  # the beginning of a part, without separators
    overlap = len(separator) - 1
    for block in blocks:
        tail = pending[-1][-overlap:] if overlap and pending else b""
        if separator not in tail + block if tail else separator not in block:
            pending.append(block if len(block) > overlap else _joined_tail(pending, block))
            continue
        parts = b"".join([*pending, block]).split(separator)
        last = parts.pop()
        pending = [last] if last else []
        yield parts
    if any(pending):
        yield [b"".join(pending)]


def _joined_tail(pending: list[bytes], block: bytes) -> bytes:
    """Join a block shorter than a separator to the previous one, so that no separator spans three blocks."""
    return (pending.pop() if pending else b"") + block


def cut_chunks(blocks: Iterable[bytes], separator: bytes, chunk_bytes: int) -> Iterator[Chunk]:
    """Yield chunks of at least `chunk_bytes`, separators included; an empty file is one empty chunk.

    The chunk boundaries depend only on the content and on `chunk_bytes`.
    """
    parts: list[bytes] = []
    number, first_line, size = 0, 1, 0
    fault: BrokenFile | None = None
    try:
        for new_parts in split_parts(blocks, separator):
            new_bytes = sum(map(len, new_parts)) + len(new_parts) * len(separator)
            if size + new_bytes < chunk_bytes:
                parts += new_parts
                size += new_bytes
                continue
            for part in new_parts:
                parts.append(part)
                size += len(part) + len(separator)
                if size >= chunk_bytes:
                    yield Chunk(number, _join_parts(parts, separator), first_line)
                    number, first_line, size, parts = number + 1, first_line + len(parts), 0, []
    except BrokenFile as error:
        fault = error
    if parts or (not number and fault is None):
        yield Chunk(number, _join_parts(parts, separator), first_line)
    if fault is not None:
        raise fault


def _join_parts(parts: list[bytes], separator: bytes) -> bytes:
    """Join parts such that splitting gives the same parts again.

    No separator follows the last part: it could combine with the end of that part to an earlier separator. A last part
    that is empty needs one, because it would be lost otherwise.
    """
    return separator.join(parts if parts[-1:] != [b""] else [*parts, b""])
