"""Tiny random models of the families of transformers, and the native models with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from open_lm.hf.families import architecture, tensor_sources
from open_lm.model.params import Params
from open_lm.model.transformer import Transformer

LLAMA_3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
TINY = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
}
# Name -> (model_type, fields that differ from TINY). Sequences of the tests are longer than all windows.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_2": ("llama", {}),
    "open_llama": ("llama", {"hidden_size": 60, "num_attention_heads": 3, "rms_norm_eps": 1e-6}),
    "tinyllama": ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "smollm_2": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama_3": ("llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "llama_biases": (
        "llama",
        {
            **{"attention_bias": True, "mlp_bias": True, "head_dim": 12},
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "llama_yarn": (
        "llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
                **{"beta_fast": 4.0, "beta_slow": 0.5},
            },
        },
    ),
    "llama_dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
    "llama_longrope": (
        "llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16},
                **{"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 4.0, 8.0]},
            },
        },
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral_0.3": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "gemma_2b": ("gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma_7b": ("gemma", {"num_key_value_heads": 4, "head_dim": 12}),
    "gemma_2": (
        "gemma2",
        {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16},
    ),
    "gemma_2_27b": (
        "gemma2",
        {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 9},
    ),
    "gemma_3": (
        "gemma3_text",
        {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 7, "num_hidden_layers": 7},
    ),
    "phi_2": (
        "phi",
        {
            **{"hidden_size": 80, "num_key_value_heads": 4, "vocab_size": 64},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
        },
    ),
    "phi_qk_norm": ("phi", {"num_key_value_heads": 2, "qk_layernorm": True}),
    "qwen_2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen_2_window": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen_3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 12}),
    "qwen_3_yarn": (
        "qwen3",
        {
            **{"num_key_value_heads": 2, "head_dim": 12},
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16},
                **{"attention_factor": 1.25, "truncate": False},
            },
        },
    ),
    "olmo_2": ("olmo2", {"num_key_value_heads": 2}),
    "olmo_3": ("olmo3", {"num_key_value_heads": 4, "sliding_window": 7, "num_hidden_layers": 4}),
    "olmo_3_yarn": (
        "olmo3",
        {
            **{"num_key_value_heads": 4, "sliding_window": 7, "num_hidden_layers": 4},
            "rope_parameters": {
                "full_attention": {
                    **{"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "attention_factor": 1.2},
                    "original_max_position_embeddings": 16,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "smollm_3": ("smollm3", {"num_key_value_heads": 2, "num_hidden_layers": 5}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4, "num_experts": 5, "num_experts_per_tok": 3}),
}


def hf_model(case: str) -> Any:
    """Create a model of transformers with random weights, including those of norms and biases."""
    model_type, fields = CASES[case]
    config = AutoConfig.for_model(model_type, **{**TINY, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def native_params(config: Any, **changes: Any) -> Params:
    """Return the architecture of the native model for a configuration of transformers."""
    keys = {**architecture(config.to_dict()), **changes}
    return Params(dim=keys.pop("hidden_dim"), apply_qk_norm=keys.pop("qk_norm", False), **keys)


def checkpoint_tensors(named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Rename tensors of a model of transformers as in its checkpoints, where each expert has its own."""
    tensors = {}
    for name, tensor in named:
        prefix, _, kind = name.rpartition(".experts.")
        if not prefix:
            tensors[name.replace("mlp.gate.weight", "block_sparse_moe.gate.weight")] = tensor
            tensors[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            halves = weight.chunk(2) if kind == "gate_up_proj" else (weight,)
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            mixtral = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
            for part, half in zip(parts, halves, strict=True):
                tensors[f"{prefix}.experts.{expert}.{part}.weight"] = half
                other = prefix.replace(".mlp", ".block_sparse_moe")
                tensors[f"{other}.experts.{expert}.{mixtral[part]}.weight"] = half
    return tensors


def packed(config: Any, native: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the native form of tensors of a checkpoint, by the names of the native model's parameters."""
    names = [name for name, _ in native.named_parameters()]
    sources = tensor_sources(config.to_dict(), names)
    return {name: source.pack([tensors[part] for part in source.names]) for name, source in sources.items()}


def native_model(hf: Any, **changes: Any) -> Transformer:
    """Return the native model with the weights of a model of transformers. `changes`: fields of Params."""
    model = Transformer(native_params(hf.config, **changes)).eval()
    weights = packed(hf.config, model, checkpoint_tensors(hf.named_parameters(remove_duplicate=False)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = weights[name]
            parameter.zero_()
            parameter[: len(rows)].copy_(rows)
    return model
