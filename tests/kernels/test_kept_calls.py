"""Selective activation checkpointing does not repeat the calls of `keep_result`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from open_lm.kernels.kept_calls import keep_result
from open_lm.model.recomputation import with_recomputation


@pytest.mark.parametrize(("policy", "num_calls"), [("op", 2), ("full", 4)])
def test_kept_calls_run_once_and_give_the_same_gradients(policy: str, num_calls: int) -> None:
    calls = []
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        calls.append(x)
        return torch.tanh(x * y).cumsum(-1)

    def block(x: Tensor) -> Tensor:
        first = keep_result(kernel, (x @ weight).sin(), x)
        return keep_result(kernel, first.cos(), first) @ weight

    results = []
    for function in (block, with_recomputation(block, policy)):
        calls.clear()
        x = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
        out = function(x)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))])
    assert len(calls) == num_calls  # of the checkpointed block
    for found, exact in zip(*results, strict=True):
        assert torch.equal(found, exact)


def test_operators_of_a_kept_call_are_not_those_of_the_policy() -> None:
    """The policy saves matrix products by their order, and the recomputation does not repeat those of a kept call."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def block(x: Tensor) -> Tensor:
        kept = keep_result(lambda y: (y.sin() @ y).sin(), x)
        return ((kept + x).cos() @ weight).exp()

    gradients = []
    for function in (block, with_recomputation(block, "op")):
        x = torch.linspace(-1, 1, 64).view(8, 8).requires_grad_()
        gradients.append(torch.autograd.grad(function(x).sum(), (x, weight)))
    for found, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(found, exact)  # sums of gradients in another order


def test_inputs_without_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    function = with_recomputation(lambda x: keep_result(torch.mul, weight * 2, x).exp(), "op")
    (gradient,) = torch.autograd.grad(function(torch.ones(3)).sum(), weight)
    torch.testing.assert_close(gradient, torch.full((3,), 2 * 2.718281828**2))
