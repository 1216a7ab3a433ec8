"""muP: the initialization, learning rates and multipliers of each kind of parameter, and equality at the base width."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from open_lm.config.command_line import parse_args
from open_lm.config.sections import ModelConfig, OptimConfig
from open_lm.errors import ConfigError
from open_lm.model.params import Params, create_params
from open_lm.model.transformer import Transformer
from open_lm.optim.build import build_optimizer
from open_lm.optim.schedules import cosine_lr

BASE, RATIO = 32, 4  # the width of the base model, and m of the wide one
LR, WEIGHT_DECAY = 1e-2, 0.1
EXPERTS = {"moe_freq": 2, "moe_num_experts": 4, "moe_capacity_factor": 0.0}
# Architectures at width D; Gemma scales its embeddings by sqrt(D).
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"weight_tying": True},
    "gemma": {"weight_tying": True, "model_norm": "gemma_rms_norm", "apply_qk_norm": True, "norm_position": "both"},
    "biases": {"n_kv_heads": 2, "qkv_bias": True, "attn_out_bias": True, "head_bias": True, "parallel_block": True},
    "experts": EXPERTS,
}
# Ends of names -> by which powers of m the initial std, AdamW's and Muon's learning rate of the wide model differ.
# None: Muon does not update it. The first that fits counts.
EXPECTED: dict[str, tuple[float, float, float | None]] = {
    "tok_embeddings.weight": (0, 0, None),
    "output.weight": (0, 0, None),
    "router.layer.weight": (-1, -1, -1),
    "norm.weight": (0, 0, None),
    "bias": (0, 0, None),
    "": (-0.5, -1, -0.5),
}


def model_of(case: str, width: int, **settings: Any) -> Transformer:
    keys = {**CASES[case], **settings}
    if case == "gemma":
        keys["embedding_scale"] = math.sqrt(width)
    shape = {"n_layers": 2, "n_heads": 4, "vocab_size": 192, "seq_len": 16, "ffn_dim": 4 * width}
    model = Transformer(Params(dim=width, **shape, **keys))
    model.reset_parameters(seed=3)
    return model


def rates(model: Transformer, optimizer: str) -> dict[str, tuple[float, float, bool]]:
    """Return learning rate, weight decay and whether Muon updates it, of each parameter."""
    cfg = OptimConfig(optimizer=optimizer, lr=LR, wd=WEIGHT_DECAY)
    groups = build_optimizer(model, cfg).param_groups
    by_id = {id(p): (g["lr"], g["weight_decay"], g.get("muon", False)) for g in groups for p in g["params"]}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_parameter_changes_with_the_width_as_muP_requires(case: str) -> None:
    settings = {"mup": True, "mup_base_width": BASE}
    base, wide = model_of(case, BASE, **settings), model_of(case, BASE * RATIO, **settings)
    narrow_weights, adamw, muon = dict(base.named_parameters()), rates(wide, "adamw"), rates(wide, "muon")
    for name, parameter in wide.named_parameters():
        std, adamw_power, muon_power = next(powers for end, powers in EXPECTED.items() if name.endswith(end))
        if case == "gemma" and name == "tok_embeddings.weight":  # times sqrt(D)
            std, adamw_power = -0.5, -0.5
        before, after = narrow_weights[name].norm().item(), parameter.norm().item()
        size = math.sqrt(parameter.numel() / narrow_weights[name].numel())
        if parameter.dim() > 1:
            assert after / before / size == pytest.approx(RATIO**std, rel=0.1), name
        else:
            assert torch.equal(parameter.unique(), narrow_weights[name].unique())
        assert adamw[name][0] == pytest.approx(LR * RATIO**adamw_power), name
        orthogonal = muon_power is not None
        assert muon[name][2] == orthogonal
        assert muon[name][0] == pytest.approx(LR * RATIO ** (adamw_power if muon_power is None else muon_power)), name
        for lr, weight_decay, _ in (adamw[name], muon[name]):
            assert lr * weight_decay == pytest.approx(LR * WEIGHT_DECAY), name
    assert wide.layers[0].attention.options.scale == pytest.approx(math.sqrt(BASE / 4) / (BASE * RATIO / 4))
    tied_scale = math.sqrt(RATIO) if case == "gemma" else 1.0
    assert wide.output.multiplier == pytest.approx(tied_scale / RATIO)
    assert base.output.multiplier == 1.0 and base.layers[0].attention.options.scale is None


@pytest.mark.parametrize("case", ["biases", "gemma"])
def test_the_eps_of_adamw_shrinks_with_the_width_like_the_gradients(case: str) -> None:
    ids = torch.randint(192, (16, 17), generator=torch.Generator().manual_seed(2))

    def sizes(width: int) -> dict[str, tuple[float, float]]:
        """Return the root mean square of each gradient after two updates, and the eps of its parameter."""
        model = model_of(case, width, mup=True, mup_base_width=BASE)
        update = build_optimizer(model, OptimConfig(lr=LR, wd=0.0))
        for step in range(3):
            update.zero_grad()
            cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten()).backward()
            if step < 2:
                update.step()
        eps = {id(parameter): group["eps"] for group in update.param_groups for parameter in group["params"]}
        return {
            name: (parameter.grad.square().mean().sqrt().item(), eps[id(parameter)])
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    base, wide = sizes(BASE), sizes(16 * BASE)
    for name, (gradient, eps) in wide.items():
        # No multiplier reduces the gradient of the bias, and few scores are correlated yet.
        if not name.endswith(("output.bias", "q_norm.weight", "k_norm.weight")):
            assert 1 / 5 < (gradient / base[name][0]) / (eps / base[name][1]) < 5, name


def test_the_logits_are_those_of_scaled_hidden_states_and_attention_scores() -> None:
    torch.manual_seed(0)
    model = model_of("biases", BASE * RATIO, mup=True, mup_base_width=BASE, logit_soft_cap=5.0)
    plain = model_of("biases", BASE * RATIO, logit_soft_cap=5.0, attn_scale=math.sqrt(8) / 32)
    with torch.no_grad():
        model.output.bias.normal_()
        plain.load_state_dict(model.state_dict())
        plain.output.weight.mul_(1 / RATIO)
    ids = torch.randint(192, (2, 10))
    assert torch.allclose(model(ids)[0], plain(ids)[0], atol=1e-5)
    assert torch.allclose(model(ids)[1], plain(ids)[1], atol=1e-5), "hidden states are not scaled"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("case", ["gemma", "experts"])
def test_training_at_the_base_width_equals_the_standard_parametrization(case: str, optimizer: str) -> None:
    ids = torch.randint(192, (2, 2, 12), generator=torch.Generator().manual_seed(1))
    results: list[list[Tensor]] = []
    for settings in ({}, {"mup": True, "mup_base_width": BASE}):
        model = model_of(case, BASE, **settings)
        update = build_optimizer(model, OptimConfig(optimizer=optimizer, lr=LR, wd=WEIGHT_DECAY, no_decay_norms=True))
        values = [parameter.detach().clone() for parameter in model.parameters()]
        for batch in ids:
            model(batch)[0].logsumexp(-1).mean().backward()
            update.step()
            update.zero_grad()
        results.append([*values, *model.parameters(), model(ids[0])[0]])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_schedules_keep_the_factors_of_the_learning_rate() -> None:
    model = model_of("plain", BASE * RATIO, mup=True, mup_base_width=BASE)
    optimizer = build_optimizer(model, OptimConfig(lr=LR, wd=WEIGHT_DECAY))
    schedule = cosine_lr(optimizer, LR, warmup_length=4, steps=20)
    for step in (0, 3, 12, 20):
        rate = schedule(step)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate / RATIO]
    assert schedule(3) == LR, "the rate that is logged is that of --lr"


def test_low_rank_adapters_have_the_rates_of_their_inputs() -> None:
    from open_lm.config.adapters import parse_lora
    from open_lm.model.adapters import add_adapters

    model = model_of("plain", BASE * RATIO, mup=True, mup_base_width=BASE)
    add_adapters(model, parse_lora("r=2,targets=attention,dora=true"))
    groups = build_optimizer(model, OptimConfig(lr=LR)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_rate = {group["lr"]: {names[id(p)].rpartition(".")[2] for p in group["params"]} for group in groups}
    assert by_rate == {LR: {"lora_B", "lora_magnitude"}, LR / RATIO: {"lora_A"}}


def test_the_base_model_has_as_many_heads_unless_their_width_is_set() -> None:
    shape = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 8, "seq_len": 8, "mup": True, "mup_base_width": 32}
    assert Params(**shape).parametrization.head_ratio == 2.0
    assert Params(**shape, head_dim=16).parametrization.head_ratio == 1.0
    params = Params(**shape, mup_base_head_dim=4)
    assert params.parametrization.head_ratio == 4.0
    assert replace(params) == params
    assert Params(**{**shape, "mup": False}).parametrization.is_standard


def test_settings_without_a_parametrization_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    shape = {"hidden_dim": 64, "n_layers": 1, "n_heads": 16, "vocab_size": 8, "seq_len": 8}

    def params(keys: dict[str, Any], **flags: Any) -> Params:
        file.write_text(json.dumps({**shape, **keys}))
        return create_params(ModelConfig(model=str(file), **flags))

    with pytest.raises(ConfigError, match="--mup requires --mup-base-width"):
        params({}, mup=True)
    with pytest.raises(ConfigError, match=r"--mup-base-width is 8, less than n_heads 16.*--mup-base-head-dim"):
        params({}, mup=True, mup_base_width=8)
    with pytest.raises(ConfigError, match="mup_base_width is 0, expected at least 1"):
        params({"mup": True, "mup_base_width": 0})
    custom = {"attn_name": "custom_attn", "attn_activation": "relu", "attn_seq_scalar": "max"}
    with pytest.raises(ConfigError, match="--attn-name custom_attn does not support attn_scale"):
        params({**custom, "attn_seq_scalar_alpha": 1.0}, mup=True, mup_base_width=32)
    assert params({"mup": True, "mup_base_width": 32}).parametrization.width_ratio == 2.0  # the file sets it
    with pytest.raises(ConfigError, match="--mup is not supported with --hf-model"):
        parse_args(["--hf-model", "some", "--hf-seq-len", "8", "--mup", "--mup-base-width", "64"])


def test_stored_results_of_models_without_muP_keep_their_key() -> None:
    from open_lm.evaluate.icl.store import stored_facts

    keys = [set(stored_facts(model, "", "")["architecture"]) for model in (
        model_of("plain", BASE), model_of("plain", BASE, mup=True, mup_base_width=BASE // 2)
    )]  # fmt: skip
    assert keys[1] - keys[0] == {"mup", "mup_base_width", "mup_base_head_dim"}
