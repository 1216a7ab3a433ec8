"""Compressed files: each suffix with the streaming decompressor that reads it."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from open_lm.datapreprocess.readers.base import BrokenFile


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


COMPRESSIONS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": _zstandard,
    ".zstd": _zstandard,
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
}


_OUTPUT_BYTES = 1 << 20
_FIRST_INPUT_BYTES, _MAX_INPUT_BYTES = 512, 256 << 10


def decompressed(blocks: Iterator[bytes], suffix: str, url: str) -> Iterator[bytes]:
    """The content of any number of compressed frames, one after the other, in blocks of about a MiB.

    An unfinished last frame is a BrokenFile. As much is decompressed at once as gave a MiB before, so that content
    which compresses a thousandfold is not unfolded whole.
    """
    engine = None
    input_bytes = _FIRST_INPUT_BYTES
    for block in blocks:
        data = block
        while data:
            if engine is None:
                data = data.lstrip(b"\0")  # padding that some writers leave after the last frame
                if not data:
                    break
                engine = COMPRESSIONS[suffix]()
            try:
                content = engine.decompress(data[:input_bytes])
            except Exception as error:  # zstandard's own error cannot be named without importing it
                message = f"{url}: cannot be decompressed ({error}); fetch the file again"
                raise BrokenFile("cannot be decompressed", message) from error
            if content:
                yield content
            data = data[input_bytes:]
            input_bytes = min(max(input_bytes * _OUTPUT_BYTES // (len(content) + 1), 256), 2 * input_bytes)
            input_bytes = min(input_bytes, _MAX_INPUT_BYTES)
            if engine.eof:
                data, engine = engine.unused_data + data, None
    if engine is not None:
        message = f"{url}: cut short: its compressed data ends in the middle; fetch the file again"
        raise BrokenFile("cut short", message)
