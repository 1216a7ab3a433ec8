"""The configuration of OpenLM language models for transformers; it needs transformers only.

config.json has the fields of `DEFAULTS`, under the names that docs/model_configs.md of OpenLM describes, except `dim`
(hidden_dim) and `apply_qk_norm` (qk_norm).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

DEFAULTS: dict[str, Any] = {
    **{"dim": 512, "n_layers": 8, "n_heads": 8, "vocab_size": 50432, "seq_len": 2048, "norm_eps": 1e-5},
    **{"post_embed_norm": False, "weight_tying": False, "model_norm": "default_layer_norm", "attn_name": "auto"},
    **{"attn_activation": None, "attn_seq_scalar": None, "attn_seq_scalar_alpha": None, "apply_qk_norm": False},
    **{"positional_embedding_type": "rotary", "ffn_type": "swiglu", "moe_freq": 0, "moe_num_experts": None},
    **{"moe_top_k": 2, "moe_capacity_factor": 1.25, "moe_loss_weight": 0.1, "moe_weight_parallelism": False},
    **{"moe_expert_model_parallelism": False, "n_kv_heads": 0, "head_dim": 0, "qkv_bias": False},
    **{"attn_out_bias": False, "qk_norm_per_head": False, "attn_scale": None, "attn_soft_cap": None},
    **{"attn_window": None, "attn_window_pattern": None, "rope_base": 10000.0, "rope_local_base": None},
    **{"rope_fraction": 1.0, "rope_frequency_scaling": None, "rope_pattern": None, "ffn_dim": 0, "ffn_bias": None},
    **{"moe_ffn_type": "gelu_tanh", "moe_ffn_dim": 0, "moe_normalize_scores": False, "moe_loss_scope": "layer"},
    **{"norm_position": "pre", "parallel_block": False, "embedding_scale": 1.0, "head_bias": False},
    **{"logit_soft_cap": None, "unpadded_vocab_size": None, "embedding_dropout": 0.0, "attn_dropout": 0.0},
    **{"residual_dropout": 0.0, "mup": False, "mup_base_width": None, "mup_base_head_dim": None},
}


class OpenLMConfig(PretrainedConfig):
    """The architecture of a model; the fields are those of `DEFAULTS`."""

    model_type = "openlm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers reads plain class attributes
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "seq_len",
        "final_logit_softcapping": "logit_soft_cap",
    }

    def __init__(self, **kwargs: Any) -> None:
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        values = {name: kwargs.pop(name, default) for name, default in DEFAULTS.items()}
        if values["mup"]:
            raise ValueError("mup is true: these files compute only models whose export has folded its multipliers")
        values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
        values["head_dim"] = values["head_dim"] or values["dim"] // values["n_heads"]
        is_gated = values["ffn_type"] not in ("gelu", "gelu_tanh")
        default_width = 256 * -(-int(8 * values["dim"] / 3) // 256) if is_gated else 4 * values["dim"]
        values["ffn_dim"] = values["ffn_dim"] or default_width
        values["moe_ffn_dim"] = values["moe_ffn_dim"] or 4 * values["dim"]
        if values["ffn_bias"] is None:
            values["ffn_bias"] = values["ffn_type"] == "gemma_geglu"
        for name, value in values.items():
            setattr(self, name, value)
        super().__init__(**{**kwargs, "tie_word_embeddings": values["weight_tying"]})
