"""Fused elementwise bfloat16 kernels for CPUs with AVX-512 (elements.cpp).

Torch's operators each read and write their tensors in memory, and copy when they convert between bfloat16 and float32.
These kernels fuse such chains into one pass and compute in float32.
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

from open_lm.kernels.native import VECTORS, NativeError, address, load


def supports(*tensors: Tensor) -> bool:
    """Return whether the kernels accept these tensors: contiguous bfloat16 CPU tensors that are not fake tensors."""
    return all(x.is_contiguous() and supports_rows(x) for x in tensors)


def supports_rows(x: Tensor) -> bool:
    """Return whether the kernels that only need a contiguous last dimension accept x; otherwise as `supports`."""
    is_suitable = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1
    return is_suitable and type(x) in (Tensor, Parameter) and problem() is None


@functools.cache
def problem() -> str | None:
    """Return why these kernels cannot be used on this machine, or None if they can."""
    try:
        _library()
    except NativeError as error:
        logging.info(f"bfloat16 elementwise operations use torch's operators: {error}")
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    return load("elements.cpp", VECTORS)


def log_sum_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of each row of logits (N,V), and the logarithm of the sum of exp(logit - maximum).

    Both are (N,) float32. Their sum is the logarithm of the softmax's denominator; returned separately they lose no
    precision if the denominator is dominated by one logit.
    """
    maxima, log_sums = logits.new_empty(2, len(logits), dtype=torch.float32)
    _library().log_sum_exp(address(logits), *_sizes(logits), address(maxima), address(log_sums), _threads())
    return maxima, log_sums


def to_probs_(logits: Tensor, log_sums: Tensor, factors: Tensor | None) -> None:
    """Replace logits (N,V) by exp(logits - log_sums) * factors; log_sums and factors (N,) float32."""
    if factors is not None:
        factors = factors.contiguous()  # the gradient of a sum is one number, expanded
    _library().to_probs(address(logits), *_sizes(logits), address(log_sums), address(factors), _threads())


def gate(gate_up: Tensor) -> Tensor:
    """Return silu(first half) * second half of gate_up (…,2F) -> (…,F)."""
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _library().gate(address(gate_up), *_sizes(out), address(out), _threads())
    return out


def gate_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient (…,2F) of the argument of `gate`, from the gradient (…,F) of its result."""
    gate_up_grad = torch.empty_like(gate_up)
    _library().gate_backward(address(grad), address(gate_up), *_sizes(grad), address(gate_up_grad), _threads())
    return gate_up_grad


class _Rotation(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 4),
        ("x", ctypes.c_int64 * 3),
        ("angles", ctypes.c_int64 * 3),
        ("direction", ctypes.c_float),
        ("interleaved", ctypes.c_int32),
    ]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool, interleaved: bool) -> Tensor:
    """Rotate pairs of features of x (B,T,H,K), for which `supports_rows` must hold.

    Args:
        x: bfloat16.
        cos: of the angles, float32, broadcasting to (B,T,H,K/2).
        sin: like cos, with equal strides.
        inverse: rotate in the opposite direction.
        interleaved: pairs are (2i, 2i + 1), else (i, i + K/2).
    """
    out = x.new_empty(x.shape)
    angle_strides = cos.expand(*x.shape[:3], cos.shape[-1]).stride()[:3]
    sizes, strides = (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 3)(*x.stride()[:3])
    rotation = _Rotation(sizes, strides, (ctypes.c_int64 * 3)(*angle_strides), -1.0 if inverse else 1.0, interleaved)
    _library().rotate(ctypes.byref(rotation), address(x), address(cos), address(sin), address(out), _threads())
    return out


def transposed(matrix: Tensor) -> Tensor:
    """Return a contiguous transpose (C,R) of matrix (R,C) float32 or bfloat16, several times as fast as torch's."""
    out = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    library = _library()
    transpose = library.transpose if matrix.dtype == torch.float32 else library.transpose_bfloat16
    transpose(address(matrix), *_sizes(matrix), address(out), _threads())
    return out


def add_(total: Tensor, addend: Tensor) -> None:
    """Compute total += addend, float32 and bfloat16 of the same shape, both contiguous."""
    _library().add(address(total), address(addend), ctypes.c_int64(total.numel()), _threads())


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """Return the number of rows and columns of x with all dimensions except the last flattened."""
    columns = x.shape[-1]
    return ctypes.c_int64(x.numel() // columns if columns else 0), ctypes.c_int64(columns)


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())
