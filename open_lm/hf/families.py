"""Model families of transformers as configurations and weights of the native model.

`architecture` maps a configuration of transformers to the keys of a model's JSON file, and `tensor_sources` names the
tensors of a checkpoint that make up each native one. Each family is one entry of FAMILIES. Its tables name the fields
of the configuration and the modules of the checkpoint; nothing else in the package depends on a family's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_lm.errors import ConfigError, join_problems
from open_lm.hf.family_settings import gemma_scales, layer_types, moe_loss_weight, no_rope_layers, rope, window

Config = Mapping[str, Any]
Rule = Callable[[Config], dict[str, Any]]  # a configuration of transformers -> keys of a model's JSON file


@dataclass(frozen=True)
class Family:
    """How a model_type of transformers maps to the native model.

    Attributes:
        constants: keys of the model's JSON file that all models of the family share.
        fields: fields of the configuration that are copied, with the keys that get their value.
        rules: functions of the configuration that return further keys.
        allowed: the values of further fields with which the result is that of the native model.
        modules: native modules with the modules of a checkpoint whose weights (and biases) they concatenate, in place
            of those in MODULES; "{i}" is the number of a layer.
        experts: stacked native weights with the weight of expert "{e}" in a checkpoint, which is transposed.
    """

    constants: Mapping[str, Any]
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = (rope,)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)


FIELDS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_dim",),
    "num_hidden_layers": ("n_layers",),
    "num_attention_heads": ("n_heads",),
    "num_key_value_heads": ("n_kv_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": ("ffn_dim",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("seq_len",),
    "tie_word_embeddings": ("weight_tying",),
    "rms_norm_eps": ("norm_eps",),
    "attention_dropout": ("attn_dropout",),
}
_BIAS = {"attention_bias": ("qkv_bias", "attn_out_bias")}
_SILU = {"hidden_act": ("silu", "swish")}
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")

_ATTENTION, _MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
_Q, _K, _V = (f"{_ATTENTION}{name}_proj" for name in "qkv")
MODULES: dict[str, tuple[str, ...]] = {
    "tok_embeddings": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "output": ("lm_head",),
    "layers.{i}.attention.in_proj": (_Q, _K, _V),
    "layers.{i}.attention.q_proj": (_Q,),
    "layers.{i}.attention.kv_proj": (_K, _V),
    "layers.{i}.attention.out_proj": (f"{_ATTENTION}o_proj",),
    "layers.{i}.attention.q_norm": (f"{_ATTENTION}q_norm",),
    "layers.{i}.attention.k_norm": (f"{_ATTENTION}k_norm",),
    "layers.{i}.attention_norm": ("model.layers.{i}.input_layernorm",),
    "layers.{i}.ffn_norm": ("model.layers.{i}.post_attention_layernorm",),
    "layers.{i}.feed_forward.w12": (f"{_MLP}gate_proj", f"{_MLP}up_proj"),
    "layers.{i}.feed_forward.w3": (f"{_MLP}down_proj",),
}
_POST_NORMS = {
    "layers.{i}.attention_post_norm": ("model.layers.{i}.post_attention_layernorm",),
    "layers.{i}.ffn_post_norm": ("model.layers.{i}.post_feedforward_layernorm",),
}
_FOUR_NORMS = {**_POST_NORMS, "layers.{i}.ffn_norm": ("model.layers.{i}.pre_feedforward_layernorm",)}

_LLAMA = {"model_norm": "rms_norm", "ffn_type": "swiglu", "positional_embedding_type": "rotary"}
_GEMMA = {**_LLAMA, "model_norm": "gemma_rms_norm", "ffn_type": "geglu_tanh"}
_GEMMA_2 = {**_GEMMA, "norm_position": "both"}
_OLMO_2 = {**_LLAMA, "norm_position": "post", "qk_norm": True}
_EXPERTS = {**_LLAMA, "moe_freq": 1, "moe_ffn_type": "swiglu", "moe_capacity_factor": 0.0, "moe_loss_scope": "model"}
_CAUSAL = {"use_bidirectional_attention": (None, False)}
_GEMMA_2_FIELDS = {
    **_BIAS,
    "attn_logit_softcapping": ("attn_soft_cap",),
    "final_logit_softcapping": ("logit_soft_cap",),
}
_MLP_OF_EXPERTS = "layers.{i}.feed_forward.experts.mlp."

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA, {**_BIAS, "mlp_bias": ("ffn_bias",)}, allowed=_SILU),
    "mistral": Family(_LLAMA, rules=(rope, window), allowed=_SILU),
    "qwen2": Family({**_LLAMA, "qkv_bias": True}, rules=(rope, layer_types), allowed=_SILU),
    "qwen3": Family(
        {**_LLAMA, "qk_norm": True, "qk_norm_per_head": True}, _BIAS, rules=(rope, layer_types), allowed=_SILU
    ),
    "smollm3": Family(
        _LLAMA, {**_BIAS, "mlp_bias": ("ffn_bias",)}, rules=(rope, layer_types, no_rope_layers), allowed=_SILU
    ),
    "olmo2": Family(_OLMO_2, _BIAS, allowed=_SILU, modules=_POST_NORMS),
    "olmo3": Family(_OLMO_2, _BIAS, rules=(rope, layer_types), allowed=_SILU, modules=_POST_NORMS),
    "gemma": Family(_GEMMA, _BIAS, rules=(rope, gemma_scales), allowed={"hidden_act": (*_TANH, "gelu"), **_CAUSAL}),
    "gemma2": Family(
        _GEMMA_2,
        _GEMMA_2_FIELDS,
        rules=(rope, layer_types, gemma_scales),
        allowed={"hidden_activation": _TANH, **_CAUSAL},
        modules=_FOUR_NORMS,
    ),
    "gemma3_text": Family(
        {**_GEMMA_2, "qk_norm": True, "qk_norm_per_head": True},
        _GEMMA_2_FIELDS,
        rules=(rope, layer_types, gemma_scales),
        allowed={"hidden_activation": _TANH, **_CAUSAL},
        modules=_FOUR_NORMS,
    ),
    "phi": Family(
        {
            **{"model_norm": "default_layer_norm", "ffn_type": "gelu_tanh", "positional_embedding_type": "rotary"},
            **{"parallel_block": True, "qkv_bias": True, "attn_out_bias": True, "ffn_bias": True, "head_bias": True},
        },
        {
            "layer_norm_eps": ("norm_eps",),
            "resid_pdrop": ("residual_dropout",),
            "embd_pdrop": ("embedding_dropout",),
            "qk_layernorm": ("qk_norm", "qk_norm_per_head"),
        },
        allowed={"hidden_act": _TANH},
        modules={
            "norm": ("model.final_layernorm",),
            "layers.{i}.attention.out_proj": (f"{_ATTENTION}dense",),
            "layers.{i}.attention.q_norm": (f"{_ATTENTION}q_layernorm",),
            "layers.{i}.attention.k_norm": (f"{_ATTENTION}k_layernorm",),
            "layers.{i}.feed_forward.w1": (f"{_MLP}fc1",),
            "layers.{i}.feed_forward.w2": (f"{_MLP}fc2",),
        },
    ),
    "mixtral": Family(
        {**_EXPERTS, "moe_normalize_scores": True},
        {
            "intermediate_size": ("moe_ffn_dim",),
            "num_local_experts": ("moe_num_experts",),
            "num_experts_per_tok": ("moe_top_k",),
        },
        rules=(rope, window, moe_loss_weight),
        allowed={**_SILU, "router_jitter_noise": (0.0,)},
        modules={"layers.{i}.feed_forward.router.layer": ("model.layers.{i}.block_sparse_moe.gate",)},
        experts={
            f"{_MLP_OF_EXPERTS}{name}": f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.{name}.weight"
            for name in ("w1", "w2", "w3")
        },
    ),
    "olmoe": Family(
        {**_EXPERTS, "qk_norm": True},
        {
            **_BIAS,
            "intermediate_size": ("moe_ffn_dim",),
            "num_experts": ("moe_num_experts",),
            "num_experts_per_tok": ("moe_top_k",),
            "norm_topk_prob": ("moe_normalize_scores",),
        },
        rules=(rope, moe_loss_weight),
        allowed={**_SILU, "clip_qkv": (None,)},
        modules={"layers.{i}.feed_forward.router.layer": (f"{_MLP}gate",)},
        experts={
            f"{_MLP_OF_EXPERTS}w1": f"{_MLP}experts.{{e}}.gate_proj.weight",
            f"{_MLP_OF_EXPERTS}w3": f"{_MLP}experts.{{e}}.up_proj.weight",
            f"{_MLP_OF_EXPERTS}w2": f"{_MLP}experts.{{e}}.down_proj.weight",
        },
    ),
}


def family_of(config: Config) -> Family:
    """Return the family of a configuration. Raise ConfigError for an unsupported model_type."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported, expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def architecture(config: Config) -> dict[str, Any]:
    """Return the keys of a model's JSON file for a configuration of transformers.

    Args:
        config: the result of `to_dict` of a configuration that transformers 4 or 5 loaded, with all fields of its
            class.

    Raises:
        ConfigError: an unsupported model_type, or values that the native model does not implement, all at once.
    """
    family = family_of(config)
    problems = [
        f"{name} is {config[name]!r}, expected {' or '.join(map(repr, values))}"
        for name, values in {**family.allowed, "quantization_config": (None,)}.items()
        if name in config and config[name] not in values
    ]
    keys = dict(family.constants)
    for name, targets in {**FIELDS, **family.fields}.items():
        if config.get(name) is not None:
            keys |= dict.fromkeys(targets, config[name])
    for rule in family.rules:
        try:
            keys |= rule(config)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(join_problems(problems, f"the configuration of model_type {config['model_type']}"))
    return keys


class TensorSource(NamedTuple):
    """The tensors of a checkpoint that make up a native tensor.

    Attributes:
        names: their names, in order.
        is_stacked: whether the native tensor (E,in,out) stacks their transposes, one per expert, instead of
            concatenating them along dimension 0. All have the same number of rows then.
    """

    names: tuple[str, ...]
    is_stacked: bool = False

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the native tensor that consists of the tensors of a checkpoint."""
        if self.is_stacked:
            return torch.stack([tensor.t() for tensor in tensors])
        return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))

    def unpack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of a checkpoint that a native tensor consists of, as views; the inverse of `pack`."""
        if self.is_stacked:
            return tuple(expert.t() for expert in tensor)
        return split_rows(tensor, self.names)


def split_rows(tensor: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Split a native tensor along dimension 0 into equal parts, one for each name."""
    return (tensor,) if len(names) == 1 else tensor.chunk(len(names))


def tensor_sources(config: Config, native_names: Iterable[str]) -> dict[str, TensorSource]:
    """Return the source of each native parameter.

    Args:
        config: as for `architecture`.
        native_names: names of the parameters of the native model, without those of buffers.

    Raises:
        ValueError: a parameter that the family does not have.
    """
    family = family_of(config)
    modules = {**MODULES, **family.modules}
    num_experts = config.get("num_local_experts") or config.get("num_experts") or 0
    sources = {}
    for name in native_names:
        layer = re.search(r"(?<=^layers\.)\d+", name)
        template = re.sub(r"^layers\.\d+", "layers.{i}", name)
        i = "" if layer is None else layer[0]
        if template in family.experts:
            experts = tuple(family.experts[template].format(i=i, e=e) for e in range(num_experts))
            sources[name] = TensorSource(experts, is_stacked=True)
            continue
        module, _, parameter = template.rpartition(".")
        if module not in modules:
            raise ValueError(f"{config.get('model_type')} has no weights for the parameter {name}")
        sources[name] = TensorSource(tuple(f"{source.format(i=i)}.{parameter}" for source in modules[module]))
    return sources
