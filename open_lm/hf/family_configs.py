"""Configurations of transformers for native models: the inverse of `families.architecture`.

A family fits a native model if the architecture of the configuration that the inverse gives is the model's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from open_lm.config.model_keys import MUP_KEYS, in_layer
from open_lm.errors import ConfigError
from open_lm.hf import family_settings
from open_lm.hf.families import FAMILIES, FIELDS, Rule, architecture
from open_lm.model.params import Params, params_from_keys

_SLIDING, _FULL = "sliding_attention", "full_attention"
_SEVERAL_BASES = ("gemma3_text", "olmo3")  # their rope_parameters are per type of layer
# Fields of Params that do not change the function that a model computes in evaluation, beyond the names of kernels.
_WITHOUT_EFFECT = (
    *("norm_type", "attn_func", "attn_name", "attn_seq_scalar", "attn_seq_scalar_alpha", "unpadded_vocab_size"),
    "seq_len",
    *("moe_capacity_factor", "moe_loss_scope", "moe_weight_parallelism", "moe_expert_model_parallelism"),
)
# Fields that only version 4 or only version 5 of transformers has.
_OF_ONE_VERSION = (
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rope_local_base_freq"),
    *("layer_types", "sliding_window_pattern", "original_max_position_embeddings"),
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # classes have defaults for them
# Fields that the rules of families read.
_OF_RULES = (
    *("sliding_window", "use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval"),
    *("query_pre_attn_scalar", "router_aux_loss_coef", "num_experts_per_tok", "quantization_config"),
)
# Fields of all classes that do not change the logits, or that only describe the file.
_NEUTRAL = (
    *(
        "model_type",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "tokenizer_class",
        "task_specific_params",
    ),
    *("initializer_range", "use_cache", "cache_implementation", "pretraining_tp", "output_router_logits"),
    *("id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
    *("chunk_size_feed_forward", "hidden_act", "hidden_activation"),
    *("do_sample", "max_length", "min_length", "temperature", "top_k", "top_p", "num_beams", "return_dict_in_generate"),
)
# Names of the same function: the weights of llama_rotary differ from those of rotary only in the order of their rows.
_SAME = {"llama_rotary": "rotary", "swiglu_torch": "swiglu"}


def full_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with all fields of its class, as transformers reads it from a config.json.

    Raises:
        ConfigError: a model_type that the installed version of transformers does not have, or refused values.
    """
    from transformers import CONFIG_MAPPING

    model_type = fields["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"the installed version of transformers has no model_type {model_type}; install a newer one")
    try:
        config: dict[str, Any] = CONFIG_MAPPING[model_type].from_dict(dict(fields)).to_dict()
    except Exception as error:  # the checks of its classes raise many types of errors
        reason = " ".join(str(error).split())
        raise ConfigError(f"transformers refuses the configuration ({reason})") from error
    return config


def unimplemented(config: Mapping[str, Any]) -> list[str]:
    """Return the fields of a family's class that have no mapping and not their default value, with both values.

    Classes of newer versions of transformers may have fields that change the result.
    """
    model_type = config["model_type"]
    family = FAMILIES[model_type]
    known = {*FIELDS, *family.fields, *family.allowed, *_OF_RULES, *_OF_ONE_VERSION, *SPECIAL_IDS, *_NEUTRAL}
    return [
        f"{name} is {config[name]!r}, expected {default!r}; other values are not implemented"
        for name, default in _class_fields(model_type).items()
        if name not in known and not name.startswith("_") and config.get(name) != default
    ]


def config_of(params: Params, preferred: str | None = None) -> dict[str, Any] | None:
    """Return the fields of a config.json with which transformers computes what the native model does.

    Args:
        params: the native architecture.
        preferred: the model_type to try first; the others follow in the order of FAMILIES.

    Returns:
        the fields, for versions 4 and 5 of transformers; None if no family computes the same.
    """
    if params.attn_name == "custom_attn":
        return None
    for model_type in sorted(FAMILIES, key=lambda name: name != preferred):
        fields = _fields(params, model_type)
        try:
            keys = architecture(full_config(fields))
            candidate = params_from_keys(keys)
        except ConfigError:
            continue
        if not differences(params, candidate):
            return fields
    return None


def differences(params: Params, other: Params) -> list[str]:
    """Return the fields in which two architectures compute something else, with both values."""
    first, second = _comparable(params), _comparable(other)
    return [
        f"{name} is {first.get(name)!r} and {second.get(name)!r}"
        for name in {**first, **second}
        if not _equal(first.get(name), second.get(name))
    ]


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-12)
    return bool(first == second)


def _comparable(params: Params) -> dict[str, Any]:
    """Return what the architecture computes: settings without effect are removed, and others have one form."""
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    layers = [params.layer_kind(layer) for layer in range(params.n_layers)]
    values["vocab_size"] = params.unpadded_vocab_size or params.vocab_size
    values["attn_scale"] = params.attn_scale or params.head_dim**-0.5
    values["attn_window_pattern"] = [kind.has_window for kind in layers]
    values["rope_pattern"] = [kind.is_rotated for kind in layers]
    values["rope_local_base"] = params.rope_local_base if any(kind.has_window for kind in layers) else None
    if params.rope_local_base == params.rope_base and params.rope_frequency_scaling is None:
        values["rope_local_base"] = None
    unused = [name for name in values if name.startswith("moe_") and params.moe_freq == 0]
    unused += [name for name in ("ffn_type", "ffn_dim", "ffn_bias") if params.moe_freq == 1]
    unused += [] if params.apply_qk_norm else ["qk_norm_per_head"]
    unused += MUP_KEYS if params.parametrization.is_standard else []
    return {
        name: _SAME.get(value, value) if isinstance(value, str) else value
        for name, value in values.items()
        if name not in (*_WITHOUT_EFFECT, *unused)
    }


def _fields(params: Params, model_type: str) -> dict[str, Any]:
    """Return the fields of a family for an architecture that may not be one of the family."""
    family = FAMILIES[model_type]
    keys = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    keys |= {"hidden_dim": params.dim, "qk_norm": params.apply_qk_norm}
    keys["vocab_size"] = params.unpadded_vocab_size or params.vocab_size
    fields: dict[str, Any] = {"model_type": model_type, **dict.fromkeys(SPECIAL_IDS)}
    names = {**FIELDS, **family.fields}
    known = _class_fields(model_type)
    fields |= {name: keys[targets[0]] for name, targets in names.items() if name in known}
    if fields.get("head_dim") == params.dim // params.n_heads and known["head_dim"] is None:
        del fields["head_dim"]
    fields |= {name: v[0] for name, v in family.allowed.items() if name in known and known[name] not in v}
    for rule in family.rules:
        found = _INVERSES[rule](params, model_type)
        fields |= {name: value for name, value in found.items() if name in known or name in _OF_ONE_VERSION}
    return fields


def _class_fields(model_type: str) -> dict[str, Any]:
    """Return the fields of a family's class with their defaults; empty if transformers does not have the class."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]().to_dict() if model_type in CONFIG_MAPPING else {}


# ---------------------------------------------------------------------------------------------- inverse rules
def _rope(params: Params, model_type: str) -> dict[str, Any]:
    """Return rotary settings under the names of versions 4 (rope_theta, …) and 5 (rope_parameters)."""
    scaling = _scaling(params)
    fraction = {} if params.rope_fraction == 1.0 else {"partial_rotary_factor": params.rope_fraction}
    common = {"rope_theta": params.rope_base, **fraction}
    fields: dict[str, Any] = {**common, "rope_scaling": scaling}
    original = (params.rope_frequency_scaling or {}).get("original_seq_len")
    if scaling is not None and scaling["rope_type"] == "dynamic":
        fields["max_position_embeddings"] = original
    if scaling is not None and scaling["rope_type"] == "longrope":
        fields["original_max_position_embeddings"] = original  # version 4 does not read the scaling's parameter
    parameters = {"rope_type": "default", **common, **(scaling or {})}
    if model_type not in _SEVERAL_BASES:
        return {**fields, "rope_parameters": parameters}
    local = params.rope_base if params.rope_local_base is None else params.rope_local_base
    if model_type == "gemma3_text":
        fields["rope_local_base_freq"] = local
    return {**fields, "rope_parameters": {_FULL: parameters, _SLIDING: {"rope_type": "default", "rope_theta": local}}}


def _scaling(params: Params) -> dict[str, Any] | None:
    scaling = params.rope_frequency_scaling
    if scaling is None:
        return None
    values = {family_settings.ROPE_PARAMETERS.get(name, name): value for name, value in scaling.items()}
    values["rope_type"] = values.pop("type")
    if scaling["type"] == "dynamic":  # the original length is max_position_embeddings
        del values["original_max_position_embeddings"]
    if scaling["type"] == "longrope" and values.get("factor") == params.seq_len / scaling["original_seq_len"]:
        del values["factor"]
    return values


def _window(params: Params, model_type: str) -> dict[str, Any]:
    return {"sliding_window": params.attn_window}


def _layer_types(params: Params, model_type: str) -> dict[str, Any]:
    if params.attn_window is None:
        return {"sliding_window": None, "use_sliding_window": False}
    pattern = [in_layer(params.attn_window_pattern, layer) for layer in range(params.n_layers)]
    first = pattern.index(True) if True in pattern else params.n_layers
    cycle = family_settings.shortest_cycle(pattern)
    return {
        "sliding_window": params.attn_window,
        "layer_types": [_SLIDING if windowed else _FULL for windowed in pattern],
        "use_sliding_window": True,
        "max_window_layers": first,
        **({"sliding_window_pattern": len(cycle)} if model_type == "gemma3_text" and cycle.count(False) == 1 else {}),
    }


def _no_rope_layers(params: Params, model_type: str) -> dict[str, Any]:
    return {"no_rope_layers": [int(in_layer(params.rope_pattern, layer)) for layer in range(params.n_layers)]}


def _gemma_scales(params: Params, model_type: str) -> dict[str, Any]:
    if model_type == "gemma":
        return {}
    scalar = params.head_dim if params.attn_scale is None else params.attn_scale**-2
    is_whole = math.isclose(scalar, round(scalar), rel_tol=1e-9)
    return {"query_pre_attn_scalar": round(scalar) if is_whole else scalar}


def _moe_loss_weight(params: Params, model_type: str) -> dict[str, Any]:
    return {"router_aux_loss_coef": params.moe_loss_weight / params.moe_top_k}


_INVERSES: dict[Rule, Callable[[Params, str], dict[str, Any]]] = {
    family_settings.rope: _rope,
    family_settings.window: _window,
    family_settings.layer_types: _layer_types,
    family_settings.no_rope_layers: _no_rope_layers,
    family_settings.gemma_scales: _gemma_scales,
    family_settings.moe_loss_weight: _moe_loss_weight,
}
