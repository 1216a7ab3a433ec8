"""Mixtures of experts compared with a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_helpers import random_ids, small_model
from torch import Tensor

from open_lm.errors import ConfigError
from open_lm.model.losses import token_loss
from open_lm.model.mixture_of_experts import Experts, MixtureOfExperts
from open_lm.model.transformer import Params


def mixture(top_k: int, capacity_factor: float, num_experts: int = 4) -> MixtureOfExperts:
    torch.manual_seed(top_k)
    module = MixtureOfExperts(8, Experts(num_experts, 8, 32), top_k, capacity_factor)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def reference(module: MixtureOfExperts, x: Tensor, capacity: int | None) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    scores = (tokens @ module.router.layer.weight.t()).softmax(-1)
    chosen = scores.argsort(dim=-1, descending=True)[:, : module.top_k]
    counts = [0] * module.num_experts
    out = torch.zeros_like(tokens)
    for choice in range(module.top_k):
        for token in range(len(tokens)):
            expert = int(chosen[token, choice])
            if capacity is not None and counts[expert] >= capacity:
                continue
            counts[expert] += 1
            hidden = F.gelu(tokens[token] @ module.experts.mlp.w1[expert], approximate="tanh")
            out[token] += scores[token, expert] * (hidden @ module.experts.mlp.w2[expert])
    return out.view_as(x)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("capacity_factor", [0.3, 1.25, 0.0])
def test_training_respects_the_capacity(top_k: int, capacity_factor: float) -> None:
    module, x = mixture(top_k, capacity_factor).train(), torch.randn(3, 7, 8)
    capacity = int(capacity_factor * top_k * 21 / 4) if capacity_factor else None
    torch.testing.assert_close(module(x), reference(module, x, capacity), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_evaluation_drops_no_tokens(top_k: int) -> None:
    module, x = mixture(top_k, 0.3).eval(), torch.randn(3, 7, 8)
    torch.testing.assert_close(module(x), reference(module, x, None), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(x)[1:2, 2:], module(x[1:2, 2:]), atol=1e-6, rtol=1e-5)
    assert module.balancing_loss is None


def test_balancing_loss() -> None:
    module, x = mixture(2, 1.25).train(), torch.randn(2, 9, 8)
    module(x)
    scores = (x.reshape(-1, 8) @ module.router.layer.weight.t()).softmax(-1)
    counts = torch.bincount(scores.topk(2).indices.flatten(), minlength=4)
    expected = 4 * sum(counts[e] / 36 * scores[:, e].mean() for e in range(4))
    assert module.balancing_loss is not None
    torch.testing.assert_close(module.balancing_loss, expected)
    (gradient,) = torch.autograd.grad(module.balancing_loss, module.router.layer.weight)
    assert gradient.abs().sum() > 0


def test_balancing_loss_of_a_uniform_router_is_one() -> None:
    module = mixture(1, 1.25)
    with torch.no_grad():
        module.router.layer.weight.zero_()
    module.train()(torch.randn(2, 5, 8))
    assert module.balancing_loss is not None and module.balancing_loss.item() == pytest.approx(1.0)


def test_every_kth_block_has_experts_with_the_names_of_checkpoints() -> None:
    model = small_model(n_layers=4, moe_freq=2, moe_num_experts=3)
    has_experts = [isinstance(block.feed_forward, MixtureOfExperts) for block in model.layers]
    assert has_experts == [True, False, True, False]
    names = {name for name in model.state_dict() if name.startswith("layers.2.feed_forward.")}
    suffixes = {"router.layer.weight", "experts.mlp.w1", "experts.mlp.w2"}
    assert names == {f"layers.2.feed_forward.{suffix}" for suffix in suffixes}
    assert model.state_dict()["layers.2.feed_forward.experts.mlp.w1"].shape == (3, 32, 128)


def test_unused_bias_of_older_checkpoints_is_ignored() -> None:
    model = small_model(moe_freq=1, moe_num_experts=2)
    state = {**model.state_dict(), "layers.0.feed_forward.experts.bias": torch.zeros(32)}
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_auxiliary_loss_trains_the_router(recompute: bool) -> None:
    model = small_model(moe_freq=1, moe_num_experts=4, moe_loss_weight=0.5).train()
    model.set_grad_checkpointing(recompute)
    ids = random_ids(2, 12)
    assert model.auxiliary_loss() is None
    loss, count = token_loss(model(ids[:, :-1])[0], ids[:, 1:])
    auxiliary = model.auxiliary_loss()
    assert auxiliary is not None
    balancing_losses = [block.feed_forward.balancing_loss.item() for block in model.layers]
    assert auxiliary.item() == pytest.approx(0.5 * sum(balancing_losses) / len(balancing_losses))
    (loss / count + auxiliary).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    plain = small_model(moe_freq=1, moe_num_experts=4, moe_loss_weight=0.5).train()
    loss, count = token_loss(plain(ids[:, :-1])[0], ids[:, 1:])
    (loss / count + plain.auxiliary_loss()).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_dense_models_have_no_auxiliary_loss() -> None:
    model = small_model().train()
    model(random_ids(1, 4))
    assert model.auxiliary_loss() is None


def test_half_precision_runs() -> None:
    model, ids = small_model(moe_freq=1, moe_num_experts=4), random_ids(2, 6)
    for training in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.train(training)(ids)[0].isfinite().all()
    assert model.bfloat16().train()(ids)[0].isfinite().all()
    assert model.eval()(ids)[0].isfinite().all()


def test_number_of_experts_is_required() -> None:
    with pytest.raises(ConfigError, match="--moe-num-experts is None"):
        Params(moe_freq=2)
