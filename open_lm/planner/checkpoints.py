"""How many checkpoints a run writes, how large they are, and what is kept of them on disk.

Mirrors checkpoint/policy.py and what docs/checkpoints.md says of the two forms.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.config.sections import CheckpointConfig
from open_lm.planner.memory import Job, optimizer_bytes


@dataclass(frozen=True)
class Checkpoints:
    """Numbers over a whole run. sharded_bytes: of one step_N folder; files_bytes: of one epoch_N.pt with its
    optimizer_N.pt; disk_bytes: the most that is there at a time, with the one being written."""

    sharded: int
    sharded_kept: int
    sharded_bytes: int
    files: int
    files_kept: int
    files_bytes: int

    @property
    def disk_bytes(self) -> int:
        folders = self.sharded_kept + (self.sharded > self.sharded_kept)
        return folders * self.sharded_bytes + self.files_kept * self.files_bytes


def checkpoints_of(job: Job, steps: int, epochs: int) -> Checkpoints:
    """What a run of `steps` steps in `epochs` epochs writes."""
    cfg = job.config.checkpoint
    ends = _epoch_ends(steps, epochs)
    kept_epochs = [end for number, end in enumerate(ends, 1) if _is_kept(cfg, number, epochs)]
    saved = set(kept_epochs)
    for every in (cfg.save_every_n_steps, cfg.save_milestone_every):
        saved |= set(range(every, steps + 1, every)) if every else set()
    milestones = {step for step in saved if cfg.save_milestone_every and step % cfg.save_milestone_every == 0}
    keep = 1 if cfg.delete_previous_checkpoint else cfg.keep_last
    ordinary = len(saved) - len(milestones)
    size = _whole_bytes(job)
    has_folders, has_files = cfg.checkpoint_format != "interchange", cfg.checkpoint_format != "sharded"
    files = len(kept_epochs) if has_files else 0
    return Checkpoints(
        sharded=len(saved) if has_folders else 0,
        sharded_kept=len(milestones) + (min(keep, ordinary) if keep else ordinary) if has_folders else 0,
        sharded_bytes=size,
        files=files,
        files_kept=min(files, 1) if cfg.delete_previous_checkpoint else files,
        files_bytes=size,
    )


def _whole_bytes(job: Job) -> int:
    """Parameters, moments and averages of the whole model."""
    own = job.own(job.shape.weights) * job.types.stored + optimizer_bytes(job)
    return round(own * job.shape.num_params / job.own(job.shape.weights))


def _epoch_ends(steps: int, epochs: int) -> list[int]:
    return [steps * number // epochs for number in range(1, epochs + 1)]


def _is_kept(cfg: CheckpointConfig, number: int, epochs: int) -> bool:
    return number == epochs or (cfg.save_frequency > 0 and number % cfg.save_frequency == 0)
