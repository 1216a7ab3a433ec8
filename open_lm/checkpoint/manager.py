"""Manage the checkpoints of one run: when to save, in which formats, and which checkpoints to keep.

Every save is a sharded checkpoint (sharded.py), written in the background. At the end of an epoch, rank 0 writes the
interchange files from it in the same thread. Superseded checkpoints are removed after that, so the newest complete
checkpoint is never removed. All methods are collective, except `check`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from open_lm import storage
from open_lm.checkpoint.adapters import KEY as ADAPTERS_KEY
from open_lm.checkpoint.files import LATEST, adapter_folder, epoch_files, file_name, remove_checkpoint
from open_lm.checkpoint.finding import Candidate
from open_lm.checkpoint.folders import (
    INCOMPLETE,
    remove_folder,
    step_folder,
    step_folders,
    step_number,
    unfinished_folders,
)
from open_lm.checkpoint.interchange import write_interchange, write_latest
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.sharded import ShardedWriter, StoredTensors, TrainingState, incomplete_reason
from open_lm.config.checkpoint_policy import due_after_epoch, due_after_step, superseded
from open_lm.config.sections import CheckpointConfig
from open_lm.distributed.processes import run_on_all_ranks, run_on_master
from open_lm.errors import CheckpointError, ConfigError, StorageError
from open_lm.monitor.run_folder import RunPaths


class CheckpointManager:
    """The checkpoints of one run of `epochs` epochs; the checkpoint of the last epoch is always kept."""

    def __init__(self, paths: RunPaths, cfg: CheckpointConfig, epochs: int) -> None:
        self.paths, self.cfg, self.epochs = paths, cfg, epochs
        self.writer = ShardedWriter()
        self._saved_step: int | None = None  # step of the last save, so that the same step is not saved twice

    def start(self) -> None:
        """Remove the unfinished checkpoints of a killed run, and check that all ranks see the same folder."""
        if not self.paths.enabled:
            return
        run_on_master(self._remove_unfinished)
        run_on_all_ranks(self._check_probe)
        run_on_master(lambda: storage.remove(self._probe))

    # ------------------------------------------------------------------------------------------ saving
    def is_due(self, step: int, time_is_up: bool) -> bool:
        """Return whether to save a checkpoint within an epoch, after `step` steps."""
        return self.paths.enabled and (time_is_up or due_after_step(self.cfg, step))

    def save_step(self, progress: Progress, state: TrainingState, wait: bool = False) -> None:
        """Save a checkpoint within an epoch.

        Without sharded checkpoints (--checkpoint-format interchange) this writes epoch_latest.pt, the only
        interchange file that is not tied to the end of an epoch.
        """
        if self.paths.enabled:
            self._save(progress, state, self._write_latest if self._only_interchange else None, wait)

    def save_epoch(self, progress: Progress, state: TrainingState) -> None:
        """Save the checkpoint of the end of an epoch, if one is due."""
        if self.paths.enabled and (self._is_kept(progress) or self.cfg.save_most_recent):
            self._save(progress, state, partial(self._write_files, progress), wait=False)

    def epoch_checkpoint(self, progress: Progress) -> str | None:
        """Return the path that `save_epoch` saves to, None if no checkpoint is due."""
        is_kept = self._is_kept(progress)
        if not self.paths.enabled or not (is_kept or self.cfg.save_most_recent):
            return None
        name = step_folder(progress.step or 0)
        if self._only_interchange:
            name = file_name("epoch", progress.epoch if is_kept else LATEST)
        return storage.join(self.paths.checkpoints, name)

    def write_missing_files(self, resumed: str | None, progress: Progress) -> None:
        """Write the interchange files of the end-of-epoch checkpoint that the run resumed from, in the background.

        They are missing if the run was killed before they were complete.
        """
        if not self.paths.enabled or self.cfg.checkpoint_format == "sharded" or not self._is_kept(progress):
            return
        if resumed is None or step_number(resumed) is None:
            return
        folder = resumed.rpartition("/")[0]
        if run_on_master(lambda: progress.epoch not in epoch_files(folder)):
            self.writer.run_on_master(resumed, lambda: self._write_files(progress, StoredTensors(resumed)))

    def save_failed(self, progress: Progress, state: TrainingState) -> str | None:
        """Save the final state of a failed run to checkpoints_failed/; return its folder."""
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
        """Raise the error of a failed background save."""
        self.writer.check()

    def finish(self) -> None:
        """Wait for the background save, and raise its error."""
        self.writer.wait()

    def newest(self, up_to_step: int) -> Candidate | None:
        """Return the newest complete sharded checkpoint of this run up to a step. Call `finish` first."""

        def find() -> Candidate | None:
            for step, url in reversed(step_folders(self.paths.checkpoints).items()):
                if step <= up_to_step and incomplete_reason(url) is None:
                    return Candidate(url, step, epoch=-1, sharded=True, remote=storage.is_remote(url))
            return None

        return run_on_master(find) if self.paths.enabled else None

    # ------------------------------------------------------------------------------------------ one save
    def _is_kept(self, progress: Progress) -> bool:
        """Return whether the checkpoint of the end of this epoch is kept permanently."""
        return progress.is_final or due_after_epoch(self.cfg, progress.epoch, progress.epoch >= self.epochs)

    @property
    def _only_interchange(self) -> bool:
        return self.cfg.checkpoint_format == "interchange"

    def _save(
        self, progress: Progress, state: TrainingState, write_files: Callable[[StoredTensors], None] | None, wait: bool
    ) -> None:
        step = progress.step or 0
        if step == self._saved_step and not self._only_interchange and write_files is None:
            if wait:
                self.writer.wait()
            return
        folder = storage.join(self.paths.checkpoints, step_folder(step))
        if self._only_interchange:
            folder = storage.join(self.paths.checkpoints, f"{step_folder(step)}-passing{INCOMPLETE}")
        self.writer.save(state, folder, step, partial(self._on_complete, folder, step, write_files), wait)
        self._saved_step = step

    def _on_complete(self, folder: str, step: int, write_files: Callable[[StoredTensors], None] | None) -> None:
        """Write interchange files and remove superseded checkpoints; runs on rank 0 after the sharded save."""
        if not self._only_interchange:
            logging.info(
                f"saved checkpoint {folder} in {self.writer.last_write_s:.1f} s (training paused for "
                f"{self.writer.last_pause_s:.2f} s)"
            )
        if write_files is not None:
            write_files(StoredTensors(folder))
        if self._only_interchange:
            remove_folder(folder)
            return
        existing = step_folders(self.paths.checkpoints)
        for old_step in superseded(self.cfg, existing, step):
            remove_folder(existing[old_step])

    def _write_files(self, progress: Progress, stored: StoredTensors) -> None:
        """Write the interchange files that are due at the end of an epoch."""
        if self._is_kept(progress):
            checkpoint = stored.folder
            if self.cfg.checkpoint_format != "sharded":
                checkpoint = self._write_epoch(stored, progress.epoch)
            if stored.extra.get(ADAPTERS_KEY):
                self._write_adapters(checkpoint, progress.epoch, stored.extra.get("flags"))
        if self.cfg.save_most_recent:
            self._write_latest(stored)

    def _write_epoch(self, stored: StoredTensors, epoch: int) -> str:
        """Write the interchange files of an epoch, and return the path of epoch_N.pt."""
        folder = self.paths.checkpoints
        path = write_interchange(stored, folder, self.paths.name)
        logging.info(f"saved checkpoint {path}")
        previous = [number for number in epoch_files(folder) if number < epoch]
        if self.cfg.delete_previous_checkpoint and previous:
            remove_checkpoint(folder, previous[-1])
        return path

    def _write_adapters(self, checkpoint: str, epoch: int, flags: dict[str, Any] | None) -> None:
        """Write the adapters of a run with --lora in the format of PEFT."""
        from open_lm.hf.peft_adapters import save_for_peft

        folder = storage.join(self.paths.checkpoints, adapter_folder(epoch))
        try:
            save_for_peft(folder, checkpoint, flags)
        except (ConfigError, CheckpointError) as error:  # the run has lost nothing: the checkpoint has the adapters
            logging.warning(f"{folder}: the adapters could not be written for PEFT ({error})")
            return
        logging.info(f"saved the adapters in {folder} for PEFT")

    def _write_latest(self, stored: StoredTensors) -> None:
        write_latest(stored, self.paths.checkpoints, self.paths.name)

    # ------------------------------------------------------------------------------------------ the folder
    def _remove_unfinished(self) -> None:
        """Remove the unfinished folders of a killed run, and write the probe file."""
        for folder in unfinished_folders(self.paths.checkpoints):
            logging.info(f"removing {folder}, an unfinished checkpoint of an earlier start")
            remove_folder(folder)
        storage.write_bytes(self._probe, b"")

    def _check_probe(self) -> None:
        """Raise StorageError if this rank does not see the probe file of rank 0."""
        if not storage.exists(self._probe):
            raise StorageError(
                f"{self.paths.checkpoints}: a file that rank 0 wrote is not visible on another rank; set --logs or "
                "--checkpoint-dir to a folder that all nodes share, or to an s3:// URL"
            )

    @property
    def _probe(self) -> str:
        return storage.temporary_name(storage.join(self.paths.checkpoints, "probe"), "all-ranks")
