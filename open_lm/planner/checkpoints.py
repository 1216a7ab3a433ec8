"""Predict the number and size of a run's checkpoints, and the disk space of those that are kept.

The formats are those of docs/checkpoints.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.config.checkpoint_policy import due_after_epoch, is_milestone
from open_lm.planner.memory import optimizer_bytes
from open_lm.planner.setup import TrainingSetup


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        sharded: step_N folders that the run writes.
        sharded_kept: step_N folders that it keeps.
        sharded_bytes: size of one step_N folder.
        files: epoch_N.pt files that the run writes, each with its optimizer_N.pt.
        files_kept: epoch_N.pt files that it keeps.
        files_bytes: size of one epoch_N.pt with its optimizer_N.pt.
    """

    sharded: int
    sharded_kept: int
    sharded_bytes: int
    files: int
    files_kept: int
    files_bytes: int

    @property
    def disk_bytes(self) -> int:
        """The peak disk space, including the checkpoint that is being written."""
        folders = self.sharded_kept + (self.sharded > self.sharded_kept)
        return folders * self.sharded_bytes + self.files_kept * self.files_bytes


def plan_checkpoints(setup: TrainingSetup, steps: int, epochs: int) -> Checkpoints:
    """Return the checkpoints of a run with `steps` steps in `epochs` epochs."""
    cfg = setup.config.checkpoint
    ends = [steps * number // epochs for number in range(1, epochs + 1)]
    saved_epochs = [end for number, end in enumerate(ends, 1) if due_after_epoch(cfg, number, number == epochs)]
    saved = set(saved_epochs)
    for every in (cfg.save_every_n_steps, cfg.save_milestone_every):
        saved |= set(range(every, steps + 1, every)) if every else set()
    milestones = {step for step in saved if is_milestone(cfg, step)}
    keep = 1 if cfg.delete_previous_checkpoint else cfg.keep_last
    ordinary = len(saved) - len(milestones)
    size = _checkpoint_bytes(setup)
    has_folders, has_files = cfg.checkpoint_format != "interchange", cfg.checkpoint_format != "sharded"
    files = len(saved_epochs) if has_files else 0
    return Checkpoints(
        sharded=len(saved) if has_folders else 0,
        sharded_kept=len(milestones) + (min(keep, ordinary) if keep else ordinary) if has_folders else 0,
        sharded_bytes=size,
        files=files,
        files_kept=min(files, 1) if cfg.delete_previous_checkpoint else files,
        files_bytes=size,
    )


def _checkpoint_bytes(setup: TrainingSetup) -> int:
    """Return the bytes of the parameters, moments and averaged weights of the full model."""
    trained = setup.trained(setup.shape.weights)  # with --lora a checkpoint has only the adapters
    local_numel = setup.local_numel(trained)
    local_bytes = local_numel * setup.sizes.stored + optimizer_bytes(setup)
    return round(local_bytes * sum(weight.size for weight in trained) / local_numel)
