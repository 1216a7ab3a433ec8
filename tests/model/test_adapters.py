"""Low-rank adapters of native models: frozen base, exact start, merged weights, 4-bit weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_helpers import random_ids, small_model

from open_lm.checkpoint.adapters import AdapterRecord, merged_weights, weights_sha256
from open_lm.config.adapters import LoraSettings, parse_lora
from open_lm.errors import CheckpointError, ConfigError
from open_lm.model.adapters import Adapter, adapters, add_adapters, target_layers
from open_lm.model.losses import TokenLoss
from open_lm.model.quantization import dequantize, quantize_layer, quantized_layers
from open_lm.monitor.metrics import model_flops_per_token

SHAPES: dict[str, dict[str, Any]] = {
    "fused": {},
    "grouped": {"n_kv_heads": 2, "qkv_bias": True},
    "gelu": {"ffn_type": "gelu", "weight_tying": True},
    "separate": {"ffn_type": "gemma_geglu"},
}
KINDS = ("r=4", "r=4,alpha=3,rslora=true", "r=2,dora=true")


def adapted(model: Any, text: str, targets: str = "all-linear", trained: bool = True, quantize: bool = False) -> Any:
    """Return a copy with adapters, which compute something if `trained`."""
    changed = copy.deepcopy(model)
    add_adapters(changed, parse_lora(f"{text},targets={targets}"), seed=3, quantize=quantize)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for _, layer in adapters(changed):
            layer.adapter.lora_B.data.normal_(0, 0.2, generator=generator)
            if layer.adapter.settings.dora:
                layer.adapter.lora_magnitude.data.mul_(1.3)
    return changed


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".adapter." in name}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", KINDS)
def test_new_adapters_do_not_change_the_model_and_merged_ones_compute_the_same(shape: str, text: str) -> None:
    model, ids = small_model(**SHAPES[shape]), random_ids(2, 9)
    expected = model(ids)[0]
    assert torch.equal(adapted(model, text, trained=False)(ids)[0], expected)
    changed = adapted(model, text)
    output = changed(ids)[0]
    assert (output - expected).abs().max() > 0.01, "else the test shows nothing"
    base = model.state_dict()
    record = AdapterRecord(parse_lora(f"{text},targets=all-linear"), "base", weights_sha256(base))
    model.load_state_dict(merged_weights(base, adapter_state(changed), record))
    torch.testing.assert_close(model(ids)[0], output, rtol=1e-5, atol=1e-5)


def test_only_adapters_get_gradients() -> None:
    model, ids = adapted(small_model(), "r=4", targets="attention"), random_ids(2, 9)
    model(ids, loss=TokenLoss(ids))[0].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(".attention." in name and ".adapter.lora_" in name for name in trained)
    assert all(parameter.requires_grad == (name in trained) for name, parameter in model.named_parameters())


def test_fused_layer_has_an_adapter_for_each_matrix() -> None:
    model = adapted(small_model(), "r=4")
    layer = model.layers[0].attention.in_proj
    width = layer.out_features // 3
    x = torch.randn(5, layer.in_features)
    update = layer.adapter.update(x)
    a, b = layer.adapter.lora_A, layer.adapter.lora_B
    for part in range(3):
        expected = (x @ a[4 * part : 4 * part + 4].T) @ b[width * part : width * (part + 1)].T * 2.0
        torch.testing.assert_close(update[:, width * part : width * (part + 1)], expected)


def test_dropout_applies_in_training_only() -> None:
    layer = adapted(small_model(), "r=4,dropout=0.5").layers[0].attention.out_proj
    x = torch.randn(5, layer.in_features)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_experts_have_no_adapters() -> None:
    model = small_model(moe_freq=1, moe_num_experts=2)
    assert set(target_layers(model, "all-linear")) == set(target_layers(model, "attention"))


def test_targets_that_the_model_lacks_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--lora targets=attention: the model has no such layer.*Conv1d"):
        add_adapters(torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1)), LoraSettings())


def test_hash_does_not_depend_on_names_but_on_values() -> None:
    weights = small_model().state_dict()
    renamed = {f"other.{name}": value.clone() for name, value in reversed(weights.items())}
    assert weights_sha256(weights) == weights_sha256(renamed)
    renamed["other.norm.weight"] = renamed["other.norm.weight"] + 1e-6
    assert weights_sha256(weights) != weights_sha256(renamed)
    with pytest.raises(CheckpointError, match=r"run/epoch_1\.pt.*another base: b has .* bbb.*on a with sha256 aaa"):
        AdapterRecord(LoraSettings(), "a", "aaa").check_base("bbb", "b", "run/epoch_1.pt")


def test_text_of_the_flag() -> None:
    assert parse_lora("r=8") == LoraSettings(r=8, alpha=16)
    text = "r=8,alpha=2.5,dropout=0.1,targets=all-linear,dora=true,rslora=false"
    assert parse_lora(text) == LoraSettings(8, 2.5, 0.1, "all-linear", True, False)
    assert parse_lora(parse_lora(text).text()) == parse_lora(text)
    with pytest.raises(ConfigError) as error:
        parse_lora("rank=8,alpha=0,dropout=1,targets=mlp,r")
    for part in ("'rank'", "alpha: found '0'", "dropout: found '1'", "attention or all-linear", "valid keys: r ("):
        assert part in str(error.value)


# ---------------------------------------------------------------------------------------------- 4-bit weights
@pytest.mark.parametrize("text", KINDS)
def test_quantized_layers_compute_with_the_dequantized_weight(text: str) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install -e '.[finetune]'")
    model = small_model()
    changed, ids = adapted(model, text, quantize=True), random_ids(2, 9)
    rounded = copy.deepcopy(model)
    for name, layer in quantized_layers(changed).items():
        rounded.get_parameter(name).data = dequantize(layer, torch.float32)
        error = (rounded.get_parameter(name) - model.get_parameter(name)).abs().max()
        assert 0 < error < 0.2 * model.get_parameter(name).abs().max()
    expected = adapted(rounded, text)
    losses = [each(ids, loss=TokenLoss(ids))[0] for each in (changed, expected)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for (name, layer), (_, other) in zip(adapters(changed), adapters(expected), strict=True):
        torch.testing.assert_close(layer.adapter.lora_A.grad, other.adapter.lora_A.grad, msg=name)
    held = sum(buffer.numel() * buffer.element_size() for layer in target_layers(changed, "all-linear").values()
               for buffer in layer.buffers(recurse=False))  # fmt: skip
    values = sum(model.get_parameter(name).numel() for name in quantized_layers(changed))
    assert held * 8 / values < 4.6, "bits per value"


def test_quantized_weight_keeps_its_values_when_the_model_is_cast() -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install -e '.[finetune]'")
    layer = torch.nn.Linear(64, 96, bias=False)
    quantize_layer(layer)
    before = dequantize(layer, torch.float32)
    layer.to(torch.bfloat16)
    assert torch.equal(dequantize(layer, torch.float32), before)


def test_adapter_counts() -> None:
    layer = torch.nn.Linear(6, 4)
    shapes = {
        name: tuple(value.shape) for name, value in Adapter(layer, LoraSettings(r=2, dora=True)).named_parameters()
    }
    assert shapes == {"lora_A": (2, 6), "lora_B": (4, 2), "lora_magnitude": (4,)}


def test_frozen_weights_count_without_their_gradient() -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install -e '.[finetune]'")
    model = small_model()
    full = model_flops_per_token(model)
    changed = adapted(model, "r=4")
    matrices = sum(value.numel() for value in model.parameters()) - model.tok_embeddings.weight.numel()
    trained = sum(value.numel() for value in changed.parameters() if value.requires_grad)
    assert model_flops_per_token(changed) == full - 2 * matrices + 6 * trained
    assert model_flops_per_token(adapted(model, "r=4", quantize=True)) == model_flops_per_token(changed)
