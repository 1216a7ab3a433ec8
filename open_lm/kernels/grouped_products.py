"""Multiply each group of rows by its own matrix, as the experts of a mixture do with any number of tokens.

On Hopper and datacenter Blackwell, in bfloat16, one kernel computes all groups (torch.nn.functional.grouped_mm), and
the host does not need their sizes. Elsewhere the products run sequentially, with the same result up to rounding.
Legend: n rows, E groups, D and F widths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT_BYTES = 16  # the kernel requires this alignment of every row
_CAPABILITIES = (9, 10)  # major compute capabilities with the kernel; on others torch loops, and waits for the device
# The public name came with torch 2.10. The kernel of versions before 2.9 hangs on gradients of groups without rows
# (https://github.com/pytorch/pytorch/pull/157903).
_grouped_mm: Any = getattr(F, "grouped_mm", None)


class RowGroups:
    """Consecutive groups of rows, by the number of rows of each.

    Args:
        counts: the number of rows of each group (E,) int64, on the device.
    """

    def __init__(self, counts: Tensor) -> None:
        self._counts = counts
        self._ends: Tensor | None = None
        self._sizes: list[int] | None = None

    @property
    def are_empty(self) -> Tensor:
        """Which groups have no rows, (E,) bool."""
        return self._counts == 0

    @property
    def ends(self) -> Tensor:
        """The index after the last row of each group, (E,) int32."""
        if self._ends is None:
            self._ends = self._counts.cumsum(0, dtype=torch.int32)
        return self._ends

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each group. Waits for the device at the first access."""
        if self._sizes is None:
            self._sizes = self._counts.tolist()
        return self._sizes


def grouped_product(rows: Tensor, matrices: Tensor, groups: RowGroups) -> Tensor:
    """Multiply the rows of group e by matrix e: rows (n,D), matrices (E,D,F) -> (n,F).

    With autocast, both operands are cast to its dtype. Differentiable.
    """
    device_type = rows.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        rows, matrices = rows.to(dtype), matrices.to(dtype)
    if not len(rows):
        return rows @ matrices[0]  # gives all matrices a gradient, of zeros
    if has_grouped_kernel(rows, matrices):
        return _grouped_mm(rows, _UsedMatrices.apply(matrices, groups.are_empty), offs=groups.ends)
    pairs = zip(rows.split(groups.sizes), matrices.unbind(), strict=True)
    return torch.cat([group @ matrix for group, matrix in pairs if len(group)])


class _UsedMatrices(torch.autograd.Function):
    """The identity of matrices (E,D,F), whose backward pass sets the gradients of unused ones to 0.

    On Blackwell the kernel leaves those of groups without rows undefined
    (https://github.com/pytorch/pytorch/issues/172439).
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, are_unused: Tensor) -> Tensor:
        ctx.save_for_backward(are_unused)
        return matrices.view_as(matrices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (are_unused,) = ctx.saved_tensors
        return grads[0].masked_fill(are_unused[:, None, None], 0.0), None


def has_grouped_kernel(rows: Tensor, matrices: Tensor) -> bool:
    """Return whether one kernel can compute the grouped product of these operands."""
    if _grouped_mm is None or rows.device.type != "cuda" or torch.version.hip is not None:
        return False
    if not rows.dtype == matrices.dtype == torch.bfloat16:
        return False
    if any(width * rows.element_size() % _ALIGNMENT_BYTES for width in matrices.shape[1:]):
        return False
    return torch.cuda.get_device_capability(rows.device)[0] in _CAPABILITIES
