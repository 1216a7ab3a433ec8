"""Files whose documents stand one after the other between separators: lines, or texts.

A huge compressed one is decompressed by one reader, `FileChunks`, and parsed by others, a stretch each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from open_lm.datapreprocess.readers.base import BrokenFile


@dataclass(frozen=True)
class Chunk:
    """Lines (or texts) from the middle of a file, all whole; the first is number `first_line`, counted from 1."""

    number: int
    data: bytes
    first_line: int


def split_parts(blocks: Iterable[bytes], separator: bytes) -> Iterator[list[bytes]]:
    """What stands between the separators, as a list for each block in which a part ends.

    What follows the last separator is a part too, unless it is empty. A file that breaks off loses only the part in
    which it breaks.
    """
    pending: list[bytes] = []  # the beginning of a part, free of separators
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
    """A block shorter than a separator, joined to the one before, so that no separator spans three."""
    return (pending.pop() if pending else b"") + block


def cut_stretches(blocks: Iterable[bytes], separator: bytes, chunk_bytes: int) -> Iterator[Chunk]:
    """Stretches of at least `chunk_bytes` with their separators; an empty file is one empty stretch.

    Where they end depends on the content and `chunk_bytes` alone.
    """
    parts: list[bytes] = []
    number, first_line, size = 0, 1, 0
    fault: BrokenFile | None = None
    try:
        for found in split_parts(blocks, separator):
            found_bytes = sum(map(len, found)) + len(found) * len(separator)
            if size + found_bytes < chunk_bytes:
                parts += found
                size += found_bytes
                continue
            for part in found:
                parts.append(part)
                size += len(part) + len(separator)
                if size >= chunk_bytes:
                    yield Chunk(number, _joined(parts, separator), first_line)
                    number, first_line, size, parts = number + 1, first_line + len(parts), 0, []
    except BrokenFile as error:
        fault = error
    if parts or (not number and fault is None):
        yield Chunk(number, _joined(parts, separator), first_line)
    if fault is not None:
        raise fault


def _joined(parts: list[bytes], separator: bytes) -> bytes:
    """What is cut into the same parts again; a separator more could be taken for one that begins in the last part."""
    return separator.join(parts if parts[-1:] != [b""] else [*parts, b""])
