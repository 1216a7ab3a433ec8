"""Masks of attention: which keys each query may attend to.

Legend: B batch, Tq queries, Tk keys, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from open_lm.kernels.document_attention import DocumentMask
from open_lm.kernels.general_attention import windowed

Mask = Tensor | DocumentMask


def allowed_keys(
    queries: Tensor, keys: Tensor, is_causal: bool, attention_mask: Mask | None = None, window: int | None = None
) -> Tensor | None:
    """Return which keys each query may attend to: bool, broadcasting to (B,H,Tq,Tk); None if nothing is masked.

    A query whose keys are all masked (left padding) may attend to its own key, so that no softmax row is empty. A
    window limits causal attention to the latest keys; a `DocumentMask` includes its window.

    Raises:
        ValueError: more queries than keys, or an attention_mask that is not (B,Tk).
    """
    if isinstance(attention_mask, DocumentMask):
        return attention_mask.dense
    q_len, k_len = queries.shape[1], keys.shape[1]
    if q_len > k_len:
        raise ValueError(f"{q_len} queries for {k_len} keys: expected at most as many queries as keys")
    if attention_mask is not None and attention_mask.shape != (keys.shape[0], k_len):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(keys.shape[0], k_len)}: one column "
            "for every key, including cached keys"
        )
    allowed = None
    if is_causal and q_len > 1:
        all_pairs = torch.ones(q_len, k_len, dtype=torch.bool, device=queries.device)
        allowed = all_pairs.tril(diagonal=k_len - q_len)
    if window is not None and window < k_len:
        in_window = windowed(q_len, k_len, window, queries.device)
        allowed = in_window if allowed is None else allowed & in_window
    if attention_mask is not None:
        not_padding = attention_mask.to(torch.bool)[:, None, None, :]
        allowed = not_padding if allowed is None else allowed & not_padding
        diagonal = torch.ones(q_len, k_len, dtype=torch.bool, device=queries.device)
        diagonal = diagonal.tril(k_len - q_len).triu(k_len - q_len)
        allowed = allowed | (diagonal & ~allowed.any(-1, keepdim=True))
    return allowed
