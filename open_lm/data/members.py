"""The members of shards: token ids to bytes and back, in every kind of member."""

from __future__ import annotations

import ast
import gzip
import io
import zlib
from typing import Any

import numpy as np
import orjson

from open_lm.errors import DataError

MEMBER_KINDS = ("npy", "json.gz", "json", "txt")
PAD_ID = -1
END_OF_TEXT_STRING = "<|endoftext|>"
_GZIP_WBITS = 31


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned numpy type that holds the ids 0 … vocab_size - 1."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be positive, got {vocab_size}")
    return np.min_scalar_type(vocab_size - 1)


def encode_member(ids: np.ndarray, kind: str, dtype: np.dtype[Any] | None = None) -> bytes:
    """Encode ids (T,) of an integer type as a member of `kind`.

    `dtype` (npy only) defaults to that of the ids. With pads, an unsigned type becomes the next larger signed one. An
    id that does not fit the type is a DataError.
    """
    ids = np.ascontiguousarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"a member must be a 1-D array of integers, found {ids.dtype} of shape {ids.shape}")
    if kind == "npy":
        buffer = io.BytesIO()
        np.save(buffer, _cast(ids, dtype or ids.dtype), allow_pickle=False)
        return buffer.getvalue()
    text = orjson.dumps(ids, option=orjson.OPT_SERIALIZE_NUMPY)
    if kind in ("json", "txt"):
        return text
    if kind == "json.gz":
        # zlib directly: the header has no time and no name in every Python version.
        compressor = zlib.compressobj(6, zlib.DEFLATED, _GZIP_WBITS)
        return compressor.compress(text) + compressor.flush()
    raise DataError(f"unknown member kind {kind!r}; known: {', '.join(MEMBER_KINDS)}")


def _cast(ids: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if ids.size and dtype.kind == "u" and ids.min() < 0:
        dtype = np.promote_types(dtype, np.int8)
    if ids.size and (ids.max() > np.iinfo(dtype).max or ids.min() < np.iinfo(dtype).min):
        raise DataError(f"ids from {ids.min()} to {ids.max()} do not fit {dtype}; check the vocabulary size")
    return ids.astype(dtype, copy=False)


def decode_member(data: bytes, kind: str, *, eot_id: int | None = None) -> np.ndarray:
    """Decode the ids of one member, int64 (T,). Invalid data of any kind is a DataError.

    `eot_id` replaces the string "<|endoftext|>", which old txt and json members may hold.
    """
    try:
        if kind == "npy":
            array = _load_npy(data)
        elif kind in ("json", "txt"):
            array = _parse_list(data, eot_id)
        elif kind == "json.gz":
            array = _parse_list(gzip.decompress(data), eot_id)
        else:
            raise DataError(f"unknown member kind {kind!r}; known: {', '.join(MEMBER_KINDS)}")
    except DataError:
        raise
    except (ValueError, TypeError, OverflowError, EOFError, OSError, SyntaxError, zlib.error) as error:
        raise DataError(f"not a valid {kind} member: {type(error).__name__}: {error}") from error
    except (MemoryError, RecursionError) as error:
        raise DataError(f"not a valid {kind} member: too deeply nested or too large") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"not a valid {kind} member: expected a 1-D list of integers, found {found}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise DataError(f"not a valid {kind} member: id {array.max()} does not fit 64 bits")
    return array.astype(np.int64, copy=False)


def _load_npy(data: bytes) -> np.ndarray:
    if not data.startswith(np.lib.format.MAGIC_PREFIX):  # numpy would suggest to unpickle it
        raise DataError(f"not a valid npy member: it starts with {data[:8]!r}; create or copy the shard again")
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _parse_list(data: bytes, eot_id: int | None) -> np.ndarray:
    """Parse a JSON list, or a Python list literal with the same content, as an integer array."""
    try:
        values = orjson.loads(data.replace(b"'", b'"'))
    except orjson.JSONDecodeError:
        values = ast.literal_eval(data.decode().strip())
    if isinstance(values, tuple):
        values = list(values)
    if not isinstance(values, list):
        raise DataError(f"expected a list of integers, found {type(values).__name__}")
    types = set(map(type, values))
    if str in types:
        others = {value for value in values if isinstance(value, str) and value != END_OF_TEXT_STRING}
        if others:
            raise DataError(f"the list of ids holds the text {sorted(others)[0]!r}")
        if eot_id is None:
            raise DataError(
                f'holds the text "{END_OF_TEXT_STRING}" in place of an id, but the end-of-text id is not known'
            )
        values = [eot_id if isinstance(value, str) else value for value in values]
        types.discard(str)
    if types - {int}:
        raise DataError(f"the list of ids holds values of type {sorted(kind.__name__ for kind in types - {int})[0]}")
    return np.array(values, dtype=np.int64)
