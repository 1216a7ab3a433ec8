"""Causal softmax attention in bfloat16 on a CPU with matrix units (Intel AMX), by kernels of our own.

Torch's kernels convert and copy between many small products; ours (attention.cpp) keep scores in the first-level
cache from the first product to the last, and skip what lies outside of a document. They are compiled by the machine's
C++ compiler when they are first needed, one library for each head width.
Legend: B batch, T sequence, H heads, K head width.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor

from open_lm.kernels.native import MATRICES, NativeError, load

_WIDEST = 256  # beyond it a head's blocks leave the first-level cache, and torch's kernels are as fast


class _View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


def takes(queries: Tensor) -> bool:
    """Whether the kernels can attend with these queries (B,T,H,K) here."""
    return queries.dtype == torch.bfloat16 and queries.numel() > 0 and problem(queries.shape[-1]) is None


def forward(queries: Tensor, keys: Tensor, values: Tensor, first_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each query attends to the keys from its document's first up to its own, scores scaled by 1/sqrt(K).

    Args:
        queries, keys, values: (B,T,H,K) bfloat16; the elements of a head lie side by side.
        first_tokens: (B,T) int32, where in its row each token's document begins; None where a row is one document.

    Returns:
        (B,T,H,K) bfloat16, and the natural logarithms (B,H,T) float32 of the softmax's sums. All are the same bits in
        every run, with any number of threads.
    """
    batch, length, heads, _ = queries.shape
    out = queries.new_empty(queries.shape)
    log_sums = queries.new_empty(batch, heads, length, dtype=torch.float32)
    taken = (_view(queries), _view(keys), _view(values), _address(first_tokens))
    _library(queries.shape[-1]).forward(_shape(queries), *taken, _view(out), _address(log_sums))
    return out, log_sums


def backward(  # noqa: PLR0917 (as the operator that it serves)
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    first_tokens: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `forward`'s result, what it took and gave -> the gradients of queries, keys and values."""
    grads = tuple(queries.new_empty(queries.shape) for _ in range(3))
    taken = (_view(queries), _view(keys), _view(values), _address(first_tokens), _view(out), _view(grad))
    _library(queries.shape[-1]).backward(_shape(queries), *taken, _address(log_sums), *map(_view, grads))
    return grads[0], grads[1], grads[2]


@functools.cache
def problem(width: int) -> str | None:
    """Why heads of this width cannot be attended to by these kernels here, or None where they can."""
    try:
        _library(width)
    except NativeError as error:
        logging.info(f"bfloat16 attention of heads of {width} runs by torch's kernels: {error}")
        return str(error)
    return None


@functools.cache
def _library(width: int) -> ctypes.CDLL:
    if width > _WIDEST:
        raise NativeError(f"heads are wider than {_WIDEST}")
    library = load("attention.cpp", MATRICES, f"HEAD_WIDTH={width}")
    if library.allow_tiles() != 0:
        raise NativeError("the system does not let processes use the matrix units")
    return library


def _shape(queries: Tensor) -> Any:
    batch, length, heads, width = queries.shape
    return ctypes.byref(_Shape(batch, length, heads, torch.get_num_threads(), width**-0.5))


def _view(x: Tensor) -> Any:
    return ctypes.byref(_View(x.data_ptr(), *x.stride()[:3]))


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
