"""The layers of OpenLM language models: norms, attention and feed-forward networks.

Legend: B batch, T sequence, P cached positions and T, D model width, H query heads, G key heads, K head width,
E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_openlm import OpenLMConfig
from .rotary_openlm import Table, rotate


# ---------------------------------------------------------------------------------------------- norms
class RmsNorm(nn.Module):
    """Root-mean-square norm, computed in float32; with `offset` 1 the gain is 1 + weight, applied in float32."""

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (normed * (self.offset + self.weight.float())).type_as(x)
        return normed.type_as(x) * self.weight


class LayerNorm(nn.Module):
    """Layer norm with optional gain and bias."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, width: int, eps: float, has_gain: bool = True, has_bias: bool = True) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.register_parameter("weight", nn.Parameter(torch.ones(width)) if has_gain else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if has_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)


_NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "default_layer_norm": LayerNorm,
    "lp_layer_norm": LayerNorm,
    "gain_only_layer_norm": lambda width, eps: LayerNorm(width, eps, has_bias=False),
    "gain_only_lp_layer_norm": lambda width, eps: LayerNorm(width, eps, has_bias=False),
    "no_wb_layer_norm": lambda width, eps: LayerNorm(width, eps, has_gain=False, has_bias=False),
    "rms_norm": RmsNorm,
    "gemma_rms_norm": lambda width, eps: RmsNorm(width, eps, offset=1.0),
}


def create_norm(config: OpenLMConfig, width: int) -> nn.Module:
    return _NORMS[config.model_norm](width, config.norm_eps)


# ---------------------------------------------------------------------------------------------- attention
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_squared": lambda scores: F.relu(scores).square(),
    "identity": lambda scores: scores,
    "relu": F.relu,
    "softplus": F.softplus,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "softmax": lambda scores: torch.softmax(scores, dim=-1),
}
_LENGTHS: dict[str, Callable[[Any], Any]] = {
    "max": lambda length: length,
    "avg": lambda length: (length + 1) / 2,
    "none": lambda length: 1.0,
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.is_grouped = kv_width < width
        if self.is_grouped:
            self.q_proj = nn.Linear(config.dim, width, bias=config.qkv_bias)
            self.kv_proj = nn.Linear(config.dim, 2 * kv_width, bias=config.qkv_bias)
        else:
            self.in_proj = nn.Linear(config.dim, 3 * width, bias=config.qkv_bias)
        self.out_proj = nn.Linear(width, config.dim, bias=config.attn_out_bias)
        norm_widths = (config.head_dim, config.head_dim) if config.qk_norm_per_head else (width, kv_width)
        self.q_norm, self.k_norm = (
            create_norm(config, w) if config.apply_qk_norm else nn.Identity() for w in norm_widths
        )

    def forward(
        self, x: Tensor, angles: Table | None, allowed: Tensor, padding: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Map x (B,T,D) -> (B,T,D).

        Args:
            x: (B,T,D).
            angles: cos and sin of the rotary embedding, or None.
            allowed: bool, broadcasting to (B,H,T,P): the keys that each query attends to.
            padding: (B,P), 0 for padding, or None.
            cache: keys and values of earlier positions, extended in place.
        """
        queries, keys, values = self._heads(x)
        if angles is not None:
            is_interleaved = self.config.positional_embedding_type == "llama_rotary"
            queries, keys = (rotate(part, angles, is_interleaved) for part in (queries, keys))
        queries, keys, values = (part.type_as(values).transpose(1, 2) for part in (queries, keys, values))
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        groups = self.config.n_heads // self.config.n_kv_heads
        if groups > 1:
            keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        mixed = self._attend(queries, keys, values, allowed, padding)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B,T,H,K), keys and values (B,T,G,K)."""
        if self.is_grouped:
            queries, (keys, values) = self.q_proj(x), self.kv_proj(x).chunk(2, dim=-1)
        else:
            queries, keys, values = self.in_proj(x).chunk(3, dim=-1)
        shape = (-1, self.config.head_dim)
        if self.config.qk_norm_per_head:
            queries, keys = self.q_norm(queries.unflatten(-1, shape)), self.k_norm(keys.unflatten(-1, shape))
        else:
            queries, keys = self.q_norm(queries).unflatten(-1, shape), self.k_norm(keys).unflatten(-1, shape)
        return queries, keys, values.unflatten(-1, shape)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, padding: Tensor | None) -> Tensor:
        """Return (B,H,T,K) for queries (B,H,T,K), keys and values (B,H,P,K)."""
        config = self.config
        dropout = config.attn_dropout if self.training else 0.0
        if config.attn_name == "custom_attn":
            return self._custom(queries, keys, values, allowed, padding)
        if config.attn_soft_cap is None:
            return F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=allowed, dropout_p=dropout, scale=config.attn_scale
            )
        scale = config.head_dim**-0.5 if config.attn_scale is None else config.attn_scale
        scores = (queries * scale) @ keys.transpose(-1, -2)
        scores = torch.tanh(scores.float() / config.attn_soft_cap) * config.attn_soft_cap
        weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1)
        return F.dropout(weights, dropout).type_as(values) @ values

    def _custom(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, padding: Tensor | None) -> Tensor:
        """Return attention with another activation than softmax, divided by a power of the length."""
        config = self.config
        scores = (queries * config.head_dim**-0.5) @ keys.transpose(-1, -2)
        if config.attn_activation == "softmax":
            scores = scores.masked_fill(~allowed, float("-inf"))
        weights = _ACTIVATIONS[config.attn_activation](scores).masked_fill(~allowed, 0.0)
        scalar = _LENGTHS[config.attn_seq_scalar]
        if padding is None or config.attn_seq_scalar == "none":
            return (weights * float(scalar(keys.shape[2])) ** -config.attn_seq_scalar_alpha) @ values
        lengths = (padding != 0).sum(-1).clamp(min=1).float()
        scale = (scalar(lengths) ** -config.attn_seq_scalar_alpha).type_as(keys)
        return (weights * scale[:, None, None, None]) @ values


# ---------------------------------------------------------------------------------------------- feed-forward networks
class GatedUnit(nn.Module):
    """activation(gate) * up, with one matrix for gate and up."""

    def __init__(self, config: OpenLMConfig, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=config.ffn_bias)
        self.w3 = nn.Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.activation(gate) * up)


class GeGLU(nn.Module):
    """gelu(gate) * up, with separate matrices."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.ffn_bias)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.ffn_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class TanhMLP(nn.Module):
    """Two matrices with the tanh approximation of GELU."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=config.ffn_bias)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(_gelu_tanh(self.w1(x)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu(config: OpenLMConfig) -> nn.Module:
    widths, bias = (config.dim, config.ffn_dim), config.ffn_bias
    return nn.Sequential(nn.Linear(*widths, bias=bias), nn.GELU(), nn.Linear(*widths[::-1], bias=bias))


FEED_FORWARDS: dict[str, Callable[[OpenLMConfig], nn.Module]] = {
    "swiglu": lambda config: GatedUnit(config, F.silu),
    "swiglu_torch": lambda config: GatedUnit(config, F.silu),
    "geglu_tanh": lambda config: GatedUnit(config, _gelu_tanh),
    "gemma_geglu": GeGLU,
    "gelu": _gelu,
    "gelu_tanh": TanhMLP,
}


class ExpertWeights(nn.Module):
    """The stacked weights of all experts."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        inner, outer = (config.dim, config.moe_ffn_dim), (config.moe_ffn_dim, config.dim)
        self.w1 = nn.Parameter(torch.zeros(config.moe_num_experts, *inner))
        self.w2 = nn.Parameter(torch.zeros(config.moe_num_experts, *outer))
        self.is_gated = config.moe_ffn_type == "swiglu"
        if self.is_gated:
            self.w3 = nn.Parameter(torch.zeros(config.moe_num_experts, *inner))

    def forward(self, expert: int, tokens: Tensor) -> Tensor:
        """Run one expert: tokens (n,D) -> (n,D)."""
        inner = tokens @ self.w1[expert]
        inner = F.silu(inner) * (tokens @ self.w3[expert]) if self.is_gated else _gelu_tanh(inner)
        return inner @ self.w2[expert]


class MixtureOfExperts(nn.Module):
    """Each token goes to the experts with the highest scores. No token is dropped, in training either."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.ModuleDict({"layer": nn.Linear(config.dim, config.moe_num_experts, bias=False)})
        self.experts = nn.ModuleDict({"mlp": ExpertWeights(config)})
        self.loads: tuple[Tensor, Tensor] | None = None  # of the last forward pass: share of choices, mean score; (E,)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        scores = torch.softmax(self.router["layer"](tokens).float(), dim=-1)
        weights, chosen = scores.topk(self.config.moe_top_k, dim=-1)
        counts = torch.bincount(chosen.flatten(), minlength=self.config.moe_num_experts)
        self.loads = counts.float() / chosen.numel(), scores.mean(0)
        if self.config.moe_normalize_scores:
            weights = weights / weights.sum(-1, keepdim=True)
        out = tokens.new_zeros(tokens.shape, dtype=weights.dtype)
        for expert in counts.nonzero().flatten().tolist():
            rows, choice = (chosen == expert).nonzero(as_tuple=True)
            mixed = self.experts["mlp"](expert, tokens[rows]) * weights[rows, choice, None]
            out = out.index_add(0, rows, mixed.to(out.dtype))
        return out.to(x.dtype).view_as(x)
