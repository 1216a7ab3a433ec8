"""Float32 kernels for the evaluation of many short prompts, for CPUs with AVX-512 (evaluation.cpp).

Torch's attention copies and calls matrix products that are too small to be fast; its softmax reads and writes logits in
memory. These kernels keep scores and logits in the cache.
Legend: B batch, T sequence, N tokens, H heads, K head width, R hidden states, C columns of a tile of logits.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from open_lm.kernels.native import VECTORS, NativeError, address, load


def supports(*tensors: Tensor) -> bool:
    """Return whether the kernels accept these tensors: float32 CPU tensors with a contiguous last dimension."""
    return (
        all(
            x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1 and type(x) in (Tensor, Parameter)
            for x in tensors
        )
        and _is_available()
    )


@functools.cache
def _is_available() -> bool:
    try:
        _library()
    except NativeError as error:
        logging.info(f"the evaluation of short prompts uses torch's operators: {error}")
        return False
    return True


@functools.cache
def _library() -> ctypes.CDLL:
    return load("evaluation.cpp", VECTORS)


class _Attention(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 3),
        ("queries", ctypes.c_int64 * 2),
        ("keys", ctypes.c_int64 * 2),
        ("values", ctypes.c_int64 * 2),
    ]


def prefix_attention(queries: Tensor, keys: Tensor, values: Tensor, pieces: np.ndarray, ranges: np.ndarray) -> Tensor:
    """Compute attention within pieces of a sequence, with scores scaled by 1/sqrt(K) -> (N,H,K).

    Args:
        queries: (N,H,K), for which `supports` must hold.
        keys: like the queries.
        values: like the queries.
        pieces: (P,4) int64: first token, the one after the last, and the first and the one after the last of its
            ranges. The pieces cover all tokens.
        ranges: (M,2) int64: first token and the one after the last of earlier tokens that all tokens of a piece see.
    """
    tokens, heads, width = queries.shape
    strides = [(ctypes.c_int64 * 2)(*x.stride()[:2]) for x in (queries, keys, values)]
    spec = _Attention((ctypes.c_int64 * 3)(tokens, heads, width), *strides)
    out, transposed = queries.new_empty(queries.shape), queries.new_zeros(heads * width * tokens + 16)
    _library().prefix_attention(
        ctypes.byref(spec), address(queries), address(keys), address(values), address(transposed),
        ctypes.c_void_p(pieces.ctypes.data), ctypes.c_int64(len(pieces)), ctypes.c_void_p(ranges.ctypes.data),
        address(out), _threads(),
    )  # fmt: skip
    return out


class _Rotation(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 4),
        ("x", ctypes.c_int64 * 3),
        ("angles", ctypes.c_int64 * 3),
    ]


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of features of x (B,T,H,K) by angles -> (B,T,H,K).

    Args:
        x: float32, for which `supports` must hold.
        cos: of the angles, float32, broadcasting to (B,T,H,K/2).
        sin: like cos, with equal strides.
    """
    out = x.new_empty(x.shape)
    angle_strides = cos.expand(*x.shape[:3], cos.shape[-1]).stride()[:3]
    sizes, strides = (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 3)(*x.stride()[:3])
    rotation = _Rotation(sizes, strides, (ctypes.c_int64 * 3)(*angle_strides))
    _library().rotate_halves(ctypes.byref(rotation), address(x), address(cos), address(sin), address(out), _threads())
    return out


class SoftmaxSums:
    """Statistics of the softmax over columns that arrive in tiles.

    Args:
        starts: (R+1,) int64: row r has the targets starts[r] to starts[r + 1] - 1.
        targets: (T,) int64, columns whose logits are kept, row by row.

    Attributes:
        maxima: (R,) float32, the highest logit of each row.
        tokens: (R,) int64, its first column.
        target_logits: (T,) float32.
    """

    def __init__(self, starts: Tensor, targets: Tensor) -> None:
        rows = len(starts) - 1
        self.starts, self.targets = starts, targets
        self.maxima, self.tokens = torch.full((rows,), float("-inf")), torch.zeros(rows, dtype=torch.int64)
        self._sums, self.target_logits = torch.zeros(rows), torch.zeros(len(targets))

    def add(self, logits: Tensor, first: int) -> None:
        """Add a tile of logits (R,C) float32, contiguous, whose first column is `first`."""
        rows, columns = logits.shape
        _library().add_scores(
            address(logits), ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_int64(first),
            address(self.maxima), address(self.tokens), address(self._sums),
            address(self.starts), address(self.targets), address(self.target_logits), _threads(),
        )  # fmt: skip

    @property
    def log_sums(self) -> Tensor:
        """(R,) float32, the logarithm of the softmax's denominator."""
        return self.maxima + self._sums.log()


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())
