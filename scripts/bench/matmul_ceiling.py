"""How fast the machine multiplies matrices: at the shapes of a model's own linear layers, and at a large square.

Legend: N tokens.
"""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import Tensor, nn

SQUARE = {"cpu": 4096, "cuda": 8192}
_SECONDS, _TIMES = 0.5, 100  # that each product is repeated for, once at least, and at most; the fastest counts


def linear_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """How many linear layers of (inputs, outputs) the model has."""
    return Counter((m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear))


def own_flops(shapes: Counter[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of all linear layers together, each with its forward product and the two of its backward pass, laid out as
    torch.nn.functional.linear has them."""
    flops = seconds = 0.0
    for (inputs, outputs), count in shapes.items():
        x, weight = _matrix(tokens, inputs, dtype, device), _matrix(outputs, inputs, dtype, device)
        gradient = _matrix(tokens, outputs, dtype, device)
        products = ((x, weight.t()), (gradient, weight), (gradient.t(), x))
        seconds += count * sum(_fastest(left, right) for left, right in products)
        flops += count * 6.0 * tokens * inputs * outputs
    return flops / seconds


def square_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product."""
    size = SQUARE.get(device.type, 4096)
    left, right = (_matrix(size, size, dtype, device) for _ in range(2))
    return 2.0 * size**3 / _fastest(left, right)


def _matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers, the same in each row: to draw them all would take longer than the products."""
    return (torch.rand(columns, device=device) - 0.5).to(dtype).expand(rows, columns).contiguous()


def _fastest(left: Tensor, right: Tensor) -> float:
    """Seconds of the fastest of several products."""
    out = torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    is_cuda = left.device.type == "cuda"
    if is_cuda:
        torch.mm(left, right, out=out)  # the first chooses a kernel
    begin, times = time.perf_counter(), list[float]()
    while not times or (len(times) < _TIMES and time.perf_counter() - begin < _SECONDS):
        if is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
