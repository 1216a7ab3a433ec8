"""The loss of a linear head on CUDA: that of all logits on the CPU."""

from __future__ import annotations

import pytest
import torch
from test_linear_loss import Z, chunked, inputs, plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z", [0.0, Z])
def test_loss_and_gradients_are_those_of_the_cpu(dtype: torch.dtype, z: float) -> None:
    """Over three chunks, with tokens that have no target."""
    hidden, weight, targets = inputs(5000, 1003, 64)
    expected = plain(hidden, weight, targets, z)
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    on_gpu = [x.detach().cuda().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = chunked(*on_gpu, targets.cuda(), z, per_token=True)
        total = chunked(*on_gpu, targets.cuda(), z)
    near = 1e-4 if dtype == torch.float32 else 2e-2
    for result, true in zip((found, *torch.autograd.grad(total, on_gpu)), (expected, *wanted), strict=True):
        assert ((result.cpu() - true).norm() / true.norm()).item() < near


def test_nothing_waits_for_the_device() -> None:
    hidden, weight, targets = (x.detach().cuda() for x in inputs())
    hidden.requires_grad_()
    chunked(hidden, weight, targets).backward()  # what is loaded by the first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunked(hidden, weight, targets, Z).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = torch.autograd.grad((plain(hidden, weight, targets) + plain(hidden, weight, targets, Z)).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-4, atol=1e-4)


def test_small_float16_gradients_are_kept() -> None:
    """Probabilities of 1e-6 are near what float16 holds; the gradient of what nobody expects is made of them alone."""
    hidden, weight, targets = inputs(64, 5000, 16)
    with torch.no_grad():
        weight[5:] *= 0.01
        hidden[:, 0], weight[:5, 0] = 10.0, 1.0
    targets = targets % 5
    (wanted,) = torch.autograd.grad(plain(hidden, weight, targets).sum(), weight)
    on_gpu = [x.detach().cuda().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cuda", torch.float16):
        (found,) = torch.autograd.grad(chunked(*on_gpu, targets.cuda()), on_gpu[1])
    assert ((found.cpu() - wanted)[5:].norm() / wanted[5:].norm()).item() < 1e-2
