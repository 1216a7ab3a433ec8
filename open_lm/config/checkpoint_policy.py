"""Decide when to save and which sharded checkpoints to keep: pure functions of numbers, also for the planner."""

from __future__ import annotations

from collections.abc import Iterable

from open_lm.config.sections import CheckpointConfig


def due_after_step(cfg: CheckpointConfig, step: int) -> bool:
    """Return whether a checkpoint is due after `step` steps (--save-every-n-steps, --save-milestone-every)."""
    return any(every > 0 and step % every == 0 for every in (cfg.save_every_n_steps, cfg.save_milestone_every))


def due_after_epoch(cfg: CheckpointConfig, epoch: int, is_last: bool) -> bool:
    """Return whether to keep the checkpoint of an epoch: the last one, and every --save-frequency-th (0: none)."""
    return is_last or (cfg.save_frequency > 0 and epoch % cfg.save_frequency == 0)


def superseded(cfg: CheckpointConfig, steps: Iterable[int], newest: int) -> list[int]:
    """Return the steps whose sharded checkpoints to remove once that of step `newest` is complete, in this order.

    Keep --keep-last checkpoints (0: all; one with --delete-previous-checkpoint) and all milestones. Steps after
    `newest` exist if the run went back to an earlier step, because they are broken: they are removed first, except
    milestones, which the run replaces when it reaches their step again.
    """
    num_kept = 1 if cfg.delete_previous_checkpoint else cfg.keep_last
    removable = [step for step in sorted({*steps, newest}) if not is_milestone(cfg, step)]
    stale = [step for step in removable if step > newest]
    current = [step for step in removable if step <= newest]
    return stale + (current[:-num_kept] if num_kept else [])


def is_milestone(cfg: CheckpointConfig, step: int) -> bool:
    """Return whether the checkpoint of a step is never removed (--save-milestone-every)."""
    return cfg.save_milestone_every > 0 and step % cfg.save_milestone_every == 0
