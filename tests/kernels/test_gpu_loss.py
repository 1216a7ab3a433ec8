"""The chunked loss of a linear head on CUDA compared with the loss of all logits on the CPU."""

from __future__ import annotations

import pytest
import torch
from test_linear_loss import Z, chunked, inputs, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z", [0.0, Z])
def test_loss_and_gradients_equal_the_cpu(dtype: torch.dtype, z: float) -> None:
    """With three chunks, and tokens without a target."""
    hidden, weight, targets = inputs(5000, 1003, 64)
    expected = reference(hidden, weight, targets, z)
    expected_grads = torch.autograd.grad(expected.sum(), (hidden, weight))
    on_gpu = [x.detach().cuda().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = chunked(*on_gpu, targets.cuda(), z, per_token=True)
        total = chunked(*on_gpu, targets.cuda(), z)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for result, exact in zip((found, *torch.autograd.grad(total, on_gpu)), (expected, *expected_grads), strict=True):
        assert ((result.cpu() - exact).norm() / exact.norm()).item() < tolerance


def test_no_synchronization() -> None:
    hidden, weight, targets = (x.detach().cuda() for x in inputs())
    hidden.requires_grad_()
    chunked(hidden, weight, targets).backward()  # the first call may load libraries and wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunked(hidden, weight, targets, Z).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = torch.autograd.grad(
        (reference(hidden, weight, targets) + reference(hidden, weight, targets, Z)).sum(), hidden
    )
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-4, atol=1e-4)


def test_small_float16_gradients_are_preserved() -> None:
    """Gradients of improbable tokens consist of probabilities of 1e-6, close to the underflow of float16."""
    hidden, weight, targets = inputs(64, 5000, 16)
    with torch.no_grad():
        weight[5:] *= 0.01
        hidden[:, 0], weight[:5, 0] = 10.0, 1.0
    targets = targets % 5
    (expected,) = torch.autograd.grad(reference(hidden, weight, targets).sum(), weight)
    on_gpu = [x.detach().cuda().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cuda", torch.float16):
        (found,) = torch.autograd.grad(chunked(*on_gpu, targets.cuda()), on_gpu[1])
    assert ((found.cpu() - expected)[5:].norm() / expected[5:].norm()).item() < 1e-2
