"""Products of groups of rows compared with one product per group."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from open_lm.kernels import grouped_products
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


def test_a_kernel_that_leaves_gradients_of_empty_groups_undefined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of some devices does; this one computes the products sequentially."""
    rows, matrices, groups = operands("cpu", torch.float32)

    def kernel(rows: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
        assert offs.tolist() == [5, 5, 13, 16] and offs.dtype == torch.int32
        is_empty = torch.tensor(COUNTS) == 0
        matrices.register_hook(lambda gradient: gradient.masked_fill(is_empty[:, None, None], torch.nan))
        return torch.cat([group @ matrix for group, matrix in zip(rows.split(COUNTS), matrices, strict=True)])

    monkeypatch.setattr(grouped_products, "has_grouped_kernel", lambda rows, matrices: True)
    monkeypatch.setattr(grouped_products, "_grouped_mm", kernel)
    check(rows, matrices, groups, 1e-5)


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_devices_with_the_kernel(capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, element_size=lambda: 2)
    matrices: Any = SimpleNamespace(dtype=torch.bfloat16, shape=(4, 24, 40))
    assert has_grouped_kernel(rows, matrices) == expected
    matrices.shape = (4, 24, 36)  # rows of the result would not be aligned
    assert not has_grouped_kernel(rows, matrices)


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
