"""Biases, soft caps and padding of logits, for losses that are computed over chunks of tokens.

Legend: N tokens, R tokens of a chunk, D model width, V rows of the weight: the vocabulary, or this rank's shard of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def with_bias_column(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden (N,D+8) and weight (V,D+8) with the logits hidden @ weight.T + bias; bias (V,).

    Seven of the eight columns are zeros, so that rows stay aligned.
    """
    ones = torch.zeros(8, dtype=hidden.dtype, device=hidden.device)
    ones[0] = 1
    columns = F.pad(bias[:, None].to(weight.dtype), (0, 7))
    return torch.cat((hidden, ones.expand(len(hidden), 8)), 1), torch.cat((weight, columns), 1)


def finish_logits_(logits: Tensor, soft_cap: float | None, num_rows: int) -> Tensor | None:
    """Apply a soft cap c to logits l (R,V), c tanh(l / c), and mask padding, the columns from num_rows on, in place.

    num_rows below 0 or above V masks all columns or none.

    Returns:
        the derivative of the soft cap (R,V), or None without one.
    """
    slopes = None
    if soft_cap is not None:
        shares = torch.tanh(logits.div_(soft_cap))
        torch.mul(shares, soft_cap, out=logits)
        slopes = shares.square_().neg_().add_(1)
    if num_rows < logits.shape[1]:
        # A finite value: infinities would give nan on a rank whose rows are all padding.
        logits[:, max(0, num_rows) :] = torch.finfo(logits.dtype).min / 4
    return slopes
