"""Elementwise bfloat16 CPU kernels compared with float64, and the operators that select them or torch's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels import linear, native
from open_lm.kernels.gating import gated_silu
from open_lm.kernels.native import elements
from open_lm.model.positional_embedding.rotary import rotate_halves, rotate_interleaved

needs_vectors = pytest.mark.skipif(
    not native.processor_features() >= native.VECTORS, reason="this CPU has no AVX-512 with bfloat16"
)
ROUNDING = 2.0**-8  # relative rounding error of bfloat16: half a unit in the last place of its 8-bit significand


@needs_vectors
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 16), (5, 50), (2, 1000)])
def test_log_sum_exp_and_probabilities(rows: int, columns: int) -> None:
    torch.manual_seed(columns)
    logits = (torch.randn(rows, columns) * 10).bfloat16()
    exact = logits.double()
    maxima, log_sums = elements.log_sum_exp(logits)
    assert torch.equal(maxima, logits.float().amax(-1))
    sums = exact.logsumexp(-1)
    torch.testing.assert_close((maxima.double() + log_sums.double()), sums, rtol=0, atol=1e-6)
    factors = torch.randn(rows)
    for given in (factors, None):
        probs = logits.clone()
        elements.to_probs_(probs, sums.float(), given)
        expected = exact.softmax(-1) * (1 if given is None else given[:, None])
        torch.testing.assert_close(probs.double(), expected, rtol=1.01 * ROUNDING + 1e-5, atol=1e-37)


@needs_vectors
def test_log_sum_exp_keeps_small_terms() -> None:
    """One logit is far above all others; its probability is within 1e-6 of 1."""
    logits = torch.full((1, 100), -10.0).bfloat16()
    logits[0, 7] = 5.0
    maxima, log_sums = elements.log_sum_exp(logits)
    assert maxima.item() == 5.0
    assert log_sums.item() == pytest.approx(math.log1p(99 * math.exp(-15)), rel=1e-2)


@needs_vectors
@pytest.mark.parametrize("index", [0, 17, 99])
def test_nan_propagates(index: int) -> None:
    logits = torch.randn(1, 100).bfloat16()
    logits[0, index] = math.nan
    assert elements.log_sum_exp(logits)[1].isnan().all()
    elements.to_probs_(logits, torch.zeros(1), None)
    assert logits.isnan().nonzero().tolist() == [[0, index]]


@needs_vectors
def test_results_are_float32_with_any_default_dtype() -> None:
    logits = torch.randn(70, 30).bfloat16()
    exact = logits.double().logsumexp(-1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        maxima, log_sums = elements.log_sum_exp(logits)
        assert maxima.dtype == log_sums.dtype == torch.float32
        torch.testing.assert_close((maxima + log_sums).double(), exact)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_vectors
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (37, 50), (2, 300)])
def test_transposed_and_add(shape: tuple[int, int]) -> None:
    matrix, addend = torch.randn(shape), torch.randn(shape).bfloat16()
    assert torch.equal(elements.transposed(matrix), matrix.t())
    assert torch.equal(elements.transposed(addend), addend.t())
    assert elements.transposed(matrix).is_contiguous() and elements.transposed(addend).is_contiguous()
    expected = matrix + addend
    elements.add_(matrix, addend)
    assert torch.equal(matrix, expected)


def reference(gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    leaf = gate_up.detach().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    out = F.silu(gate) * up
    return out.detach(), torch.autograd.grad(out, leaf, weights)[0]


@pytest.mark.parametrize("native_kernel", [pytest.param(True, marks=needs_vectors), False])
@pytest.mark.parametrize("shape", [(2, 3, 32), (4, 14), (1, 200)])
def test_gated_silu_in_bfloat16(native_kernel: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if not native_kernel:
        monkeypatch.setattr(elements, "supports", lambda *tensors: False)
    torch.manual_seed(0)
    gate_up = (torch.randn(shape) * 4).bfloat16()
    gate_up.view(-1)[:4] = torch.tensor([-1e38, 200.0, -80.0, 0.0])
    weights = torch.randn(*shape[:-1], shape[-1] // 2).bfloat16()
    leaf = gate_up.clone().requires_grad_()
    out = gated_silu(leaf)
    (grad,) = torch.autograd.grad(out, leaf, weights)
    exact = reference(gate_up.double(), weights.double())
    bound = 1.01 * ROUNDING if native_kernel else 4 * ROUNDING
    for found, expected in zip((out, grad), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=bound + 1e-5, atol=1e-4 if native_kernel else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated_silu_in_float32_and_float64_equals_autograd(dtype: torch.dtype) -> None:
    gate_up, weights = torch.randn(2, 5, 24, dtype=dtype), torch.randn(2, 5, 12, dtype=dtype)
    leaf = gate_up.clone().requires_grad_()
    out = gated_silu(leaf)
    (grad,) = torch.autograd.grad(out, leaf, weights.transpose(0, 1).contiguous().transpose(0, 1))
    expected_out, expected = reference(gate_up, weights)
    assert torch.equal(out, expected_out)
    torch.testing.assert_close(grad, expected)
    torch.library.opcheck(torch.ops.open_lm.cpu_gate, (gate_up,), test_utils=("test_schema", "test_faketensor"))


def test_strided_tensors_and_other_dtypes_use_torch() -> None:
    assert not elements.supports(torch.zeros(4, 4))
    assert not elements.supports(torch.zeros(4, 4).bfloat16().t()[:, :2])
    gate_up = torch.randn(6, 8).bfloat16().t()
    torch.testing.assert_close(
        gated_silu(gate_up), reference(gate_up, torch.zeros(8, 3).bfloat16())[0], atol=0.02, rtol=0.02
    )
    assert gated_silu(torch.zeros(0, 8).bfloat16()).shape == (0, 4)


@needs_vectors
@pytest.mark.parametrize("rotate", [rotate_halves, rotate_interleaved])
@pytest.mark.parametrize(("width", "per_head"), [(2, False), (8, False), (40, True), (64, False)])
def test_rotation(rotate: Callable[..., Tensor], width: int, per_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotate strided views of one projection, and compute the gradient."""
    torch.manual_seed(width)
    x = torch.randn(2, 7, 9, width).bfloat16()[:, :, 3:6].requires_grad_()
    angles = torch.randn((3, width // 2) if per_head else (7, 1, width // 2))
    weights = torch.randn(2, 7, 3, width).bfloat16()
    found = {}
    for native_kernel in (True, False):
        monkeypatch.setattr(elements, "supports_rows", elements.supports_rows if native_kernel else lambda x: False)
        out = rotate(x, angles.cos(), angles.sin(), torch.bfloat16)
        found[native_kernel] = (out, *torch.autograd.grad(out, x, weights))
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, rtol=2 * ROUNDING, atol=1e-5)


@needs_vectors
@pytest.mark.parametrize(("in_features", "out_features"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("autocast", [False, True])
def test_linear_gradients_equal_torch(
    in_features: int, out_features: int, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_MIN_WEIGHTS", 1)
    torch.manual_seed(in_features)
    layer = linear.Linear(in_features, out_features, bias=False)
    x, weights = torch.randn(2, 9, in_features), torch.randn(2, 9, out_features)
    if not autocast:
        layer, x, weights = layer.bfloat16(), x.bfloat16(), weights.bfloat16()
    x.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        return out, *torch.autograd.grad(out, (x, layer.weight), weights.to(out.dtype))

    found = gradients()
    assert "_Linear" in type(found[0].grad_fn).__name__
    monkeypatch.setattr(elements, "supports", lambda *tensors: False)
    for a, b in zip(found, gradients(), strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=2 * ROUNDING, atol=2e-2)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight))


@needs_vectors
def test_linear_accepts_all_inputs_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A one-dimensional input, empty inputs, and float64, which autocast does not convert."""
    monkeypatch.setattr(linear, "_MIN_WEIGHTS", 1)
    layer = linear.Linear(24, 40, bias=False).bfloat16()
    for shape in ((24,), (0, 24), (2, 0, 24)):
        x = torch.randn(shape).bfloat16().requires_grad_()
        out = layer(x)
        gradients = torch.autograd.grad(out, (x, layer.weight), torch.ones_like(out))
        assert [x.shape for x in gradients] == [torch.Size(shape), torch.Size((40, 24))]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(torch.randn(2, 24).double()).dtype == torch.float64


def test_second_derivatives_raise() -> None:
    """Otherwise a sum with other terms would have a wrong second derivative."""
    gate_up = torch.randn(2, 8, requires_grad=True)
    (first,) = torch.autograd.grad((gated_silu(gate_up).sum() + gate_up.square().sum()), gate_up, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
