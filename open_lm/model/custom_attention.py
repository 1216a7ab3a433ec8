"""Attention with another activation than softmax, selected by --attn-name custom_attn.

Legend: B batch, T sequence (Tq of queries, Tk of keys), H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.config.registry import ATTENTION, ATTENTION_ACTIVATIONS, ATTENTION_LENGTHS
from open_lm.errors import ConfigError, join_problems
from open_lm.model.attention_masks import Mask, allowed_keys


@ATTENTION_ACTIVATIONS.register("relu_squared")
def _relu_squared(scores: Tensor) -> Tensor:
    return F.relu(scores).square()


@ATTENTION_ACTIVATIONS.register("identity")
def _identity(scores: Tensor) -> Tensor:
    return scores


ATTENTION_ACTIVATIONS.register("relu")(F.relu)
ATTENTION_ACTIVATIONS.register("softplus")(F.softplus)
ATTENTION_ACTIVATIONS.register("relu6")(F.relu6)
ATTENTION_ACTIVATIONS.register("sigmoid")(torch.sigmoid)
ATTENTION_ACTIVATIONS.register("softmax")(partial(torch.softmax, dim=-1))
ATTN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = ATTENTION_ACTIVATIONS.objects


# Map the number of keys (one number, or one per sequence) to the length by which weights are divided. "avg" is the mean
# number of keys visible to the queries of a causal sequence.
ATTENTION_LENGTHS.register("max", help="the number of keys")(lambda length: length)
ATTENTION_LENGTHS.register("avg", help="the mean number of keys that a query sees")(lambda length: (length + 1) / 2)
ATTENTION_LENGTHS.register("none", help="1")(lambda length: 1)
ATTN_SEQ_SCALARS: dict[str, Callable[[Any], Any]] = ATTENTION_LENGTHS.objects


@ATTENTION.register(
    "custom_attn",
    help="the activation of --attn-activation in place of softmax",
    requires=("attn_activation", "attn_seq_scalar", "attn_seq_scalar_alpha"),
    whole_sequences=True,
    options=False,
)
def custom_attn(  # noqa: PLR0917 (callers pass these by position)
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_activation: str,
    attn_seq_scalar: str,
    alpha: float,
    is_causal: bool = False,
    attention_mask: Mask | None = None,
) -> Tensor:
    """Compute attention with the weights activation(scores) / length^alpha.

    See Wortsman et al. 2023, https://arxiv.org/abs/2309.08586.

    Args:
        queries: (B,Tq,H,K) float.
        keys: (B,Tk,H,K) float.
        values: (B,Tk,H,K) float.
        attn_activation: name in ATTN_ACTIVATIONS. Masked keys get weight 0 with every activation.
        attn_seq_scalar: name in ATTN_SEQ_SCALARS. With an attention_mask the length of a sequence is its number of
            nonzero columns, so that padding has no effect. With a DocumentMask it is the number of keys of the
            sequence, because the document's length would reveal to its first tokens where it ends.
        alpha: exponent of the length.
        is_causal: whether each query attends only to keys up to its own position.
        attention_mask: (B,Tk), nonzero where a key may be attended to, or a `DocumentMask`.

    Returns:
        (B,Tq,H,K) in the dtype of the queries.
    """
    scores = torch.einsum("bqhd,bkhd->bhqk", queries * queries.shape[-1] ** -0.5, keys)
    allowed = allowed_keys(queries, keys, is_causal, attention_mask)
    if attn_activation == "softmax" and allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = ATTN_ACTIVATIONS[attn_activation](scores)
    if attn_activation != "softmax" and allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights * _length_scale(keys, attn_seq_scalar, alpha, attention_mask), values)
    return out.to(queries.dtype)


def _length_scale(keys: Tensor, attn_seq_scalar: str, alpha: float, attention_mask: Mask | None) -> float | Tensor:
    """Return length^-alpha: a number, or (B,1,1,1) in the dtype of the keys if sequences are padded."""
    scalar = ATTN_SEQ_SCALARS[attn_seq_scalar]
    if not isinstance(attention_mask, Tensor) or attn_seq_scalar == "none":
        return float(scalar(keys.shape[1])) ** -alpha
    lengths = (attention_mask != 0).sum(-1).clamp(min=1).float()
    return (scalar(lengths) ** -alpha).to(keys.dtype)[:, None, None, None]


def bound_custom_attn(activation: str | None, seq_scalar: str | None, alpha: float | None) -> Callable[..., Tensor]:
    problems = []
    for registry, name in ((ATTENTION_ACTIVATIONS, activation), (ATTENTION_LENGTHS, seq_scalar)):
        try:
            registry.get(name)
        except ConfigError as error:
            problems.append(str(error))
    if alpha is None:
        problems.append("--attn-seq-scalar-alpha: expected a number")
    if problems:
        raise ConfigError(join_problems(problems, "--attn-name custom_attn requires these settings"))
    assert activation is not None and seq_scalar is not None and alpha is not None
    return partial(custom_attn, attn_activation=activation, attn_seq_scalar=seq_scalar, alpha=alpha)
