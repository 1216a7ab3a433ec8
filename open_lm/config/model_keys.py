"""The keys of a model's JSON file that have no flag: each is a field with its type, default and meaning. No torch.

docs/model_configs.md describes all keys of a file. D model width, H heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from open_lm.config.fields import Section
from open_lm.config.registry import FEED_FORWARDS, ROPE_SCALINGS

MUP_KEYS = ("mup", "mup_base_width", "mup_base_head_dim")  # flags; a file may contain them too
NORM_POSITIONS = ("pre", "post", "both")
EXPERT_TYPES = ("gelu_tanh", "swiglu")
MOE_LOSS_SCOPES = ("layer", "model")
_SQRT_TOLERANCE = 0.01  # relative
# The parameters of rope_frequency_scaling that are not numbers.
_SWITCH, _LISTS = "truncate", ("short_factor", "long_factor")


def key(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """Declare a key with its default and meaning."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class ModelKeys(Section):
    """The keys of a model's JSON file that have no flag."""

    # attention
    n_kv_heads: int | None = key(
        None, "number of key and value heads, each shared by n_heads / n_kv_heads query heads; default: n_heads"
    )
    head_dim: int | None = key(None, "width K of a head; default: hidden_dim // n_heads")
    qkv_bias: bool = key(False, "add biases to queries, keys and values")
    attn_out_bias: bool = key(False, "add a bias to the output projection of attention")
    qk_norm_per_head: bool = key(
        False, "qk_norm normalizes each head separately, with one gain of width K for all heads of a layer"
    )
    attn_scale: float | None = key(None, "factor of the attention scores; default: 1/sqrt(K)")
    attn_soft_cap: float | None = key(None, "limit c of the attention scores s: c tanh(s / c); default: no limit")
    attn_window: int | None = key(
        None, "number of latest positions, including its own, that a query attends to; default: all"
    )
    attn_window_pattern: list[bool] | None = key(
        None, "which layers use attn_window; repeated until the last layer; default: all layers"
    )
    # rotary embeddings
    rope_base: float = key(10000.0, "base b of the rotary angles: pair i of K features turns by b^(-2i/K) per position")
    rope_local_base: float | None = key(
        None,
        "base in layers with a window, where rope_frequency_scaling then does not apply; default: as in all layers",
    )
    rope_fraction: float = key(1.0, "share of a head's features, from the first on, that is rotated")
    rope_frequency_scaling: dict | None = key(  # a plain class, for isinstance
        None, "scaling of the rotary frequencies, an object with `type` and its parameters"
    )
    rope_pattern: list[bool] | None = key(
        None, "which layers have rotary embeddings; repeated until the last layer; default: all layers"
    )
    # feed-forward networks
    ffn_dim: int | None = key(None, "hidden width of the feed-forward networks; default: depends on ffn_type")
    ffn_bias: bool | None = key(None, "whether feed-forward networks have biases; default: depends on ffn_type")
    moe_ffn_type: str = key("gelu_tanh", "network of an expert", choices=EXPERT_TYPES)
    moe_ffn_dim: int | None = key(None, "hidden width of an expert; default: 4 hidden_dim")
    moe_normalize_scores: bool = key(False, "divide the scores of a token's experts by their sum")
    moe_loss_scope: str = key(
        "layer",
        "load-balancing loss: the mean of the layers' losses (layer), or one loss of the tokens of all layers (model)",
        choices=MOE_LOSS_SCOPES,
    )
    # blocks
    norm_eps: float = key(1e-5, "number that norms add to the variance or mean square")
    norm_position: str = key(
        "pre",
        "norms of the inputs of attention and feed-forward network (pre), of their outputs (post), or of both",
        choices=NORM_POSITIONS,
    )
    parallel_block: bool = key(False, "feed attention and feed-forward network with the output of one norm")
    # embeddings and head
    embedding_scale: float = key(1.0, "factor of the token embeddings, rounded to their dtype")
    head_bias: bool = key(False, "add a bias to the logits")
    logit_soft_cap: float | None = key(None, "limit c of the logits l: c tanh(l / c); default: no limit")
    unpadded_vocab_size: int | None = key(
        None, "number of token ids; further rows of vocab_size are padding with probability 0; default: vocab_size"
    )
    # dropout
    embedding_dropout: float = key(0.0, "in training, share of the embeddings' features that is set to 0")
    attn_dropout: float = key(0.0, "in training, share of the attention weights that is set to 0")
    residual_dropout: float = key(
        0.0, "in training, share of the outputs of attention and feed-forward network that is set to 0"
    )


def scales_with_width(embedding_scale: float, width: int) -> bool:
    """Return whether the embeddings' scale is sqrt(D), as in Gemma, which rounds it to the embeddings' dtype."""
    return math.isclose(embedding_scale, math.sqrt(width), rel_tol=_SQRT_TOLERANCE)


def relation_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of values of the right types; their keys are names in a model's JSON file.

    Keys that are missing have their defaults.
    """
    defaults = {spec.name: spec.default for spec in ModelKeys.specs()}
    all_values: dict[str, Any] = {**defaults, **values}
    get: Callable[[str], Any] = all_values.get
    problems = [
        f"{name} is {get(name)}, expected at least 1"
        for name in (
            *("n_kv_heads", "head_dim", "ffn_dim", "moe_ffn_dim", "attn_window", "unpadded_vocab_size"),
            *("mup_base_width", "mup_base_head_dim"),
        )
        if get(name) is not None and get(name) < 1
    ]
    problems += [
        f"{name} is {get(name)}, expected a number above 0"
        for name in (
            *("norm_eps", "attn_scale", "attn_soft_cap", "logit_soft_cap", "rope_base", "rope_local_base"),
            *("rope_fraction", "embedding_scale"),
        )
        if get(name) is not None and not get(name) > 0
    ]
    problems += [
        f"{name} is {get(name)}, expected a number from 0 to below 1"
        for name in ("embedding_dropout", "attn_dropout", "residual_dropout")
        if not 0 <= get(name) < 1
    ]
    problems += [
        f"{name} is empty, expected true or false for each layer of the pattern"
        for name in ("attn_window_pattern", "rope_pattern")
        if get(name) == []
    ]
    heads, kv_heads = get("n_heads"), get("n_kv_heads")
    if heads and kv_heads and kv_heads > 0 and heads % kv_heads:
        problems.append(f"n_kv_heads is {kv_heads}, expected a divisor of n_heads {heads}")
    if get("rope_fraction") > 1:
        problems.append(f"rope_fraction is {get('rope_fraction')}, expected at most 1")
    if get("unpadded_vocab_size") and "vocab_size" in values and get("unpadded_vocab_size") > values["vocab_size"]:
        problems.append(f"unpadded_vocab_size is {get('unpadded_vocab_size')}, above vocab_size {values['vocab_size']}")
    return [*problems, *_mup_problems(get), *_rope_frequency_scaling_problems(get("rope_frequency_scaling"))]


def _mup_problems(get: Callable[[str], Any]) -> list[str]:
    width, heads = get("mup_base_width"), get("n_heads")
    if not get("mup"):
        return []
    if width is None:
        return ["--mup requires --mup-base-width, the hidden_dim of the model whose learning rate was tuned"]
    if heads and width < heads and not get("mup_base_head_dim") and not get("head_dim"):
        return [
            f"--mup-base-width is {width}, less than n_heads {heads}, so the base model cannot have as many heads; "
            "set --mup-base-head-dim, the width of its heads"
        ]
    return []


def _rope_frequency_scaling_problems(scaling: Mapping[str, Any] | None) -> list[str]:
    if scaling is None:
        return []
    kind = scaling.get("type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        types = ", ".join(ROPE_SCALINGS)
        return [f"rope_frequency_scaling has type {kind!r}, expected one of {types}; others are not supported"]
    label = f"rope_frequency_scaling of type {kind}"
    required, optional = (ROPE_SCALINGS.fact(kind, fact, ()) for fact in ("required", "optional"))
    problems = [f"{label}: {name} is missing" for name in required if name not in scaling]
    known = {"type", *required, *optional}
    problems += [f"{label}: the key {name} is unknown" for name in sorted(set(scaling) - known)]
    problems += [_parameter_problem(label, name, scaling[name]) for name in (*required, *optional) if name in scaling]
    return [problem for problem in problems if problem]


def _parameter_problem(label: str, name: str, value: object) -> str:
    if name == _SWITCH:
        return "" if isinstance(value, bool) else f"{label}: {name} is {value!r}, expected true or false"
    if name in _LISTS:
        valid = isinstance(value, list) and bool(value) and all(_is_positive(number) for number in value)
        return "" if valid else f"{label}: {name} is {value!r}, expected a list of numbers above 0"
    return "" if _is_positive(value) else f"{label}: {name} is {value!r}, expected a number above 0"


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def feed_forward_width(ffn_type: str, dim: int) -> int:
    """Return the default hidden width of a feed-forward network, an entry of FEED_FORWARDS."""
    return 4 * dim if FEED_FORWARDS.required_fact(ffn_type, "hidden") == "4x" else gated_width(dim)


def gated_width(dim: int) -> int:
    """Return the hidden width of a gated feed-forward network: 8/3 of `dim`, rounded up to a multiple of 256."""
    return 256 * -(-int(8 * dim / 3) // 256)


def attended_tokens(settings: Any) -> float:
    """Return twice the mean number of keys that a query of a full sequence attends to, summed over the layers.

    It is seq_len for a layer without a window, by convention of the FLOPs of attention (which ignores the causal mask).
    `settings` has the attributes n_layers, seq_len, attn_window and attn_window_pattern.
    """
    length, window = settings.seq_len, settings.attn_window
    if window is None or window >= length:
        return float(settings.n_layers * length)
    layers = sum(in_layer(settings.attn_window_pattern, layer) for layer in range(settings.n_layers))
    return layers * window * (2 - window / length) + (settings.n_layers - layers) * length


def in_layer(pattern: list[bool] | None, layer: int) -> bool:
    """Return the entry of a pattern for a layer, counted from 0. Patterns repeat; None is true for all layers."""
    return pattern is None or pattern[layer % len(pattern)]
