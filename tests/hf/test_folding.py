"""Models with muP export as ones of the standard parametrization, with equal logits in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from open_lm.config.sections import ModelConfig
from open_lm.evaluate.checkpoints import load_checkpoint
from open_lm.hf import OpenLMForCausalLM
from open_lm.hf.convert import main as convert
from open_lm.hf.folders import read_json
from open_lm.hf.standalone.configuration_openlm import OpenLMConfig as StandaloneConfig
from open_lm.model.params import create_params
from open_lm.model.transformer import Transformer

LLAMA = {"model_norm": "rms_norm", "n_kv_heads": 2}
GEMMA_3 = {
    **{"model_norm": "gemma_rms_norm", "ffn_type": "geglu_tanh", "norm_position": "both", "weight_tying": True},
    **{"qk_norm": True, "qk_norm_per_head": True, "embedding_scale": 32**0.5},
    **{"attn_window": 16, "attn_window_pattern": [True, False], "rope_local_base": 100.0},
}
# Architecture -> the model_type of its export. m is 8/3, so that products with it are rounded.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (LLAMA, "llama"),
    "tied": ({**LLAMA, "weight_tying": True, "positional_embedding_type": "llama_rotary"}, "llama"),
    "biases": ({**LLAMA, "qkv_bias": True}, "qwen2"),
    "olmo_2": ({"model_norm": "rms_norm", "norm_position": "post", "qk_norm": True}, "olmo2"),
    "gemma_3": (GEMMA_3, "gemma3_text"),
    "own": ({"head_bias": True, "logit_soft_cap": 2.0}, "openlm"),
    "no_gain": ({"model_norm": "no_wb_layer_norm", "qk_norm": True}, "openlm"),
}


def write_model(folder: Path, keys: dict[str, Any]) -> tuple[str, str]:
    """Write a model's JSON file and random weights, and return their paths."""
    shape = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 61, "seq_len": 48}
    file, weights = folder / "wide.json", folder / "weights.pt"
    file.write_text(json.dumps({**shape, **keys, "mup": True, "mup_base_width": 12}))
    torch.manual_seed(0)
    model = Transformer(create_params(ModelConfig(model=str(file))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    torch.save(model.state_dict(), weights)
    return str(file), str(weights)


@pytest.mark.parametrize("case", CASES)
def test_an_export_computes_the_logits_without_multipliers(case: str, tmp_path: Path) -> None:
    keys, model_type = CASES[case]
    file, weights = write_model(tmp_path, keys)
    precision = ["--dtype", "bfloat16"] if case == "tied" else []
    convert(["export", weights, str(tmp_path / "out"), "--model", file, "--verify", *precision])  # compares logits
    config = read_json(str(tmp_path / "out" / "config.json"))
    assert config["model_type"] == model_type
    assert config["tie_word_embeddings"] is False, "the multiplier of a tied output layer needs a weight of its own"
    assert not config.get("mup", False) and "mup" not in read_json(str(tmp_path / "out" / "model.json"))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    stored = torch.load(weights)
    head = exported["lm_head.weight" if model_type != "openlm" else "model.output.weight"].float()
    multiplier = (12 / 32) ** (0.5 if case == "gemma_3" else 1)
    assert torch.allclose(head, stored["output.weight"] * multiplier, rtol=1e-2)
    # The export is a native model of the standard parametrization.
    native, folded = (load_checkpoint(path, model) for path, model in ((weights, file), (str(tmp_path / "out"), None)))
    ids = torch.randint(61, (2, 20))
    tolerance = {"atol": 0.05} if precision else {"atol": 1e-5}
    assert folded.params.parametrization.is_standard and not native.params.parametrization.is_standard
    with torch.no_grad():
        assert torch.allclose(native(ids)[0], folded(ids)[0], **tolerance)


def test_a_model_of_the_base_width_keeps_its_tied_weights(tmp_path: Path) -> None:
    file, weights = write_model(tmp_path, {**LLAMA, "weight_tying": True})
    keys = {**json.loads(Path(file).read_text()), "mup_base_width": 32}
    Path(file).write_text(json.dumps(keys))
    convert(["export", weights, str(tmp_path / "out"), "--model", file, "--verify"])
    assert read_json(str(tmp_path / "out" / "config.json"))["tie_word_embeddings"] is True


def test_the_native_class_of_transformers_keeps_the_parametrization(tmp_path: Path) -> None:
    file, weights = write_model(tmp_path, {"weight_tying": True, "qk_norm": True})
    native, ids = load_checkpoint(weights, file), torch.randint(61, (2, 20))
    OpenLMForCausalLM.from_open_lm(native).save_pretrained(tmp_path / "saved")
    loaded = OpenLMForCausalLM.from_pretrained(tmp_path / "saved")
    loaded.set_output_embeddings(loaded.get_output_embeddings())
    with torch.no_grad():
        expected = native(ids)[0]
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(load_checkpoint(str(tmp_path / "saved"))(ids)[0], expected)
    with pytest.raises(ValueError, match="only models whose export has folded its multipliers"):
        StandaloneConfig(**read_json(str(tmp_path / "saved/config.json")))
