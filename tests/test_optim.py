"""The optimizer, clipping and precision."""

from __future__ import annotations

import pytest
import torch

from open_lm.config import OptimConfig
from open_lm.errors import ConfigError
from open_lm.optim import build_optimizer, clip_gradients
from open_lm.precision import build_scaler, compute_dtype, get_autocast, parameter_dtype


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 7))


def test_weight_decay_reaches_every_parameter() -> None:
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, wd=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.allclose(p, old * (1 - 0.1 * 0.5))


def test_adamw_is_torchs_with_the_flags_values() -> None:
    ours, reference = small_model(), small_model()
    cfg = OptimConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, wd=0.3)
    optimizers = [
        build_optimizer(ours, cfg),
        torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3),
    ]
    ids = torch.arange(7)
    for _ in range(3):
        for model, optimizer in zip((ours, reference), optimizers, strict=True):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_frozen_parameters_are_left_out() -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    optimizer = build_optimizer(model, OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_unknown_optimizer_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="found 'lion', expected one of adamw"):
        build_optimizer(small_model(), OptimConfig(optimizer="lion"))


@pytest.mark.parametrize("max_norm", [None, 0.01, 1e6])
def test_clipping_returns_the_norm_before(max_norm: float | None) -> None:
    model = small_model()
    model(torch.arange(7)).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()  # type: ignore[union-attr]
    norm = clip_gradients(model.parameters(), max_norm)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()  # type: ignore[union-attr]
    assert after == pytest.approx(min(expected.item(), max_norm or 1e9), rel=1e-3)


def test_precisions_name_types() -> None:
    assert parameter_dtype("amp_bfloat16") == torch.float32
    assert parameter_dtype("bf16") == torch.bfloat16 and parameter_dtype("fp16") == torch.float16
    assert compute_dtype("amp", "cpu") == torch.bfloat16 and compute_dtype("amp", "cuda") == torch.float16
    assert build_scaler("amp", torch.device("cpu")) is None
    with get_autocast("amp_bf16", "cpu")():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with get_autocast("fp32", "cpu")():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(ConfigError, match="--precision"):
        get_autocast("int8")
