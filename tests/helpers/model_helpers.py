"""Small models for the tests of several files."""

from __future__ import annotations

from typing import Any

import torch

from open_lm.model.transformer import Params, Transformer


def small_model(seed: int = 0, **changes: Any) -> Transformer:
    """Create a two-layer model with random weights, in evaluation mode."""
    settings: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 61, "seq_len": 48}
    torch.manual_seed(seed)
    return Transformer(Params(**(settings | changes))).eval()


def random_ids(rows: int, length: int, vocab_size: int = 61, seed: int = 1) -> torch.Tensor:
    """Return (rows, length) random int64 token ids."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
