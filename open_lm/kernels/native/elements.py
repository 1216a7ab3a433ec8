"""What goes on between matrix products in bfloat16 on a CPU with AVX-512, by kernels of our own (elements.cpp).

Torch's operators each read and write their tensors in memory, and between bfloat16 and float32 make copies. Ours do in
one pass what belongs together, in float32 inside.
Legend: N rows, V columns of logits, F width of a gated network, R rows of a matrix, C columns, B batch, T sequence,
H heads, K head width.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor
from torch.nn import Parameter

from open_lm.kernels.native import VECTORS, NativeError, load


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these here: bfloat16, on a CPU, without gaps, and in memory (no fake tensors)."""
    return all(x.is_contiguous() and takes_rows(x) for x in tensors)


def takes_rows(x: Tensor) -> bool:
    """As `takes`, where only the last dimension has to be without gaps."""
    fit = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1
    return fit and type(x) in (Tensor, Parameter) and problem() is None


@functools.cache
def problem() -> str | None:
    """Why these kernels cannot be used here, or None where they can."""
    try:
        _library()
    except NativeError as error:
        logging.info(f"bfloat16 between matrix products runs by torch's operators: {error}")
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    return load("elements.cpp", VECTORS)


def log_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of logits (N,V): its greatest, and the logarithm of the sum of exp(logit - greatest); (N,) float32.

    Their sum is the logarithm of the softmax's denominator; apart, they lose nothing where it is close to a logit.
    """
    peaks, rests = logits.new_empty(2, len(logits), dtype=torch.float32)
    _library().log_sums(_at(logits), *_sizes(logits), _at(peaks), _at(rests), _threads())
    return peaks, rests


def to_shares_(logits: Tensor, sums: Tensor, factors: Tensor | None) -> None:
    """Logits (N,V) become exp(logits - sums) * factors; sums and factors (N,) float32."""
    if factors is not None:
        factors = factors.contiguous()  # gradients of sums are one number, seen many times
    _library().to_shares(_at(logits), *_sizes(logits), _at(sums), _at(factors), _threads())


def gate(both: Tensor) -> Tensor:
    """silu of the first half of both (…,2F) times the second (…,F)."""
    out = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
    _library().gate(_at(both), *_sizes(out), _at(out), _threads())
    return out


def gate_backward(grad: Tensor, both: Tensor) -> Tensor:
    """The gradient (…,2F) of `gate`'s argument from that of its result (…,F)."""
    of_both = torch.empty_like(both)
    _library().gate_backward(_at(grad), _at(both), *_sizes(grad), _at(of_both), _threads())
    return of_both


class _Turn(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 4),
        ("x", ctypes.c_int64 * 3),
        ("angles", ctypes.c_int64 * 3),
        ("sense", ctypes.c_float),
        ("neighbours", ctypes.c_int32),
    ]


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool, neighbours: bool) -> Tensor:
    """x (B,T,H,K), such as `takes_rows` allows, whose pairs of features are turned by angles, or turned back.

    Args:
        cos, sin: of the angles, float32 with equal strides, broadcasting to (B,T,H,K/2).
        neighbours: pairs are (2i, 2i + 1), else (i, i + K/2).
    """
    out = x.new_empty(x.shape)
    angles = cos.expand(*x.shape[:3], cos.shape[-1]).stride()[:3]
    sizes, strides = (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 3)(*x.stride()[:3])
    turn = _Turn(sizes, strides, (ctypes.c_int64 * 3)(*angles), -1.0 if back else 1.0, neighbours)
    _library().turn(ctypes.byref(turn), _at(x), _at(cos), _at(sin), _at(out), _threads())
    return out


def transposed(matrix: Tensor) -> Tensor:
    """The transpose (C,R) of matrix (R,C) float32 or bfloat16, laid out anew: torch's takes several times as long."""
    out = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    library = _library()
    transpose = library.transpose if matrix.dtype == torch.float32 else library.transpose_halves
    transpose(_at(matrix), *_sizes(matrix), _at(out), _threads())
    return out


def add_(total: Tensor, more: Tensor) -> None:
    """total += more, float32 and bfloat16 of the same shape, both without gaps."""
    _library().add(_at(total), _at(more), ctypes.c_int64(total.numel()), _threads())


def _at(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """Rows and columns of x, all but its last dimension taken as one."""
    columns = x.shape[-1]
    return ctypes.c_int64(x.numel() // columns if columns else 0), ctypes.c_int64(columns)


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())
