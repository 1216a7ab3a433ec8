"""Products of groups of rows compared with one product per group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from open_lm.kernels.grouped_products import RowGroups, grouped_product, has_grouped_kernel

COUNTS = (5, 0, 8, 3)


def operands(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, RowGroups]:
    """Return rows (16,24), matrices (4,24,40) and the groups of COUNTS."""
    generator = torch.Generator().manual_seed(0)
    rows, matrices = (torch.randn(shape, generator=generator) for shape in ((sum(COUNTS), 24), (4, 24, 40)))
    groups = RowGroups(torch.tensor(COUNTS, device=device))
    return rows.to(device, dtype).requires_grad_(), matrices.to(device, dtype).requires_grad_(), groups


def check(rows: Tensor, matrices: Tensor, groups: RowGroups, tolerance: float) -> None:
    """Compare the product and its gradients with float64 products of each row and its matrix."""
    group_of_row = torch.arange(4, device=rows.device).repeat_interleave(torch.tensor(COUNTS, device=rows.device))
    exact_rows, exact_matrices = (x.detach().double().requires_grad_() for x in (rows, matrices))
    expected = torch.einsum("nd,ndf->nf", exact_rows, exact_matrices[group_of_row])
    out = grouped_product(rows, matrices, groups)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    out.backward(gradient.to(out.dtype))
    expected.backward(gradient.to(out.dtype).double())
    for actual, exact in ((out, expected), (rows.grad, exact_rows.grad), (matrices.grad, exact_matrices.grad)):
        torch.testing.assert_close(actual.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    check(*operands("cpu", dtype), tolerance)


def test_no_rows_give_gradients_of_zeros() -> None:
    rows, matrices = torch.empty(0, 24), torch.ones(4, 24, 40, requires_grad=True)
    out = grouped_product(rows, matrices, RowGroups(torch.zeros(4, dtype=torch.int64)))
    assert out.shape == (0, 40)
    out.sum().backward()
    assert matrices.grad is not None and matrices.grad.abs().sum() == 0


def test_autocast_casts_both_operands() -> None:
    rows, matrices, groups = operands("cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_product(rows, matrices, groups).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_cuda() -> None:
    rows, matrices, groups = operands("cuda", torch.bfloat16)
    if not has_grouped_kernel(rows, matrices):
        pytest.skip("this device or torch has no grouped kernel")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = grouped_product(rows, matrices, groups)
        out.backward(torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows.grad = matrices.grad = None
    check(rows, matrices, groups, 2e-2)
