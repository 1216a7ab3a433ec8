"""When a run is saved and which of its sharded checkpoints are kept. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Iterable

from open_lm.config.sections import CheckpointConfig


def due_after_step(cfg: CheckpointConfig, step: int) -> bool:
    """Whether a checkpoint is due after `step` steps by their number alone (--save-every-n-steps, milestones)."""
    return any(every > 0 and step % every == 0 for every in (cfg.save_every_n_steps, cfg.save_milestone_every))


def due_after_epoch(cfg: CheckpointConfig, epoch: int, is_last: bool) -> bool:
    """Whether the end of an epoch is kept: the last one always, beside it every --save-frequency-th (0: none)."""
    return is_last or (cfg.save_frequency > 0 and epoch % cfg.save_frequency == 0)


def superseded(cfg: CheckpointConfig, steps: Iterable[int], newest: int) -> list[int]:
    """The steps whose sharded checkpoints go once that of step `newest` is complete, oldest first.

    --keep-last of them stay (0: all; with --delete-previous-checkpoint one), and all milestones. What lies beyond
    `newest`, which a run that went back to an earlier step has left, belongs to a past that is no more: it goes first.
    """
    keep = 1 if cfg.delete_previous_checkpoint else cfg.keep_last
    known = sorted({*steps, newest})
    stale = [step for step in known if step > newest]
    ordinary = [step for step in known if step <= newest and not _is_milestone(cfg, step)]
    return stale + (ordinary[:-keep] if keep else [])


def _is_milestone(cfg: CheckpointConfig, step: int) -> bool:
    return cfg.save_milestone_every > 0 and step % cfg.save_milestone_every == 0
