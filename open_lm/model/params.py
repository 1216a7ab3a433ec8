"""The architecture of a model, and how it is read from a configuration.

Legend: D model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from open_lm.config.architecture import resolve_architecture
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError, join_problems
from open_lm.model.attention import AttnFunc, get_attn_func
from open_lm.model.norms import get_norm_class


def create_params(cfg: object) -> Params:
    """Return the architecture that a ModelConfig, or any object with its attributes, selects.

    Values in the model's JSON file take precedence over the other attributes.

    Raises:
        ConfigError: an unknown model name, a missing or invalid file, or invalid settings.
    """
    settings = resolve_architecture(ModelConfig.from_object(cfg))
    return Params(dim=settings.pop("hidden_dim"), apply_qk_norm=settings.pop("qk_norm"), **settings)


@dataclass
class Params:
    """The architecture of a model. norm_type and attn_func are derived from model_norm and attn_name if None."""

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
        if 1 <= self.dim < self.n_heads:
            problems.append(f"n_heads is {self.n_heads}, more than hidden_dim {self.dim}")
        if self.moe_freq > 0:
            experts = self.moe_num_experts
            if experts is None or experts < 1:
                problems.append(f"--moe-num-experts is {experts}, expected at least 1 because --moe-freq is set")
            elif not 1 <= self.moe_top_k <= experts:
                problems.append(f"--moe-top-k is {self.moe_top_k}, expected 1 to {experts}, the number of experts")
        return problems

    @property
    def hidden_dim(self) -> int:
        """D, under its name in the JSON files."""
        return self.dim

    @property
    def head_dim(self) -> int:
        """K. H * K may be smaller than D."""
        return self.dim // self.n_heads

    def norm(self, width: int) -> nn.Module:
        """Create a normalization layer over a last dimension of `width`."""
        assert self.norm_type is not None
        return self.norm_type(width, eps=self.norm_eps)
