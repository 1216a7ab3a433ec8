"""Recognize errors of allocators."""

from __future__ import annotations

import torch

from open_lm.errors import UserError

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(UserError, MemoryError):
    """A rank whose memory is exhausted."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that memory of a device or of the host cannot be allocated."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)
