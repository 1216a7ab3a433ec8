"""Causal softmax attention in bfloat16 for CPUs with matrix units (Intel AMX).

Torch's kernels convert and copy between many small products. These kernels (attention.cpp) keep the scores in the
first-level cache from the first product to the last, and skip keys outside of a document. The machine's C++ compiler
compiles them at first use, one library per head width.
Legend: B batch, T sequence, H heads, K head width.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor

from open_lm.kernels.native import MATRICES, NativeError, address, load

_MAX_HEAD_WIDTH = 256  # wider heads do not fit the first-level cache, and torch's kernels are as fast


class _View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),  # of batch, tokens and heads
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 3),  # batch, length, heads
        ("threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


def supports(queries: Tensor) -> bool:
    """Return whether the kernels can run on this machine with these queries (B,T,H,K)."""
    return queries.dtype == torch.bfloat16 and queries.numel() > 0 and problem(queries.shape[-1]) is None


def forward(queries: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute causal attention within documents, with scores scaled by 1/sqrt(K).

    Args:
        queries: (B,T,H,K) bfloat16 with a contiguous last dimension.
        keys: like the queries.
        values: like the queries.
        document_starts: (B,T) int32, the index at which each token's document begins; None if each sequence is one
            document.

    Returns:
        (B,T,H,K) bfloat16, and the natural logarithms (B,H,T) float32 of the softmax's sums. The results are
        bit-identical in every run and with any number of threads.
    """
    batch, length, heads, _ = queries.shape
    out = queries.new_empty(queries.shape)
    log_sums = queries.new_empty(batch, heads, length, dtype=torch.float32)
    operands = (_view(queries), _view(keys), _view(values), address(document_starts))
    _library(queries.shape[-1]).forward(_shape(queries), *operands, _view(out), address(log_sums))
    return out, log_sums


def backward(  # noqa: PLR0917 (the order of the operator)
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    document_starts: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, from the gradient of the result of `forward`, its arguments and
    its results."""
    grads = tuple(queries.new_empty(queries.shape) for _ in range(3))
    operands = (_view(queries), _view(keys), _view(values), address(document_starts), _view(out), _view(grad))
    _library(queries.shape[-1]).backward(_shape(queries), *operands, address(log_sums), *map(_view, grads))
    return grads[0], grads[1], grads[2]


@functools.cache
def problem(width: int) -> str | None:
    """Return why the kernels cannot be used for this head width on this machine, or None if they can."""
    try:
        _library(width)
    except NativeError as error:
        logging.info(f"bfloat16 attention with head width {width} uses torch's kernels: {error}")
        return str(error)
    return None


@functools.cache
def _library(width: int) -> ctypes.CDLL:
    if width > _MAX_HEAD_WIDTH:
        raise NativeError(f"the head width is {width}, expected at most {_MAX_HEAD_WIDTH}")
    library = load("attention.cpp", MATRICES, f"HEAD_WIDTH={width}")
    if library.request_tiles() != 0:
        raise NativeError("the operating system does not permit the use of the matrix units")
    return library


def _shape(queries: Tensor) -> Any:
    *sizes, width = queries.shape
    return ctypes.byref(_Shape((ctypes.c_int64 * 3)(*sizes), torch.get_num_threads(), width**-0.5))


def _view(x: Tensor) -> Any:
    return ctypes.byref(_View(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3])))
