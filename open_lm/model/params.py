"""The architecture of a model, and how it is read from a configuration.

Legend: D model width, H query heads, K head width, F hidden width of the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from open_lm.config.architecture import resolve_architecture
from open_lm.config.model_keys import MUP_KEYS, ModelKeys, feed_forward_width, in_layer, relation_problems
from open_lm.config.registry import FEED_FORWARDS, POSITIONAL_EMBEDDINGS
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError, join_problems
from open_lm.model.attention import AttentionOptions, AttnFunc, check_attention_options, get_attn_func
from open_lm.model.norms import get_norm_class
from open_lm.model.parametrization import STANDARD, Parametrization, embedding_ratio
from open_lm.model.positional_embedding.rotary import RopeSettings


def create_params(cfg: object) -> Params:
    """Return the architecture that a ModelConfig, or any object with its attributes, selects.

    Values in the model's JSON file take precedence over the other attributes.

    Raises:
        ConfigError: an unknown model name, a missing or invalid file, or invalid settings.
    """
    return params_from_keys(resolve_architecture(ModelConfig.from_object(cfg)))


def params_from_keys(keys: Mapping[str, Any]) -> Params:
    """Return the architecture for the keys of a model's JSON file. Raise ConfigError for invalid settings."""
    settings = {name: value for name, value in keys.items() if value is not None}
    return Params(dim=settings.pop("hidden_dim"), apply_qk_norm=settings.pop("qk_norm", False), **settings)


class LayerKind(NamedTuple):
    """What distinguishes the attention of one layer from that of another; layers of a kind share masks and angles."""

    has_window: bool
    is_rotated: bool


@dataclass
class Params:
    """The architecture of a model; docs/model_configs.md describes the fields.

    norm_type and attn_func are derived from model_norm and attn_name if None. n_kv_heads, head_dim, ffn_dim and
    moe_ffn_dim of 0, and ffn_bias and (with mup) mup_base_head_dim of None, are replaced by their defaults.
    """

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    vocab_size: int = 50432
    seq_len: int = 2048
    norm_eps: float = 1e-5
    post_embed_norm: bool = False
    weight_tying: bool = False
    model_norm: str = "default_layer_norm"
    norm_type: Callable[..., nn.Module] | None = None
    attn_name: str = "auto"
    attn_activation: str | None = None
    attn_seq_scalar: str | None = None
    attn_seq_scalar_alpha: float | None = None
    attn_func: AttnFunc | None = None
    apply_qk_norm: bool = False
    positional_embedding_type: str = "rotary"
    ffn_type: str = "swiglu"
    moe_freq: int = 0
    moe_num_experts: int | None = None
    moe_top_k: int = 2
    moe_capacity_factor: float = 1.25
    moe_loss_weight: float = 0.1
    moe_weight_parallelism: bool = False
    moe_expert_model_parallelism: bool = False
    n_kv_heads: int = 0
    head_dim: int = 0
    qkv_bias: bool = False
    attn_out_bias: bool = False
    qk_norm_per_head: bool = False
    attn_scale: float | None = None
    attn_soft_cap: float | None = None
    attn_window: int | None = None
    attn_window_pattern: list[bool] | None = None
    rope_base: float = 10000.0
    rope_local_base: float | None = None
    rope_fraction: float = 1.0
    rope_frequency_scaling: dict[str, Any] | None = None
    rope_pattern: list[bool] | None = None
    ffn_dim: int = 0
    ffn_bias: bool | None = None
    moe_ffn_type: str = "gelu_tanh"
    moe_ffn_dim: int = 0
    moe_normalize_scores: bool = False
    moe_loss_scope: str = "layer"
    norm_position: str = "pre"
    parallel_block: bool = False
    embedding_scale: float = 1.0
    head_bias: bool = False
    logit_soft_cap: float | None = None
    unpadded_vocab_size: int | None = None
    embedding_dropout: float = 0.0
    attn_dropout: float = 0.0
    residual_dropout: float = 0.0
    mup: bool = False
    mup_base_width: int | None = None
    mup_base_head_dim: int | None = None

    def __post_init__(self) -> None:
        if self.norm_type is None:
            self.norm_type = get_norm_class(self.model_norm)
        if self.attn_func is None:
            self.attn_func = get_attn_func(
                self.attn_name, self.attn_activation, self.attn_seq_scalar, self.attn_seq_scalar_alpha
            )
        problems = self._problems()
        if problems:
            raise ConfigError(join_problems(problems, "the model configuration"))
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if not self.mup:
            self.mup_base_width = self.mup_base_head_dim = None
        elif self.mup_base_width is not None and self.mup_base_head_dim is None:
            self.mup_base_head_dim = self.head_dim or self.mup_base_width // self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads
        self.ffn_dim = self.ffn_dim or feed_forward_width(self.ffn_type, self.dim)
        self.moe_ffn_dim = self.moe_ffn_dim or 4 * self.dim
        if self.ffn_bias is None:
            self.ffn_bias = bool(FEED_FORWARDS.fact(self.ffn_type, "bias", False))
        for kind in dict.fromkeys(self.layer_kind(layer) for layer in range(self.n_layers)):
            check_attention_options(self.attn_name, self.attention_options(kind))

    def _problems(self) -> list[str]:
        problems = [
            f"{label} is {value}, expected at least 1"
            for label, value in (
                ("hidden_dim", self.dim),
                ("n_layers", self.n_layers),
                ("n_heads", self.n_heads),
                ("vocab_size", self.vocab_size),
                ("seq_len", self.seq_len),
            )
            if value < 1
        ]
        if 1 <= self.dim < self.n_heads and not self.head_dim:
            problems.append(f"n_heads is {self.n_heads}, more than hidden_dim {self.dim}")
        by_head = POSITIONAL_EMBEDDINGS.fact(self.positional_embedding_type, "by_head", False)
        if by_head and self.n_kv_heads not in (0, self.n_heads):
            problems.append(
                f"n_kv_heads is {self.n_kv_heads}, but {self.positional_embedding_type} needs as many key heads as "
                f"query heads ({self.n_heads})"
            )
        if self.moe_freq > 0:
            experts = self.moe_num_experts
            if experts is None or experts < 1:
                problems.append(f"--moe-num-experts is {experts}, expected at least 1 because --moe-freq is set")
            elif not 1 <= self.moe_top_k <= experts:
                problems.append(f"--moe-top-k is {self.moe_top_k}, expected 1 to {experts}, the number of experts")
        names = ("n_heads", "vocab_size", *MUP_KEYS, *(spec.name for spec in ModelKeys.specs()))
        values = {name: getattr(self, name) for name in names}
        derived = [name for name in ("n_kv_heads", "head_dim", "ffn_dim", "moe_ffn_dim") if not values[name]]
        return problems + relation_problems({**values, **dict.fromkeys(derived)})

    @property
    def hidden_dim(self) -> int:
        """D, under its name in the JSON files."""
        return self.dim

    @property
    def has_dropout(self) -> bool:
        """Whether the model draws random numbers in training."""
        return max(self.embedding_dropout, self.attn_dropout, self.residual_dropout) > 0

    @property
    def parametrization(self) -> Parametrization:
        """The factors of initialization, learning rates, attention scores and logits."""
        if not self.mup:
            return STANDARD
        assert self.mup_base_width is not None and self.mup_base_head_dim is not None
        return Parametrization(
            width_ratio=self.dim / self.mup_base_width,
            embedding_ratio=embedding_ratio(self.embedding_scale, self.dim, self.mup_base_width),
            head_ratio=self.head_dim / self.mup_base_head_dim,
            is_tied=self.weight_tying,
        )

    def norm(self, width: int) -> nn.Module:
        """Create a normalization layer over a last dimension of `width`."""
        assert self.norm_type is not None
        return self.norm_type(width, eps=self.norm_eps)

    def layer_kind(self, layer: int) -> LayerKind:
        """Return the kind of a layer, counted from 0."""
        has_window = self.attn_window is not None and in_layer(self.attn_window_pattern, layer)
        return LayerKind(has_window, in_layer(self.rope_pattern, layer))

    def attention_options(self, kind: LayerKind) -> AttentionOptions:
        """Return the options of attention in layers of a kind."""
        factor = self.parametrization.attention_factor
        scale = self.attn_scale
        if factor != 1.0:
            scale = factor * (self.head_dim**-0.5 if scale is None else scale)
        return AttentionOptions(
            scale=scale,
            soft_cap=self.attn_soft_cap,
            window=self.attn_window if kind.has_window else None,
            dropout=self.attn_dropout,
        )

    def rope(self, kind: LayerKind) -> RopeSettings:
        """Return the settings of rotary embeddings in layers of a kind."""
        if kind.has_window and self.rope_local_base is not None:
            return RopeSettings(self.rope_local_base, self.rope_fraction)
        return RopeSettings(self.rope_base, self.rope_fraction, self.rope_frequency_scaling)
