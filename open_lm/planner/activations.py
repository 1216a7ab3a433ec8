"""What the forward pass keeps for the backward pass, as one table: here a change of the model is followed.

Every entry is a tensor that autograd holds, found by torch.autograd.graph.saved_tensors_hooks on a block and compared
with torch's memory tracker by scripts/check_plan.py. Eager execution is assumed; compiled blocks keep less.
Legend: D model width, W width of all heads, H heads, F hidden width of the feed-forward network, E experts,
k experts of a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from open_lm.config.sections import Config
from open_lm.planner.shapes import ModelShape

Split = Literal["tokens", "features", "whole"]


@dataclass(frozen=True)
class Types:
    """Bytes of one number: `stored` parameters and moments, `gathered` parameters as FSDP gathers them and gradients
    before their reduction, `reduced` gradients on the way, `compute` of matrix products, `residual` stream. `autocast`:
    whether matrices are cast for each use. `norms`: what every norm computes in; 0: in the type of its input."""

    stored: int
    gathered: int
    reduced: int
    compute: int
    residual: int
    autocast: bool
    norms: int = 0


def types_of(config: Config, device_type: str = "cuda") -> Types:
    """The number formats that --precision, --fsdp-amp, --fsdp-pure-bf16 and --model-norm make."""
    precision, parallel = config.precision.precision, config.parallel
    stored = 2 if precision in ("bf16", "fp16") else 4
    mixed = parallel.fsdp and (parallel.fsdp_amp or parallel.fsdp_pure_bf16)
    gathered = 2 if mixed else stored
    reduced = 4 if mixed and parallel.fsdp_amp else gathered
    autocast = precision.startswith("amp")
    # The embedding gives the residual stream its type, and no addition to it is wider than float32.
    residual, compute = gathered, 2 if autocast else gathered
    norms = 0
    if autocast and "lp_layer_norm" in config.model.model_norm:
        norms = compute
    elif autocast and device_type == "cuda":
        norms = 4  # autocast runs norms in float32 there, and not on CPU
    return Types(stored, gathered, reduced, compute, residual, autocast, norms)


@dataclass(frozen=True)
class Kept:
    """Tensors of `features` numbers of `bytes` for each token. `split`: what tensor parallelism divides."""

    name: str
    features: float
    bytes: int
    split: Split = "features"


def total_bytes(kept: Iterable[Kept], tokens: int, tensor: int = 1) -> int:
    """Bytes on one of `tensor` ranks that share `tokens`."""
    return round(sum(k.features * k.bytes * tokens / (1 if k.split == "whole" else tensor) for k in kept))


def kept_by_block(shape: ModelShape, types: Types, block: int, context: int = 1) -> list[Kept]:
    """What block number `block` keeps where `context` ranks share rows. Mirrors model.Block."""
    return [
        *_norm("attention_norm", shape, types),
        *_attention(shape, types, context),
        *_norm("ffn_norm", shape, types),
        *(_experts(shape, types) if shape.has_experts(block) else _feed_forward(shape, types)),
    ]


def kept_by_op(shape: ModelShape, types: Types, block: int) -> list[Kept]:
    """What --activation-checkpointing op keeps of a block: its input, and what matrix products and attention give."""
    width, hidden, c = shape.width, shape.hidden, types.compute
    kept = [
        Kept("input", shape.dim, types.residual, "tokens"),
        Kept("in_proj", 3 * width, c),
        Kept("attention", width, c),
        Kept("logsumexp", shape.n_heads, 4),
        Kept("out_proj", shape.dim, c, "tokens"),
    ]
    if shape.has_experts(block):
        slots = shape.moe_capacity_factor * shape.moe_top_k
        return [*kept, Kept("router", shape.moe_num_experts, c), Kept("experts", slots * 5 * shape.dim, c)]
    into = hidden if shape.ffn_type == "gelu" else 2 * hidden
    return [*kept, Kept("feed_forward in", into, c), Kept("feed_forward out", shape.dim, c, "tokens")]


def transient_of_block(shape: ModelShape, types: Types, block: int) -> list[Kept]:
    """What the backward pass of a block has at its peak beyond what the block keeps: gradients in its feed-forward."""
    c = types.compute
    if shape.has_experts(block):
        slots = shape.moe_capacity_factor * shape.moe_top_k
        return [Kept("experts", slots * 4 * shape.dim, c), Kept("gradients", shape.moe_top_k * shape.dim, c)]
    gated = shape.ffn_type != "gelu"
    return [
        Kept("feed_forward", (2 if gated else 1) * shape.hidden, c),
        Kept("gradient of the output", shape.dim, types.residual, "tokens"),
        Kept("its cast", shape.dim if types.autocast and types.residual != c else 0, c, "whole"),
    ]


def kept_at_the_end(shape: ModelShape, types: Types) -> list[Kept]:
    """The last norm's and the head's inputs, and the ids and targets."""
    return [*_norm("norm", shape, types), Kept("head", shape.dim, types.compute, "whole"), Kept("ids", 2, 8, "whole")]


def _norm(name: str, shape: ModelShape, types: Types, width: int = 0, split: Split = "tokens") -> list[Kept]:
    """Mirrors norms.py. Where a norm computes in the input's type it keeps the input, else a copy in its own."""
    width = width or shape.dim
    if shape.model_norm == "rms_norm":
        return [
            Kept(f"{name} in float32", width, 4, split),
            Kept(f"{name} before the gain", width, types.residual, split),
            Kept(f"{name} scale", 1, 4, split),
        ]
    return [Kept(f"{name} input", width, types.norms or types.residual, split), Kept(f"{name} statistics", 2, 4, split)]


def _attention(shape: ModelShape, types: Types, context: int) -> list[Kept]:
    """Mirrors model.Attention with a kernel that never holds the scores, positional_embedding/rotary.py, and
    context_parallel.py, where keys and values are those of all ranks."""
    width, c = shape.width, types.compute
    kept = [Kept("in_proj input", shape.dim, c, "whole"), Kept("queries, keys, values", 3 * width, c)]
    if context > 1:
        kept.append(Kept("gathered keys, values", 2 * width * context, c))
    if shape.qk_norm:
        # On the layer's own output, which is kept as it is, but for a norm that computes in another type.
        if types.norms not in (0, c):
            kept += [Kept("queries, keys for their norms", 2 * width, types.norms)]
        kept += [Kept("statistics", 4, 4)]
    if shape.positional_embedding_type != "none" or shape.qk_norm:
        kept.append(Kept("rotated queries, keys", 2 * width, c))
    return [*kept, Kept("attention", width, c), Kept("logsumexp", shape.n_heads, 4)]


def _feed_forward(shape: ModelShape, types: Types) -> list[Kept]:
    """Mirrors feed_forward.py."""
    hidden, c = shape.hidden, types.compute
    if shape.ffn_type == "gelu":
        return [Kept("input", shape.dim, c, "whole"), Kept("0", hidden, c), Kept("gelu", hidden, c)]
    # geglu's two projections each cast their input anew.
    casts = 2 if shape.ffn_type == "gemma_geglu" and types.autocast and types.residual != c else 1
    return [
        Kept("input", casts * shape.dim, c, "whole"),
        Kept("gate, up", 2 * hidden, c),
        Kept("activated gate", hidden, c),
        Kept("product", hidden, c),
    ]


def _experts(shape: ModelShape, types: Types) -> list[Kept]:
    """Mirrors mixture_of_experts.MixtureOfExperts with bounded capacity."""
    dim, k, c = shape.dim, shape.moe_top_k, types.compute
    slots = shape.moe_capacity_factor * k if shape.moe_capacity_factor > 0 else float(k)
    return [
        Kept("router", dim, c, "whole"),
        Kept("scores", shape.moe_num_experts, 4, "whole"),
        Kept("tokens, once for each choice", k * dim, types.residual, "whole"),
        Kept("slots", slots * dim, c, "whole"),
        Kept("hidden, before and after gelu", 2 * slots * 4 * dim, c, "whole"),
        Kept("picked", k * dim, c, "whole"),
    ]
