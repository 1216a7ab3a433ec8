"""Public import path `open_lm.scheduler`; the code is in open_lm.optim.schedules."""

from open_lm.optim.schedules import const_lr, const_lr_cooldown, cosine_lr

__all__ = ["const_lr", "const_lr_cooldown", "cosine_lr"]
