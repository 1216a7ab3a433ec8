"""Public import path `open_lm.losses`; the code is in open_lm.model.losses."""

from open_lm.model.losses import CrossEntropyLossWithZLoss

__all__ = ["CrossEntropyLossWithZLoss"]
