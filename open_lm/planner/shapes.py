"""A model's weights by name and size, and its FLOPs, from its configuration alone.

Mirrors model.py, feed_forward.py and mixture_of_experts.py; tests compare it with their parameters.
Legend: D model width, W width of all heads, F hidden width of a feed-forward network, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from open_lm.config.architecture import architecture_of, gated_width
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError

Role = Literal["embedding", "head", "norm", "in", "out", "expert", "router"]
NORM_VECTORS = {"no_wb_layer_norm": (), "gain_only_lp_layer_norm": ("weight",), "gain_only_layer_norm": ("weight",),
                "rms_norm": ("weight",)}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A parameter. `role`: "in" where tensor parallelism divides rows, "out" where it divides columns."""

    name: str
    shape: tuple[int, ...]
    role: Role
    block: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(U, m, n): the matrices that Muon sees in it; weights that several layers share hold one for each."""
        *experts, m, n = self.shape
        parts = {"in_proj": 3, "w12": 2}.get(self.name.split(".")[-2], 1)
        return math.prod(experts) * parts, m // parts, n

    def part(self, tensor: int) -> tuple[int, ...]:
        """The shape of the largest part when `tensor` ranks divide it."""
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
    """What a model's size follows from; names as in model.Params."""

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
        """W."""
        return self.n_heads * (self.dim // self.n_heads)

    @property
    def hidden(self) -> int:
        """F."""
        return 4 * self.dim if self.ffn_type == "gelu" else gated_width(self.dim)

    def has_experts(self, block: int) -> bool:
        return self.moe_freq > 0 and block % self.moe_freq == 0

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All parameters, in the order of the model."""
        return tuple(self._weights())

    @cached_property
    def by_block(self) -> dict[int | None, tuple[Weight, ...]]:
        """The parameters of each block, and under None those outside."""
        found: dict[int | None, list[Weight]] = {}
        for weight in self.weights:
            found.setdefault(weight.block, []).append(weight)
        return {block: tuple(weights) for block, weights in found.items()}

    @cached_property
    def kinds(self) -> list[tuple[tuple[Weight, ...], int]]:
        """Parameters outside of blocks, once, and of each kind of block with the number of such blocks."""
        kinds = [self.has_experts(block) for block in range(self.n_layers)]
        return [
            (self.by_block[None], 1),
            *((self.by_block[kinds.index(kind)], kinds.count(kind)) for kind in dict.fromkeys(kinds)),
        ]

    @cached_property
    def num_params(self) -> int:
        return sum(weight.size for weight in self.weights)

    @property
    def flops_per_token(self) -> float:
        """As metrics.model_flops_per_token: of a forward and backward pass, without recomputation."""
        counted = float(self.num_params)
        if not self.weight_tying:
            counted -= self.vocab_size * self.dim
        idle = 1 - self.moe_top_k / self.moe_num_experts if self.moe_num_experts else 0.0
        counted -= sum(round(idle * weight.size) for weight in self.weights if weight.role == "expert")
        return 6.0 * counted + 12.0 * self.n_layers * self.width * self.seq_len

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
        for part in NORM_VECTORS.get(self.model_norm, ("weight", "bias")):
            yield Weight(f"{name}.{part}", (width,), "norm", block)

    def _block(self, block: int) -> Iterator[Weight]:
        prefix, dim, width = f"layers.{block}.", self.dim, self.width
        yield Weight(prefix + "attention.in_proj.weight", (3 * width, dim), "in", block)
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
        elif self.ffn_type == "gelu":
            yield Weight(prefix + "0.weight", (hidden, dim), "in", block)
            yield Weight(prefix + "2.weight", (dim, hidden), "out", block)
        elif self.ffn_type == "gemma_geglu":
            for name in ("gate_proj", "up_proj"):
                yield Weight(f"{prefix}{name}.weight", (hidden, dim), "in", block)
                yield Weight(f"{prefix}{name}.bias", (hidden,), "in", block)
            yield Weight(prefix + "down_proj.weight", (dim, hidden), "out", block)
            yield Weight(prefix + "down_proj.bias", (dim,), "out", block)
        else:
            yield Weight(prefix + "w12.weight", (2 * hidden, dim), "in", block)
            yield Weight(prefix + "w3.weight", (dim, hidden), "out", block)


def shape_of(cfg: ModelConfig) -> ModelShape:
    """The shape of the model that the flags name; what its file says wins. ConfigError where it cannot be planned."""
    if cfg.hf_model is not None:
        raise ConfigError(
            f"--hf-model {cfg.hf_model}: plans are made for this package's own models; give --model with a "
            "configuration of the same size"
        )
    file = architecture_of(cfg.model)

    def pick(name: str) -> Any:
        return file.get(name, getattr(cfg, name))

    moe_freq = pick("moe_freq")
    if moe_freq and not pick("moe_num_experts"):
        raise ConfigError("--moe-num-experts is missing: expected at least 1 because --moe-freq is set")
    return ModelShape(
        name=cfg.model,
        dim=file["hidden_dim"],
        n_layers=file["n_layers"],
        n_heads=file["n_heads"],
        vocab_size=file["vocab_size"],
        seq_len=file["seq_len"],
        weight_tying=file["weight_tying"],
        post_embed_norm=file["post_embed_norm"],
        model_norm=pick("model_norm"),
        qk_norm=pick("qk_norm"),
        positional_embedding_type=pick("positional_embedding_type"),
        ffn_type=pick("ffn_type"),
        moe_freq=moe_freq,
        moe_num_experts=pick("moe_num_experts") if moe_freq else 0,
        moe_top_k=pick("moe_top_k"),
        moe_capacity_factor=pick("moe_capacity_factor"),
    )
