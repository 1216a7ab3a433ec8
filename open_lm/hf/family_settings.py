"""Settings of model families that transformers stores otherwise than a model's JSON file does.

Each function maps a configuration of transformers, as a dict, to keys of the file. transformers 5 stores rotary
settings in `rope_parameters`, per type of layer if they differ, version 4 in `rope_theta`, `rope_scaling` and further
fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from open_lm.config.registry import ROPE_SCALINGS
from open_lm.errors import ConfigError

Config = Mapping[str, Any]
_SLIDING, _FULL = "sliding_attention", "full_attention"
_OLD_TYPES = {"su": "longrope"}
# Parameters of scalings in a model's JSON file that have other names in transformers.
ROPE_PARAMETERS = {"original_seq_len": "original_max_position_embeddings", "fraction": "partial_rotary_factor"}


def rope(config: Config) -> dict[str, Any]:
    """Return the settings of rotary embeddings. Raise ConfigError for an unsupported scaling."""
    parameters = config.get("rope_parameters") or {}
    if _FULL in parameters or _SLIDING in parameters:
        local = parameters.get(_SLIDING) or {}
        keys = _rope_keys(parameters.get(_FULL) or {}, config)
        if _uses_windows(config):
            if "rope_frequency_scaling" in _rope_keys(local, config):
                raise ConfigError("rope_parameters scale the frequencies of layers with a window, expected none")
            keys["rope_local_base"] = float(local["rope_theta"])
        return keys
    keys = _rope_keys(parameters or (config.get("rope_scaling") or {}), config)
    local_base = config.get("rope_local_base_freq")
    if local_base is None and config.get("model_type") == "olmo3" and "rope_frequency_scaling" in keys:
        local_base = keys["rope_base"]  # it scales only layers without a window
    if local_base is not None and _uses_windows(config):
        keys["rope_local_base"] = float(local_base)
    return keys


def _rope_keys(parameters: Mapping[str, Any], config: Config) -> dict[str, Any]:
    base = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    fraction = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    keys = {"rope_base": float(base), **({} if fraction in (None, 1.0) else {"rope_fraction": float(fraction)})}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = _OLD_TYPES.get(kind, kind)
    if kind == "default":
        return keys
    if kind not in ROPE_SCALINGS:
        raise ConfigError(f"the rope_type is {kind!r}, expected one of default, {', '.join(ROPE_SCALINGS)}")
    if kind == "proportional":
        keys.pop("rope_fraction", None)
    required, optional = (ROPE_SCALINGS.fact(kind, fact, ()) for fact in ("required", "optional"))
    found = _scaling_parameters(kind, parameters, config)
    missing = [ROPE_PARAMETERS.get(name, name) for name in required if found.get(name) is None]
    if missing:
        raise ConfigError(f"the rope_type is {kind!r}, but {', '.join(missing)} is missing")
    values = {name: found[name] for name in (*required, *optional) if found.get(name) is not None}
    return {**keys, "rope_frequency_scaling": {"type": kind, **values}}


def _scaling_parameters(kind: str, parameters: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return the parameters of a scaling under their names in a model's JSON file."""
    longest = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    found = {**parameters, "original_seq_len": longest if kind == "dynamic" else original or longest}
    if kind in ("yarn", "longrope") and found.get("factor") is None and longest is not None:
        found["factor"] = longest / found["original_seq_len"]
    if kind == "proportional":
        found["fraction"] = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if kind == "yarn" and found.get("attention_factor") is None and found.get("mscale") and found.get("mscale_all_dim"):
        growth = 0.1 * math.log(max(found["factor"], 1.0))
        found["attention_factor"] = (1 + growth * found["mscale"]) / (1 + growth * found["mscale_all_dim"])
    return found


def window(config: Config) -> dict[str, Any]:
    """Return the window of all layers."""
    size = config.get("sliding_window")
    return {} if size is None else {"attn_window": size}


def layer_types(config: Config) -> dict[str, Any]:
    """Return the window and the layers that have it."""
    if not _uses_windows(config):
        return {}
    pattern = [kind == _SLIDING for kind in _layer_types(config)]
    size = {"attn_window": config["sliding_window"]}
    return size if all(pattern) else {**size, "attn_window_pattern": shortest_cycle(pattern)}


def _uses_windows(config: Config) -> bool:
    return config.get("sliding_window") is not None and _SLIDING in _layer_types(config)


def _layer_types(config: Config) -> list[str]:
    """Return the type of each layer, from the fields of version 4 of transformers if there is no list."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    layers = range(config["num_hidden_layers"])
    if "max_window_layers" in config:
        uses = bool(config.get("use_sliding_window"))
        return [_SLIDING if uses and layer >= config["max_window_layers"] else _FULL for layer in layers]
    cycle = config.get("sliding_window_pattern", 2)
    return [_SLIDING if (layer + 1) % cycle else _FULL for layer in layers]


def no_rope_layers(config: Config) -> dict[str, Any]:
    """Return which layers have rotary embeddings."""
    pattern = [bool(has_rope) for has_rope in config["no_rope_layers"]]
    return {} if all(pattern) else {"rope_pattern": shortest_cycle(pattern)}


def gemma_scales(config: Config) -> dict[str, Any]:
    """Return the scales of embeddings and attention scores."""
    keys = {"embedding_scale": config["hidden_size"] ** 0.5}
    scalar = config.get("query_pre_attn_scalar")
    return keys if scalar is None else {**keys, "attn_scale": scalar**-0.5}


def moe_loss_weight(config: Config) -> dict[str, Any]:
    """Return the weight of the load-balancing loss, which transformers multiplies by the experts of a token."""
    return {"moe_loss_weight": config["router_aux_loss_coef"] * config["num_experts_per_tok"]}


def shortest_cycle(pattern: Sequence[bool]) -> list[bool]:
    """Return the shortest list that gives `pattern` if it is repeated and cut."""
    for length in range(1, len(pattern) + 1):
        if all(entry == pattern[index % length] for index, entry in enumerate(pattern)):
            return list(pattern[:length])
    return []
