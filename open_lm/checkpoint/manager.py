"""The checkpoints of one run: when they are written, in which forms, and which of them are kept.

Every save is a sharded checkpoint (sharded.py), written while training goes on. At the end of an epoch rank 0 makes the
interchange files from it, in the same background thread, and then removes what is superseded; so the newest complete
checkpoint is never the one that goes. All methods are collective, except `check`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from open_lm import storage
from open_lm.checkpoint.files import numbered, remove_checkpoint
from open_lm.checkpoint.finding import Candidate
from open_lm.checkpoint.folders import INCOMPLETE, remove_folder, step_folder, step_folders, step_number, unfinished
from open_lm.checkpoint.interchange import write_interchange, write_latest
from open_lm.checkpoint.policy import due_after_epoch, due_after_step, superseded
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.sharded import ShardedWriter, StoredTensors, TrainingState, incompleteness
from open_lm.config.sections import CheckpointConfig
from open_lm.distributed.processes import run_on_all_ranks, run_on_master
from open_lm.errors import StorageError
from open_lm.monitor.run_folder import RunPaths


class CheckpointManager:
    """`epochs`: of the whole run, whose last one is always kept."""

    def __init__(self, paths: RunPaths, cfg: CheckpointConfig, epochs: int) -> None:
        self.paths, self.cfg, self.epochs = paths, cfg, epochs
        self.writer = ShardedWriter()
        self._saved_step: int | None = None  # of the last save begun: at an epoch's end it may be there already

    def start(self) -> None:
        """Clear away what a killed run left unfinished, and make sure that all ranks see the same folder."""
        if not self.paths.enabled:
            return
        run_on_master(self._remove_unfinished)
        run_on_all_ranks(self._find_probe)
        run_on_master(lambda: storage.remove(self._probe))

    # ------------------------------------------------------------------------------------------ saving
    def due(self, step: int, time_is_up: bool) -> bool:
        """Whether a checkpoint is to be saved in the middle of an epoch, after `step` steps."""
        return self.paths.enabled and (time_is_up or due_after_step(self.cfg, step))

    def save_step(self, progress: Progress, state: TrainingState, wait: bool = False) -> None:
        """Save in the middle of an epoch. Without sharded checkpoints (--checkpoint-format interchange) the one file
        epoch_latest.pt is written, which alone can stand between two epochs."""
        if self.paths.enabled:
            self._save(progress, state, self._write_latest if self._only_interchange else None, wait)

    def save_epoch(self, progress: Progress, state: TrainingState) -> None:
        """Save what is due at the end of an epoch."""
        if self.paths.enabled and (self._is_kept(progress) or self.cfg.save_most_recent):
            self._save(progress, state, partial(self._write_files, progress), wait=False)

    def make_up(self, resumed: str | None, progress: Progress) -> None:
        """Make, in the background, the interchange files of the checkpoint at an epoch's end that the run goes on
        from, where it was killed before they were complete."""
        if not self.paths.enabled or self.cfg.checkpoint_format == "sharded" or not self._is_kept(progress):
            return
        if resumed is None or step_number(resumed) is None:
            return
        folder = resumed.rpartition("/")[0]
        if run_on_master(lambda: progress.epoch not in numbered(folder)):
            self.writer.follow_up(resumed, lambda: self._write_files(progress, StoredTensors(resumed)))

    def save_failed(self, progress: Progress, state: TrainingState) -> str | None:
        """Save to checkpoints_failed/ what a run ends with that cannot go on; returns where it is."""
        if not self.paths.enabled:
            return None
        self.writer.wait()
        folder = storage.join(self.paths.failed, step_folder(progress.step or 0))
        failed = self.paths.failed

        def finish() -> None:
            if self.cfg.checkpoint_format != "sharded":
                write_interchange(StoredTensors(folder), failed, self.paths.name)
            if self._only_interchange:
                remove_folder(folder)

        self.writer.save(state, folder, progress.step or 0, finish, wait=True)
        return folder if self.cfg.checkpoint_format != "interchange" else failed

    def check(self) -> None:
        """Raise what has gone wrong with a save in the background."""
        self.writer.check()

    def finish(self) -> None:
        """Wait for the save in the background, and raise what has gone wrong with it."""
        self.writer.wait()

    def newest(self) -> Candidate | None:
        """The newest complete sharded checkpoint of this run. Wait for the save in the background first."""

        def find() -> Candidate | None:
            for step, url in reversed(step_folders(self.paths.checkpoints).items()):
                if incompleteness(url) is None:
                    return Candidate(url, step, epoch=-1, sharded=True, remote=storage.is_remote(url))
            return None

        return run_on_master(find) if self.paths.enabled else None

    # ------------------------------------------------------------------------------------------ one save
    def _is_kept(self, progress: Progress) -> bool:
        """Whether the end of this epoch is saved for good."""
        return progress.is_final or due_after_epoch(self.cfg, progress.epoch, progress.epoch >= self.epochs)

    @property
    def _only_interchange(self) -> bool:
        return self.cfg.checkpoint_format == "interchange"

    def _save(
        self, progress: Progress, state: TrainingState, make_files: Callable[[StoredTensors], None] | None, wait: bool
    ) -> None:
        step = progress.step or 0
        if step == self._saved_step and not self._only_interchange and make_files is None:
            if wait:
                self.writer.wait()
            return
        folder = storage.join(self.paths.checkpoints, step_folder(step))
        if self._only_interchange:
            folder = storage.join(self.paths.checkpoints, f"{step_folder(step)}-passing{INCOMPLETE}")
        self.writer.save(state, folder, step, partial(self._after_writing, folder, step, make_files), wait)
        self._saved_step = step

    def _after_writing(self, folder: str, step: int, make_files: Callable[[StoredTensors], None] | None) -> None:
        """On rank 0, once the sharded checkpoint in `folder` is complete."""
        if not self._only_interchange:
            logging.info(
                f"saved checkpoint {folder} in {self.writer.last_write_s:.1f} s (the step waited for "
                f"{self.writer.last_pause_s:.2f} s)"
            )
        if make_files is not None:
            make_files(StoredTensors(folder))
        if self._only_interchange:
            remove_folder(folder)
            return
        there = step_folders(self.paths.checkpoints)
        for old in superseded(self.cfg, there, step):
            remove_folder(there[old])

    def _write_files(self, progress: Progress, stored: StoredTensors) -> None:
        """The interchange files that are due at the end of an epoch."""
        if self._is_kept(progress) and self.cfg.checkpoint_format != "sharded":
            self._write_epoch(stored, progress.epoch)
        if self.cfg.save_most_recent:
            self._write_latest(stored)

    def _write_epoch(self, stored: StoredTensors, epoch: int) -> None:
        folder = self.paths.checkpoints
        path = write_interchange(stored, folder, self.paths.name)
        logging.info(f"saved checkpoint {path}")
        previous = [number for number in numbered(folder) if number < epoch]
        if self.cfg.delete_previous_checkpoint and previous:
            remove_checkpoint(folder, previous[-1])

    def _write_latest(self, stored: StoredTensors) -> None:
        write_latest(stored, self.paths.checkpoints, self.paths.name)

    # ------------------------------------------------------------------------------------------ the folder
    def _remove_unfinished(self) -> None:
        """Folders that a killed run has not completed; the place of the probe is made on the way."""
        for folder in unfinished(self.paths.checkpoints):
            logging.info(f"removing {folder}, which an earlier start has not finished")
            remove_folder(folder)
        storage.write_bytes(self._probe, b"")

    def _find_probe(self) -> None:
        if not storage.exists(self._probe):
            raise StorageError(
                f"{self.paths.checkpoints}: what rank 0 writes there is not seen by another rank: give --logs or "
                "--checkpoint-dir a folder that all nodes share, or an s3:// address"
            )

    @property
    def _probe(self) -> str:
        return storage.temporary_name(storage.join(self.paths.checkpoints, "probe"), "all-ranks")
