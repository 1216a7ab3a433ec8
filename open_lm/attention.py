"""Public import path `open_lm.attention`; the code is in open_lm.model.attention."""

from open_lm.model.attention import (
    ATTN_ACTIVATIONS,
    ATTN_SEQ_SCALARS,
    custom_attn,
    get_attn_func,
    torch_attn,
    xformers_attn,
)

__all__ = ["ATTN_ACTIVATIONS", "ATTN_SEQ_SCALARS", "custom_attn", "get_attn_func", "torch_attn", "xformers_attn"]
