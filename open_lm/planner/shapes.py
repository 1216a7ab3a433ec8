"""Compute the weights of a model by name and size, and its FLOPs, from its configuration only.

Mirrors the modules of open_lm.model; tests compare the result with the parameters of real models.
Legend: D model width, K head width, W width of all heads, F hidden width of a feed-forward network, E experts,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from open_lm.config.architecture import resolve_architecture
from open_lm.config.model_keys import attended_tokens, feed_forward_width
from open_lm.config.registry import FEED_FORWARDS, NORMS
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError

Role = Literal["embedding", "head", "norm", "in", "out", "expert", "router"]


@dataclass(frozen=True)
class Weight:
    """A parameter. Tensor parallelism shards the rows of role "in" and the columns of role "out".

    A weight with key_heads is sharded only if the ranks divide this number, and replicated otherwise.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    block: int | None = None
    parts: int = 1  # matrices that a fused weight holds, one below the other
    key_heads: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(U, m, n): the U matrices of m x n that Muon updates separately in this weight.

        A fused weight such as in_proj holds one matrix for each of its layers.
        """
        *experts, m, n = self.shape
        return math.prod(experts) * self.parts, m // self.parts, n

    def local_shape(self, tensor: int, expert: int = 1) -> tuple[int, ...]:
        """Return the shape of the largest local shard with `tensor` tensor-parallel ranks, or with `expert` ranks that
        divide the experts."""
        if self.role == "expert" and expert > 1:
            return (self.shape[0] // expert, *self.shape[1:])
        if self.key_heads % tensor:
            return self.shape
        if self.role in ("in", "embedding", "head"):
            return (-(-self.shape[0] // tensor), *self.shape[1:])
        if self.role == "out" and len(self.shape) == 2:
            return (self.shape[0], -(-self.shape[1] // tensor))
        if self.role == "expert":
            divided = 1 if self.name.endswith("w2") else 2
            return tuple(-(-size // tensor) if dim == divided else size for dim, size in enumerate(self.shape))
        return self.shape


@dataclass(frozen=True)
class ModelShape:
    """The settings that determine the size of a model; names as in model.Params."""

    name: str
    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    seq_len: int
    weight_tying: bool
    post_embed_norm: bool
    model_norm: str
    qk_norm: bool
    positional_embedding_type: str
    ffn_type: str
    moe_freq: int
    moe_num_experts: int
    moe_top_k: int
    moe_capacity_factor: float
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool
    attn_out_bias: bool
    qk_norm_per_head: bool
    attn_window: int | None
    attn_window_pattern: list[bool] | None
    ffn_dim: int
    ffn_bias: bool
    moe_ffn_type: str
    moe_ffn_dim: int
    norm_position: str
    parallel_block: bool
    head_bias: bool
    residual_dropout: float

    @property
    def width(self) -> int:
        """W, the width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """The width of all key heads together, and of all value heads."""
        return self.n_kv_heads * self.head_dim

    @property
    def kv_cache_values(self) -> int:
        """The number of values that a KV cache holds per token."""
        return 2 * self.n_layers * self.kv_width

    @property
    def hidden(self) -> int:
        """F, the hidden width of a feed-forward network."""
        return self.ffn_dim

    @property
    def expert_inputs(self) -> int:
        """The number of matrices D -> F of an expert."""
        return 2 if self.moe_ffn_type == "swiglu" else 1

    @property
    def block_norms(self) -> tuple[str, ...]:
        """The norms of a block, of width D."""
        before = ("attention_norm",) if self.parallel_block else ("attention_norm", "ffn_norm")
        after = ("attention_post_norm", "ffn_post_norm")
        return {"pre": before, "post": after, "both": (*before, *after)}[self.norm_position]

    @property
    def ffn_inputs(self) -> dict[str, int]:
        """The input matrices of a feed-forward network by name, with the multiple of F that each returns."""
        inputs: dict[str, int] = FEED_FORWARDS.required_fact(self.ffn_type, "inputs")
        return inputs

    def has_experts(self, block: int) -> bool:
        """Return whether a block has a mixture of experts in place of a feed-forward network."""
        return self.moe_freq > 0 and block % self.moe_freq == 0

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All parameters, in the order of the model."""
        return tuple(self._weights())

    @cached_property
    def by_block(self) -> dict[int | None, tuple[Weight, ...]]:
        """The parameters of each block by its number; None holds those outside of blocks."""
        by_block: dict[int | None, list[Weight]] = {}
        for weight in self.weights:
            by_block.setdefault(weight.block, []).append(weight)
        return {block: tuple(weights) for block, weights in by_block.items()}

    @cached_property
    def kinds(self) -> list[tuple[tuple[Weight, ...], int]]:
        """(parameters, count) pairs: the parameters outside of blocks once, and each kind of block with its
        number of occurrences."""
        kinds = [self.has_experts(block) for block in range(self.n_layers)]
        return [
            (self.by_block[None], 1),
            *((self.by_block[kinds.index(kind)], kinds.count(kind)) for kind in dict.fromkeys(kinds)),
        ]

    @cached_property
    def num_params(self) -> int:
        """The number of parameters."""
        return sum(weight.size for weight in self.weights)

    @property
    def flops_per_token(self) -> float:
        """The FLOPs per token of a forward and backward pass without recomputation.

        Equals metrics.model_flops_per_token.
        """
        active = float(self.num_params)
        if not self.weight_tying:
            active -= self.vocab_size * self.dim
        unused = 1 - self.moe_top_k / self.moe_num_experts if self.moe_num_experts else 0.0
        active -= sum(round(unused * weight.size) for weight in self.weights if weight.role == "expert")
        return 6.0 * active + self.attention_flops_per_token

    @property
    def attention_flops_per_token(self) -> float:
        """The part of `flops_per_token` that computes attention."""
        return 12.0 * self.width * attended_tokens(self)

    def _weights(self) -> Iterator[Weight]:
        yield Weight("tok_embeddings.weight", (self.vocab_size, self.dim), "embedding")
        if self.post_embed_norm:
            yield from self._norm("post_embed_norm", self.dim)
        for block in range(self.n_layers):
            yield from self._block(block)
        yield from self._norm("norm", self.dim)
        if not self.weight_tying:
            yield Weight("output.weight", (self.vocab_size, self.dim), "head")
        if self.head_bias:
            yield Weight("output.bias", (self.vocab_size,), "head")

    def _norm(self, name: str, width: int, block: int | None = None) -> Iterator[Weight]:
        for part in NORMS.required_fact(self.model_norm, "parameters"):
            yield Weight(f"{name}.{part}", (width,), "norm", block)

    def _block(self, block: int) -> Iterator[Weight]:
        prefix = f"layers.{block}."
        yield from self._attention(prefix + "attention.", block)
        yield from self._feed_forward(prefix + "feed_forward.", block)
        for name in self.block_norms:
            yield from self._norm(prefix + name, self.dim, block)

    def _attention(self, prefix: str, block: int) -> Iterator[Weight]:
        dim, width, kv_width = self.dim, self.width, self.kv_width
        projections = [("in_proj", 3 * width, 3, 0)]
        if kv_width < width:
            projections = [("q_proj", width, 1, 0), ("kv_proj", 2 * kv_width, 2, self.n_kv_heads)]
        for name, rows, parts, key_heads in projections:
            yield Weight(f"{prefix}{name}.weight", (rows, dim), "in", block, parts, key_heads)
            if self.qkv_bias:
                yield Weight(f"{prefix}{name}.bias", (rows,), "in", block, key_heads=key_heads)
        yield Weight(prefix + "out_proj.weight", (dim, width), "out", block)
        if self.attn_out_bias:
            yield Weight(prefix + "out_proj.bias", (dim,), "out", block)
        if self.qk_norm:
            for name, norm_width in (("q_norm", width), ("k_norm", kv_width)):
                yield from self._norm(prefix + name, self.head_dim if self.qk_norm_per_head else norm_width, block)

    def _feed_forward(self, prefix: str, block: int) -> Iterator[Weight]:
        dim, hidden = self.dim, self.hidden
        if self.has_experts(block):
            experts, width = self.moe_num_experts, self.moe_ffn_dim
            yield Weight(prefix + "router.layer.weight", (experts, dim), "router", block)
            yield Weight(prefix + "experts.mlp.w1", (experts, dim, width), "expert", block)
            yield Weight(prefix + "experts.mlp.w2", (experts, width, dim), "expert", block)
            if self.expert_inputs == 2:
                yield Weight(prefix + "experts.mlp.w3", (experts, dim, width), "expert", block)
            return
        has_bias = self.ffn_bias
        for name, parts in self.ffn_inputs.items():
            yield Weight(f"{prefix}{name}.weight", (parts * hidden, dim), "in", block, parts)
            if has_bias:
                yield Weight(f"{prefix}{name}.bias", (parts * hidden,), "in", block)
        for name in FEED_FORWARDS.required_fact(self.ffn_type, "outputs"):
            yield Weight(f"{prefix}{name}.weight", (dim, hidden), "out", block)
            if has_bias:
                yield Weight(f"{prefix}{name}.bias", (dim,), "out", block)


def shape_of(cfg: ModelConfig) -> ModelShape:
    """Return the shape of the model that the flags select. Settings of the model file override the flags.

    Raises:
        ConfigError: a model that the planner does not support, or a missing setting.
    """
    if cfg.hf_model is not None:
        raise ConfigError(
            f"--hf-model {cfg.hf_model}: the planner supports only OpenLM models; pass --model with a configuration "
            "of the same size"
        )
    settings = resolve_architecture(cfg)
    if not settings["moe_freq"]:
        settings["moe_num_experts"] = 0
    elif not settings["moe_num_experts"]:
        raise ConfigError("--moe-num-experts is missing: expected at least 1 because --moe-freq is set")
    dim, heads, ffn_type = settings["hidden_dim"], settings["n_heads"], settings["ffn_type"]
    derived = {
        "n_kv_heads": heads,
        "head_dim": dim // heads,
        "ffn_dim": feed_forward_width(ffn_type, dim),
        "ffn_bias": bool(FEED_FORWARDS.fact(ffn_type, "bias", False)),
        "moe_ffn_dim": 4 * dim,
    }
    settings |= {name: value for name, value in derived.items() if settings[name] is None}
    settings |= {"name": cfg.model, "dim": dim}
    return ModelShape(**{field.name: settings[field.name] for field in fields(ModelShape)})
