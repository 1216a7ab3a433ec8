"""Compute the weights of a model by name and size, and its FLOPs, from its configuration only.

Mirrors the modules of open_lm.model; tests compare the result with the parameters of real models.
Legend: D model width, W width of all heads, F hidden width of a feed-forward network, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from open_lm.config.architecture import gated_width, resolve_architecture
from open_lm.config.registry import FEED_FORWARDS, NORMS
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError

Role = Literal["embedding", "head", "norm", "in", "out", "expert", "router"]


@dataclass(frozen=True)
class Weight:
    """A parameter. Tensor parallelism shards the rows of role "in" and the columns of role "out"."""

    name: str
    shape: tuple[int, ...]
    role: Role
    block: int | None = None
    parts: int = 1  # matrices that a fused weight holds, one below the other

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

    def local_shape(self, tensor: int) -> tuple[int, ...]:
        """Return the shape of the largest local shard with `tensor` tensor-parallel ranks."""
        if self.role in ("in", "embedding", "head"):
            return (-(-self.shape[0] // tensor), *self.shape[1:])
        if self.role == "out" and len(self.shape) == 2:
            return (self.shape[0], -(-self.shape[1] // tensor))
        if self.role == "expert":
            divided = 2 if self.name.endswith("w1") else 1
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

    @property
    def width(self) -> int:
        """W, the width of all heads together."""
        return self.n_heads * (self.dim // self.n_heads)

    @property
    def hidden(self) -> int:
        """F, the hidden width of a feed-forward network."""
        return 4 * self.dim if FEED_FORWARDS.required_fact(self.ffn_type, "hidden") == "4x" else gated_width(self.dim)

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
        return 6.0 * active + 12.0 * self.n_layers * self.width * self.seq_len

    def _weights(self) -> Iterator[Weight]:
        yield Weight("tok_embeddings.weight", (self.vocab_size, self.dim), "embedding")
        if self.post_embed_norm:
            yield from self._norm("post_embed_norm", self.dim)
        for block in range(self.n_layers):
            yield from self._block(block)
        yield from self._norm("norm", self.dim)
        if not self.weight_tying:
            yield Weight("output.weight", (self.vocab_size, self.dim), "head")

    def _norm(self, name: str, width: int, block: int | None = None) -> Iterator[Weight]:
        for part in NORMS.required_fact(self.model_norm, "parameters"):
            yield Weight(f"{name}.{part}", (width,), "norm", block)

    def _block(self, block: int) -> Iterator[Weight]:
        prefix, dim, width = f"layers.{block}.", self.dim, self.width
        yield Weight(prefix + "attention.in_proj.weight", (3 * width, dim), "in", block, parts=3)
        yield Weight(prefix + "attention.out_proj.weight", (dim, width), "out", block)
        if self.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield from self._norm(f"{prefix}attention.{name}", width, block)
        yield from self._feed_forward(prefix + "feed_forward.", block)
        for name in ("attention_norm", "ffn_norm"):
            yield from self._norm(prefix + name, dim, block)

    def _feed_forward(self, prefix: str, block: int) -> Iterator[Weight]:
        dim, hidden = self.dim, self.hidden
        if self.has_experts(block):
            experts = self.moe_num_experts
            yield Weight(prefix + "router.layer.weight", (experts, dim), "router", block)
            yield Weight(prefix + "experts.mlp.w1", (experts, dim, 4 * dim), "expert", block)
            yield Weight(prefix + "experts.mlp.w2", (experts, 4 * dim, dim), "expert", block)
            return
        has_bias = FEED_FORWARDS.fact(self.ffn_type, "bias", False)
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
    settings |= {"name": cfg.model, "dim": settings["hidden_dim"]}
    return ModelShape(**{field.name: settings[field.name] for field in fields(ModelShape)})
