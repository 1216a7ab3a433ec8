"""Find keys of a model's JSON file that have no effect because of other keys. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from open_lm.config.model_keys import ModelKeys, feed_forward_width, in_layer
from open_lm.config.registry import FEED_FORWARDS, POSITIONAL_EMBEDDINGS

Values = Mapping[str, Any]
_ROPE_KEYS = ("rope_base", "rope_local_base", "rope_fraction", "rope_frequency_scaling")


def keys_without_effect(values: Values) -> dict[str, str]:
    """Return the keys of ModelKeys that differ from their defaults and have no effect, with one sentence for each.

    `values` are keys of a file, and of the flags of the same names where they are known. Keys of ModelKeys that are
    missing have their defaults. Conditions on other keys that are missing are not checked.
    """
    all_values = {**{spec.name: spec.default for spec in ModelKeys.specs()}, **values}
    problems: dict[str, str] = {}
    for names, needed, has_effect, reason in _CONDITIONS:
        if all(name in all_values for name in needed) and not has_effect(all_values):
            for name in names:
                if not _is_default(name, all_values):
                    problems.setdefault(name, f"{name} has no effect {reason}; remove it, or change the other key")
    return problems


def _is_default(name: str, values: Values) -> bool:
    """Return whether a key has its default, or the value that is derived for it if it is missing."""
    value = values[name]
    (default,) = (spec.default for spec in ModelKeys.specs() if spec.name == name)
    if value == default:
        return True
    if name == "moe_ffn_dim":
        return bool(value == 4 * values["hidden_dim"])
    ffn_type = values.get("ffn_type")
    if name == "ffn_bias" and ffn_type in FEED_FORWARDS:
        return bool(value == FEED_FORWARDS.fact(str(ffn_type), "bias", False))
    if name == "ffn_dim" and ffn_type in FEED_FORWARDS:
        return bool(value == feed_forward_width(str(ffn_type), values["hidden_dim"]))
    return False


def _has_window(values: Values) -> bool:
    return any(in_layer(values["attn_window_pattern"], layer) for layer in range(values["n_layers"]))


def _is_rotated(values: Values) -> bool:
    return any(in_layer(values["rope_pattern"], layer) for layer in range(values["n_layers"]))


def _has_rotary(values: Values) -> bool:
    name = values["positional_embedding_type"]
    return name not in POSITIONAL_EMBEDDINGS or bool(POSITIONAL_EMBEDDINGS.fact(name, "rotates", True))


# Keys, the keys that the condition reads, the condition under which they have an effect, and the reason otherwise. The
# first reason is reported.
_CONDITIONS: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Values], bool], str], ...] = (
    (("attn_window_pattern", "rope_local_base"), (), lambda v: v["attn_window"] is not None, "without attn_window"),
    (("attn_window",), ("n_layers",), _has_window, "because attn_window_pattern is false for all layers"),
    (("qk_norm_per_head",), ("qk_norm",), lambda v: bool(v["qk_norm"]), "without qk_norm"),
    (
        (*_ROPE_KEYS, "rope_pattern"),
        ("positional_embedding_type",),
        _has_rotary,
        "without rotary embeddings (positional_embedding_type)",
    ),
    (_ROPE_KEYS, ("n_layers",), _is_rotated, "because rope_pattern is false for all layers"),
    (
        ("moe_ffn_type", "moe_ffn_dim", "moe_normalize_scores", "moe_loss_scope"),
        ("moe_freq",),
        lambda v: v["moe_freq"] > 0,
        "without moe_freq",
    ),
    (
        ("ffn_dim", "ffn_bias"),
        ("moe_freq",),
        lambda v: v["moe_freq"] != 1,
        "because moe_freq 1 puts experts in all blocks",
    ),
)
