"""Streaming decompression by file name suffix."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from open_lm.datapreprocess.readers.base import CUT_SHORT, BrokenFile


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


def decompress(blocks: Iterator[bytes], suffix: str, url: str) -> Iterator[bytes]:
    """Decompress any number of consecutive frames; yield blocks of about a MiB.

    The input size of each call adapts to the compression ratio, so that content which compresses a thousandfold is not
    decompressed at once. Raises BrokenFile for invalid data and for an incomplete last frame.
    """
    engine = None
    input_bytes = _FIRST_INPUT_BYTES
    for block in blocks:
        data = block
        while data:
            if engine is None:
                data = data.lstrip(b"\0")  # some writers pad the file after the last frame
                if not data:
                    break
                engine = COMPRESSIONS[suffix]()
            try:
                content = engine.decompress(data[:input_bytes])
            except Exception as error:  # naming zstandard's error class would need its import
                message = f"{url}: cannot be decompressed ({error}); download the file again"
                raise BrokenFile("cannot be decompressed", message) from error
            if content:
                yield content
            data = data[input_bytes:]
            input_bytes = min(max(input_bytes * _OUTPUT_BYTES // (len(content) + 1), 256), 2 * input_bytes)
            input_bytes = min(input_bytes, _MAX_INPUT_BYTES)
            if engine.eof:
                data, engine = engine.unused_data + data, None
    if engine is not None:
        message = f"{url}: truncated: the compressed data ends inside a frame; download the file again"
        raise BrokenFile(CUT_SHORT, message)
