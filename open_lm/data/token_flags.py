"""Flags in stored token ids: which tokens are no targets, and where documents start.

Conversations for supervised fine-tuning need a loss mask and the borders of packed conversations. Stored ids of 32 bits
hold both, so that such a shard has the same members, sizes and checksums as any other:

    bits 0 to 29   the token id
    bit 30         `STARTS_DOCUMENT`: the first token of a document
    bit 31         `NOT_TRAINED`: the token is context and no target of the loss
    all bits       padding: `PAD_ID` (-1) as a number of 32 bits

An id without flags is the number itself, so ids with and without flags can be mixed. No vocabulary has 2**30 ids, so a
reader that does not know the flags reports an id outside its vocabulary instead of training on context.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ID_BITS = 30
ID_MASK = (1 << ID_BITS) - 1
STARTS_DOCUMENT = 1 << ID_BITS
NOT_TRAINED = 1 << 31
FLAGGED_DTYPE: np.dtype[Any] = np.dtype(np.uint32)
_PAD = np.uint32(0xFFFFFFFF)


def stored_dtype(vocab_size: int, signed: bool = False) -> np.dtype[Any]:
    """Return the dtype of ids on their way to the device: the smallest that torch can convert to int64 on any device.

    Ids that hold PAD_ID or flags (`signed`) or need more than 16 bits get a signed type.
    """
    stored = np.min_scalar_type(max(vocab_size - 1, 0))
    if stored.itemsize <= 2 and not signed:
        return stored
    return np.dtype(np.int32 if vocab_size <= 2**31 else np.int64)


def flag_document(ids: np.ndarray, is_trained: np.ndarray) -> np.ndarray:
    """Return a document's ids (n,) of any integer type with flags, uint32 (n,); is_trained (n,) bool marks the targets.

    The first token is never a target: in a packed sequence, the token before it belongs to another document.
    """
    flagged = ids.astype(FLAGGED_DTYPE) | np.where(is_trained, 0, NOT_TRAINED).astype(FLAGGED_DTYPE)
    flagged[:1] |= np.uint32(STARTS_DOCUMENT | NOT_TRAINED)
    return flagged


def may_have_flags(ids: np.ndarray) -> bool:
    """Return whether stored ids (…) of any integer type hold flags: numbers from 2**30 to 2**32 - 1."""
    return bool(ids.size) and ids.dtype.itemsize >= 4 and STARTS_DOCUMENT <= int(ids.max()) <= int(_PAD)


def as_signed(ids: np.ndarray) -> np.ndarray:
    """Return ids with flags, of any integer type, as int32 (…): not trained ones are negative, padding is PAD_ID."""
    return ids.astype(FLAGGED_DTYPE).view(np.int32)


def without_flags(ids: np.ndarray) -> np.ndarray:
    """Return stored ids int64 (…) without flags, if they have any; padding becomes PAD_ID."""
    return np.where(ids == _PAD, -1, ids & ID_MASK) if may_have_flags(ids) else ids


def are_valid(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return which ids with flags (…), int32 or uint32, are padding or have an id of the vocabulary: bool (…)."""
    valid: np.ndarray = ((ids & ids.dtype.type(ID_MASK)) < vocab_size) | (ids == _PAD.astype(ids.dtype))
    return valid


def count_tokens(ids: np.ndarray) -> tuple[int, int]:
    """Return the numbers of tokens and of targets among ids with flags (…), uint32; padding is neither."""
    return int(np.count_nonzero(ids != _PAD)), int(np.count_nonzero(ids < NOT_TRAINED))
