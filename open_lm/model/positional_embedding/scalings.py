"""Scaling of rotary frequencies for sequences that are longer than those of pretraining.

Each function is a type of `rope_frequency_scaling` in a model's JSON file. It returns the scaled frequencies, and the
factor of cos and sin. The types `dynamic` and `longrope` depend on the length of the sequence.
Legend: B batch, T sequence, R rotated features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from open_lm.config.registry import ROPE_SCALINGS

Scaled = tuple[Tensor, float]


def scale_frequencies(
    frequencies: Tensor, base: float, scaling: Mapping[str, Any] | None, lengths: Tensor | None = None
) -> Scaled:
    """Scale frequencies base^(-2i/R).

    Args:
        frequencies: (R/2,) float32.
        base: base of the frequencies.
        scaling: an object with `type` and its parameters, which `relation_problems` has checked; None for no scaling.
        lengths: () or (B,T) int64, the number of tokens of the sequence or, with a document mask, of each token's
            document. None for a sequence that is not longer than those of pretraining.

    Returns:
        (R/2,) or (B,T,R/2) float32, and the factor of cos and sin.
    """
    if scaling is None:
        return frequencies, 1.0
    scaled: Scaled = ROPE_SCALINGS.get(scaling["type"])(frequencies, base, scaling, lengths)
    return scaled


@ROPE_SCALINGS.register("linear", help="divide all frequencies by the factor", required=("factor",))
def linear(frequencies: Tensor, base: float, parameters: Mapping[str, Any], lengths: Tensor | None) -> Scaled:
    """Divide all frequencies by the factor (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""
    return frequencies / parameters["factor"], 1.0


@ROPE_SCALINGS.register(
    "llama3",
    help="divide low frequencies by the factor",
    required=("factor", "low_freq_factor", "high_freq_factor", "original_seq_len"),
)
def llama3(frequencies: Tensor, base: float, parameters: Mapping[str, Any], lengths: Tensor | None) -> Scaled:
    """Divide frequencies with fewer than low_freq_factor turns in the original length by the factor.

    Those with more than high_freq_factor turns are kept; in between the result is interpolated (Llama 3.1,
    https://arxiv.org/abs/2407.21783).
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_seq_len"] / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / parameters["factor"] + kept * frequencies, 1.0


@ROPE_SCALINGS.register(
    "yarn",
    help="divide low frequencies by the factor, and scale cos and sin",
    required=("factor", "original_seq_len"),
    optional=("beta_fast", "beta_slow", "attention_factor", "truncate"),
)
def yarn(frequencies: Tensor, base: float, parameters: Mapping[str, Any], lengths: Tensor | None) -> Scaled:
    """Divide frequencies with fewer than beta_slow turns in the original length by the factor.

    Those with more than beta_fast turns are kept. Between the two features the share grows linearly with the index of
    the feature; `truncate` rounds these indices outwards. cos and sin are multiplied by attention_factor (Peng et al.
    2023, https://arxiv.org/abs/2309.00071).
    """
    factor, width = parameters["factor"], 2 * len(frequencies)

    def feature(turns: float) -> float:
        """Return the index of the feature that makes this number of turns in the original length."""
        return width * math.log(parameters["original_seq_len"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = feature(parameters.get("beta_fast", 32)), feature(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    indices = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    divided = ((indices - low) / (high - low or 0.001)).clamp(0, 1)
    amplitude = parameters.get("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return frequencies / factor * divided + frequencies * (1 - divided), float(amplitude)


@ROPE_SCALINGS.register(
    "dynamic",
    help="a larger base for sequences beyond the original length",
    required=("factor", "original_seq_len"),
    by_length=True,
)
def dynamic(frequencies: Tensor, base: float, parameters: Mapping[str, Any], lengths: Tensor | None) -> Scaled:
    """Increase the base with the length of the sequence, beyond the original length (NTK-aware scaling).

    Cached keys keep the frequencies of the length at which they were computed, as in transformers.
    """
    if lengths is None:
        return frequencies, 1.0
    factor, original, width = parameters["factor"], parameters["original_seq_len"], 2 * len(frequencies)
    growth = factor * lengths.clamp(min=original)[..., None] / original - (factor - 1)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=frequencies.device) / width
    return 1.0 / (base * growth ** (width / (width - 2))) ** exponents, 1.0


@ROPE_SCALINGS.register(
    "longrope",
    help="separate factors of each frequency for short and for long sequences",
    required=("short_factor", "long_factor", "factor", "original_seq_len"),
    optional=("attention_factor",),
    by_length=True,
)
def longrope(frequencies: Tensor, base: float, parameters: Mapping[str, Any], lengths: Tensor | None) -> Scaled:
    """Divide each frequency by its short_factor, or in sequences beyond the original length by its long_factor.

    cos and sin are multiplied by attention_factor (Ding et al. 2024, https://arxiv.org/abs/2402.13753).
    """
    factor, original = parameters["factor"], parameters["original_seq_len"]
    short, long = (
        frequencies / torch.tensor(parameters[name], dtype=torch.float32, device=frequencies.device)
        for name in ("short_factor", "long_factor")
    )
    scaled = short if lengths is None else torch.where(lengths[..., None] > original, long, short)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return scaled, float(parameters.get("attention_factor", default))


@ROPE_SCALINGS.register(
    "proportional",
    help="rotate only the pairs of the highest frequencies",
    required=("fraction",),
    optional=("factor",),
)
def proportional(frequencies: Tensor, base: float, parameters: Mapping[str, Any], lengths: Tensor | None) -> Scaled:
    """Keep this fraction of the frequencies, the highest ones, divided by the factor, and replace the others by 0.

    The pairs and frequencies are those of the full width, unlike with `rope_fraction`.
    """
    rotated = int(parameters["fraction"] * 2 * len(frequencies) // 2)
    kept = frequencies / parameters.get("factor", 1.0)
    return torch.cat((kept[:rotated], torch.zeros_like(kept[rotated:]))), 1.0
