"""Rotary position embeddings of OpenLM language models, with scaled frequencies for long sequences.

Legend: B batch, T sequence, H heads, K head width, R rotated features of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .configuration_openlm import OpenLMConfig

Table = tuple[Tensor, Tensor]  # cos and sin of the angles, float32, broadcasting to (B,T,H,R/2)


def rotary_table(config: OpenLMConfig, positions: Tensor, has_window: bool) -> Table:
    """Return cos and sin for tokens at integer positions (T,) or (B,T), in layers with or without a window."""
    base, scaling = config.rope_base, config.rope_frequency_scaling
    if has_window and config.rope_local_base is not None:
        base, scaling = config.rope_local_base, None
    width = int(config.head_dim * config.rope_fraction)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    frequencies, factor = 1.0 / base**exponents, 1.0
    if scaling is not None:
        frequencies, factor = _scaled(frequencies, exponents, base, scaling, positions.max() + 1)
    if config.positional_embedding_type == "head_rotary":
        angles = torch.arange(config.n_heads, device=positions.device)[:, None] * frequencies
    else:
        angles = (positions[..., None] * frequencies)[..., None, :]
    return angles.cos() * factor, angles.sin() * factor


def _scaled(
    frequencies: Tensor, exponents: Tensor, base: float, scaling: dict[str, Any], length: Tensor
) -> tuple[Tensor, float]:
    """Return the scaled frequencies (R/2,), and the factor of cos and sin.

    length: () int64, the number of tokens of the longest sequence.
    """
    kind, factor = scaling["type"], scaling.get("factor", 1.0)
    original: Any = scaling.get("original_seq_len")
    width = 2 * len(frequencies)
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "proportional":
        rotated = int(scaling["fraction"] * width // 2)
        kept = frequencies[:rotated] / factor
        return torch.cat((kept, torch.zeros_like(frequencies[rotated:]))), 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original / (2 * math.pi / frequencies)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / factor + kept * frequencies, 1.0
    if kind == "dynamic":
        growth = factor * length.clamp(min=original) / original - (factor - 1)
        return 1.0 / (base * growth ** (width / (width - 2))) ** exponents, 1.0
    if kind == "longrope":
        short, long = (
            frequencies / torch.tensor(scaling[name], device=frequencies.device)
            for name in ("short_factor", "long_factor")
        )
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return torch.where(length > original, long, short), scaling.get("attention_factor", default)
    if kind != "yarn":
        raise ValueError(f"rope_frequency_scaling has the unknown type {kind!r}")
    turns = (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1))
    low, high = (width * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in turns)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    indices = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    divided = ((indices - low) / (high - low or 0.001)).clamp(0, 1)
    default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return frequencies / factor * divided + frequencies * (1 - divided), scaling.get("attention_factor", default)


def rotate(x: Tensor, table: Table, is_interleaved: bool) -> Tensor:
    """Rotate pairs of features of x (B,T,H,K) in float32, R <= K."""
    cos, sin = table
    width = 2 * cos.shape[-1]
    rotated, rest = x[..., :width].float(), x[..., width:]
    if is_interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    halves = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(halves, dim=-1).flatten(-2) if is_interleaved else torch.cat(halves, dim=-1)
    return torch.cat((rotated.type_as(x), rest), dim=-1)
