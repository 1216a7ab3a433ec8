"""Matrix products of the losses, whose results may be wider than their factors.

Legend: R tokens of a chunk, D model width, V rows of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from open_lm.kernels.native import elements

_CAST_ROWS = 2048  # rows of a weight gradient whose float32 copy stays in the cache while it is added


def matmul_into(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a @ b to out, which may be float32 if `supports_float32_output`."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_matmul_(total: Tensor, a: Tensor, b: Tensor, product_buffer: Tensor | None) -> None:
    """Add a @ b to total. product_buffer has the shape of total and the dtype of a; it is needed if total is wider and
    the device does not support float32 output."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif product_buffer is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif elements.supports(torch.mm(a, b, out=product_buffer)):
        elements.add_(total, product_buffer)
    else:
        for target, product in zip(total.split(_CAST_ROWS), product_buffer.split(_CAST_ROWS), strict=True):
            target.add_(product)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def supports_float32_output(device: torch.device) -> bool:
    """Return whether half-precision products can be accumulated in a float32 output: CUDA with torch 2.10 or newer."""
    return device.type == "cuda" and torch.torch_version.TorchVersion(torch.__version__) >= "2.10"
