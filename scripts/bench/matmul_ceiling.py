"""Measure the matrix-product rate of the machine: at the shapes of a model's linear layers, and for a large square.

Legend: N tokens.
"""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import Tensor, nn

SQUARE = {"cpu": 4096, "cuda": 8192}
_MAX_SECONDS, _MAX_REPEATS = 0.5, 100  # each product is repeated until one of them is reached; the fastest counts


def linear_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """Return the number of linear layers of the model by (inputs, outputs)."""
    return Counter((m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear))


def layer_flops(shapes: Counter[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of all linear layers together.

    Each layer counts with its forward product and the two of its backward pass, in the memory layouts of
    torch.nn.functional.linear.
    """
    flops = seconds = 0.0
    for (inputs, outputs), count in shapes.items():
        x, weight = _matrix(tokens, inputs, dtype, device), _matrix(outputs, inputs, dtype, device)
        gradient = _matrix(tokens, outputs, dtype, device)
        products = ((x, weight.t()), (gradient, weight), (gradient.t(), x))
        seconds += count * sum(_fastest_product_s(left, right) for left, right in products)
        flops += count * 6.0 * tokens * inputs * outputs
    return flops / seconds


def square_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of the product of two large square matrices."""
    size = SQUARE.get(device.type, 4096)
    left, right = (_matrix(size, size, dtype, device) for _ in range(2))
    return 2.0 * size**3 / _fastest_product_s(left, right)


def _matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix whose rows are all the same random numbers: generating all would take longer than the product."""
    return (torch.rand(columns, device=device) - 0.5).to(dtype).expand(rows, columns).contiguous()


def _fastest_product_s(left: Tensor, right: Tensor) -> float:
    """Return the seconds of the fastest of several products."""
    out = torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    is_cuda = left.device.type == "cuda"
    if is_cuda:
        torch.mm(left, right, out=out)  # the first call selects a kernel
    begin_s, times = time.perf_counter(), list[float]()
    while not times or (len(times) < _MAX_REPEATS and time.perf_counter() - begin_s < _MAX_SECONDS):
        if is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
