"""Remove the least important blocks, heads and hidden features of a model.

A block is important if its output differs from its input: block influence, 1 minus their mean cosine similarity
(Men et al. 2024, https://arxiv.org/abs/2403.03853). A head or a hidden feature of a feed-forward network is important
if its activations are large: their root mean square over the tokens (Muralidharan et al. 2024,
https://arxiv.org/abs/2407.14679). Key heads are removed with all query heads of their group.
Legend: B batch, T sequence, D model width, H query heads, G key heads, K head width, F hidden width, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.model_keys import in_layer
from open_lm.config.registry import FEED_FORWARDS
from open_lm.errors import ConfigError, join_problems
from open_lm.hf.exporting import keys_of
from open_lm.model.mixture_of_experts import MixtureOfExperts
from open_lm.model.params import Params
from open_lm.model.transformer import Transformer

# Second names of weights in existing checkpoints, in blocks whose feed-forward network is nn.Sequential.
_ALIASES = {"_ff_w1": "feed_forward.0", "_ff_w2": "feed_forward.2"}


@dataclass(frozen=True)
class Shape:
    """The size of a student: numbers of blocks and of query heads, and the hidden width of feed-forward networks."""

    layers: int
    heads: int
    ffn_dim: int


@dataclass(frozen=True)
class Importance:
    """Scores from activations, all float64: blocks (L,), key heads (L,G), hidden features (L,F)."""

    blocks: Tensor
    key_heads: Tensor
    features: Tensor


@dataclass(frozen=True)
class Kept:
    """What remains of a block: query heads, key heads and hidden features, ascending int64."""

    query_heads: Tensor
    key_heads: Tensor
    features: Tensor


def shape_of(params: Params) -> Shape:
    return Shape(params.n_layers, params.n_heads, params.ffn_dim)


def check_shape(params: Params, shape: Shape) -> None:
    """Raise ConfigError if a model cannot be pruned to this shape."""
    full, group = shape_of(params), params.n_heads // params.n_kv_heads
    problems = [
        f"--{name.replace('_', '-')}: found {value}, the teacher has {limit}; expected 1 to {limit}"
        for (name, value), limit in zip(vars(shape).items(), vars(full).values(), strict=True)
        if not 1 <= value <= limit
    ]
    if shape.heads % group:
        problems.append(
            f"--heads {shape.heads}: the teacher's key heads serve {group} query heads each; expected a multiple of it"
        )
    if shape.heads != full.heads and params.positional_embedding_type == "head_rotary":
        problems.append("--heads: the angles of head_rotary depend on the head, so heads cannot be removed")
    if params.moe_freq and (shape.layers != full.layers or shape.ffn_dim != full.ffn_dim):
        problems.append("--layers and --ffn-dim do not support mixtures of experts: remove these flags")
    if problems:
        raise ConfigError(join_problems(problems))


# --- importance ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(model: Transformer, batches: Iterable[Tensor]) -> Importance:
    """Compute the importance from batches of token ids (B,T) int64, in evaluation mode."""
    params, sums = model.params, dict[str, Tensor]()
    blocks = list(model.blocks())
    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(partial(_add_influence, sums, number)))
        hooks.append(block.attention.out_proj.register_forward_pre_hook(partial(_add_squares, sums, f"heads{number}")))
        if not isinstance(block.feed_forward, MixtureOfExperts):
            output = _output_matrix(block.feed_forward, params)
            hooks.append(output.register_forward_pre_hook(partial(_add_squares, sums, f"features{number}")))
    tokens = 0
    try:
        for ids in batches:
            tokens += ids.numel()
            model(ids, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ConfigError("--data has no sequence from which the importance can be measured")
    heads = torch.stack([sums[f"heads{number}"] for number in range(len(blocks))])
    squares = heads.view(len(blocks), params.n_kv_heads, -1).sum(-1)
    empty = torch.zeros(params.ffn_dim, dtype=torch.float64, device=heads.device)
    features = torch.stack([sums.get(f"features{number}", empty) for number in range(len(blocks))])
    influence = torch.stack([sums[f"block{number}"] for number in range(len(blocks))])
    results = (influence / tokens, (squares / tokens).sqrt(), (features / tokens).sqrt())
    return Importance(*(values.cpu() for values in results))


def _output_matrix(feed_forward: nn.Module, params: Params) -> nn.Module:
    (name,) = FEED_FORWARDS.fact(params.ffn_type, "outputs")
    return feed_forward.get_submodule(name)


def _add_influence(sums: dict[str, Tensor], number: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Add 1 minus the cosine similarity of a block's input and output (B,T,D), summed over the tokens."""
    similarity = F.cosine_similarity(args[0].double(), output[0].double(), dim=-1)
    _add(sums, f"block{number}", (1 - similarity).sum())


def _add_squares(sums: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Add the squares of a matrix's inputs (B,T,W), summed over the tokens: (W,)."""
    _add(sums, name, args[0].double().square().flatten(0, -2).sum(0))


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


# --- the student -----------------------------------------------------------------------------------------------------
def choose(params: Params, importance: Importance, shape: Shape) -> dict[int, Kept]:
    """Return what remains of each block that remains, by the block's number in the teacher."""
    group = params.n_heads // params.n_kv_heads
    chosen = {}
    for layer in _most_important(importance.blocks, shape.layers).tolist():
        key_heads = _most_important(importance.key_heads[layer], shape.heads // group)
        query_heads = (key_heads[:, None] * group + torch.arange(group)).flatten()
        chosen[layer] = Kept(query_heads, key_heads, _most_important(importance.features[layer], shape.ffn_dim))
    return chosen


def _most_important(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def student_keys(params: Params, layers: list[int], shape: Shape) -> dict[str, Any]:
    """Return the JSON file of a student with these blocks of the teacher; see docs/model_configs.md."""
    group = params.n_heads // params.n_kv_heads
    patterns: dict[str, Any] = {
        name: [in_layer(pattern, layer) for layer in layers]
        for name in ("attn_window_pattern", "rope_pattern")
        if (pattern := getattr(params, name)) is not None
    }
    student = replace(
        params,
        n_layers=len(layers),
        n_heads=shape.heads,
        n_kv_heads=shape.heads // group,
        ffn_dim=shape.ffn_dim,
        **patterns,
    )
    return {name: value for name, value in keys_of(student).items() if params.moe_freq or not name.startswith("moe_")}


def student_weights(weights: Mapping[str, Tensor], params: Params, chosen: Mapping[int, Kept]) -> dict[str, Tensor]:
    """Return the weights of the student, by name, from those of the teacher; names of one tensor share the result."""
    result, sliced = {}, dict[tuple[int, torch.Size], Tensor]()
    numbers = {layer: number for number, layer in enumerate(sorted(chosen))}
    for name, value in weights.items():
        prefix, _, rest = name.partition("layers.")
        if prefix or not rest:
            result[name] = value
            continue
        layer, _, path = rest.partition(".")
        if int(layer) in numbers:
            key = value.data_ptr(), value.shape
            if key not in sliced:
                sliced[key] = _slice(path, value, params, chosen[int(layer)])
            result[f"layers.{numbers[int(layer)]}.{path}"] = sliced[key]
    return result


def _slice(path: str, value: Tensor, params: Params, kept: Kept) -> Tensor:
    """Return the remaining rows and columns of a block's tensor."""
    module, _, kind = path.rpartition(".")
    module = _ALIASES.get(module, module)
    queries, keys = _features_of(kept.query_heads, params.head_dim), _features_of(kept.key_heads, params.head_dim)
    width, key_width = params.n_heads * params.head_dim, params.n_kv_heads * params.head_dim
    rows: dict[str, Tensor] = {
        "attention.in_proj": torch.cat([queries + part * width for part in range(3)]),
        "attention.q_proj": queries,
        "attention.kv_proj": torch.cat([keys, keys + key_width]),
    }
    if not params.qk_norm_per_head:
        rows |= {"attention.q_norm": queries, "attention.k_norm": keys}
    columns = {"attention.out_proj": queries}
    if not params.moe_freq:
        for name, parts in FEED_FORWARDS.fact(params.ffn_type, "inputs").items():
            features = [kept.features + part * params.ffn_dim for part in range(parts)]
            rows[f"feed_forward.{name}"] = torch.cat(features)
        columns |= {f"feed_forward.{name}": kept.features for name in FEED_FORWARDS.fact(params.ffn_type, "outputs")}
    if module in rows:
        return value[rows[module]]
    return value[:, columns[module]] if module in columns and kind == "weight" else value


def _features_of(heads: Tensor, width: int) -> Tensor:
    """Return the features of heads (n,): int64 (n * width,)."""
    return (heads[:, None] * width + torch.arange(width)).flatten()
