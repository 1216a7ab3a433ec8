"""A training from first step to last: epochs, validation, checkpoints, stops, and returns to an earlier state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from open_lm.checkpoint import CheckpointManager, Progress
from open_lm.checkpoint.sharded import TrainingState
from open_lm.distributed.processes import run_on_master
from open_lm.errors import UserError
from open_lm.evaluate.validation import EvaluationOptions
from open_lm.monitor.loggers import MetricLoggers, filter_lines
from open_lm.monitor.watchdog import long_operation
from open_lm.training.build import Session, evaluation_options, restore_from, validate
from open_lm.training.trainer import Agreed, Trainer, TrainingDiverged

STORE_S = 6 * 3600.0  # what the slowest store may take for a checkpoint
_MOST_RETURNS = 5  # to one and the same checkpoint


class _Stopped(Exception):
    """A signal asked the run to end; its state is saved."""


class TrainingRun:
    """The training of a session, whose trainer stands where its checkpoint says.

    `described`: the run's flags, which its checkpoints hold.
    """

    def __init__(
        self, session: Session, trainer: Trainer, loggers: MetricLoggers, described: Mapping[str, Any]
    ) -> None:
        self.session, self.trainer, self.loggers, self.described = session, trainer, loggers, described
        self.manager = CheckpointManager(session.paths, session.config.checkpoint, session.config.data.epochs)
        self._returns: dict[int, int] = {}  # step of a checkpoint -> how often the run went back to it
        trainer.after_step = self._after_step

    def run(self) -> None:
        """Train to the end, or until a signal; then the state is saved, and the function returns as at the end.

        TrainingDiverged once the state is kept in checkpoints_failed/; StorageError where a checkpoint cannot be
        written.
        """
        self.manager.start()
        self._make_up()
        self._forget_later_results()
        self._log_plan()
        try:
            self._run_epochs()
            logging.info("Model has seen the desired number of tokens. Ending training.")
        except _Stopped:
            left = "the state is saved, and the same command with --resume latest goes on from there"
            if not self.session.paths.enabled:
                left = "nothing is saved, as --logs none says"
            if self.session.runtime.is_master:
                logging.warning(f"stopped by a signal after step {self.trainer.step}; {left}")
        except TrainingDiverged:
            with long_operation("saving", STORE_S):
                path = self.manager.save_failed(*self._snapshot(self.session.progress.epoch))
            kept = f"; the state is kept in {path}" if path is not None else ""
            logging.error(f"Training exiting due to NaN value{kept}")
            raise
        with long_operation("saving", STORE_S):
            self.manager.finish()

    def _make_up(self) -> None:
        """What a run that was killed right after the end of an epoch has not come to."""
        session, progress = self.session, self.session.progress
        at_an_end = progress.epoch > 0 and progress.step == session.end_step(progress.epoch)
        if at_an_end and session.config.checkpoint.resume == "latest":
            self.manager.make_up(session.resume, progress)

    # ------------------------------------------------------------------------------------------ epochs
    def _run_epochs(self) -> None:
        session, trainer = self.session, self.trainer
        while session.end_step(session.progress.epoch) < session.total_steps:
            epoch = session.progress.epoch
            logging.info(f"Start epoch {epoch}")
            logging.info(f"=> epoch {epoch}, training on {[source.name for source in trainer.loader.sources]}")
            end_step = session.end_step(epoch + 1)
            # A run of other epochs, such as one of the original, may stand before the place where this one begins.
            trainer.run_epoch(epoch, end_step, min(session.end_step(epoch), trainer.step))
            if trainer.step >= end_step:  # else it went back to an earlier epoch
                self._end_epoch(epoch + 1)

    def _end_epoch(self, epoch: int) -> None:
        """Validate where it is due, and save; a failed validation is raised after saving."""
        session, trainer = self.session, self.trainer
        progress, state = self._snapshot(epoch)
        if progress.is_final and session.runtime.is_master:
            total = session.total_steps
            logging.info(f"step: {trainer.step} has reached/exceeded total_steps: {total}. ending training.")
        failure: UserError | None = None
        if session.val_loaders and (epoch % session.config.validation.val_frequency == 0 or progress.is_final):
            try:
                results = validate(session, self.loggers, self._evaluation_options(), trainer.step)
                progress = replace(progress, evaluation_metrics=results)
            except UserError as error:
                failure = error
                logging.error(f"validation failed; saving the checkpoint before ending: {error}")
        values = {
            "tokens": trainer.samples_seen * session.params.seq_len,
            "train/epochs_done": progress.epoch,
            "train/percentage_of_data_seen": progress.percentage_of_data_seen,
        }
        self.loggers.log(values, trainer.step)
        session.progress = progress
        session.samples_before = trainer.samples_seen
        state.extra |= self._extra(progress)
        with long_operation("saving", STORE_S):
            self.manager.save_epoch(progress, state)
            if failure is not None:
                self.manager.finish()
                raise failure

    def _evaluation_options(self) -> EvaluationOptions:
        return evaluation_options(self.session, self.trainer.samples_seen)

    # ------------------------------------------------------------------------------------------ after each step
    def _after_step(self, agreed: Agreed) -> None:
        self.manager.check()
        if agreed.stop:
            self._save_step(wait=True)
            raise _Stopped
        if agreed.rollback:
            self._go_back()
            return
        at_the_end = self.trainer.step >= self.session.end_step(self.session.progress.epoch + 1)
        if not at_the_end and self.manager.due(self.trainer.step, agreed.save):
            self._save_step()

    def _save_step(self, wait: bool = False) -> None:
        with long_operation("saving", STORE_S):  # which may have to wait for the save before
            self.manager.save_step(*self._snapshot(self.session.progress.epoch), wait=wait)

    def _go_back(self) -> None:
        """Load the newest checkpoint of this run, and go on from it behind the data seen since."""
        with long_operation("saving", STORE_S):
            self.manager.finish()
        trainer, step, data_state = self.trainer, self.trainer.step, self.trainer.data_state
        found = self.manager.newest()
        if found is None:
            logging.warning("the loss has spiked before the first checkpoint: the step is skipped, no state to go to")
            return
        assert data_state is not None
        if not trainer.loader.reaches(data_state, self.session.total_steps - found.step):
            logging.warning(
                f"the loss has spiked: the step is skipped, for the data do not reach to go back to step {found.step} "
                "and pass over what has come since (--multiple-data-passes or more data allow it)"
            )
            return
        self._returns[found.step] = self._returns.get(found.step, 0) + 1
        if self._returns[found.step] > _MOST_RETURNS:
            raise TrainingDiverged(
                f"the loss has spiked {_MOST_RETURNS + 1} times after the checkpoint of step {found.step}; continue "
                "from it with a lower --lr or --grad-clip-norm, and check the data"
            )
        with long_operation("loading", STORE_S):
            restore_from(self.session, trainer, found)
        self.loggers.rewind(found.step)
        self._forget_later_results()
        trainer.loader.rewind(data_state)
        trainer.data_state = trainer.loader.state  # another object: the trainer takes batches anew
        logging.warning(
            f"the loss spiked at step {step}: back to the state of step {found.step}; the {step - found.step} batches "
            "between are passed over"
        )

    # ------------------------------------------------------------------------------------------ the state
    def _snapshot(self, epoch: int) -> tuple[Progress, TrainingState]:
        """Where the run stands when `epoch` epochs are done, and its live state. Collective."""
        session, trainer = self.session, self.trainer
        counted = trainer.state()  # which brings the trainer's counts up to date
        steps = trainer.step - session.end_step(session.progress.epoch)
        expected = max(steps, 1) * session.config.data.global_batch_size
        progress = Progress(
            epoch=epoch,
            step=trainer.step,
            samples_seen=trainer.samples_seen,
            samples_per_source=counted["samples_per_source"],
            seed=session.config.run.seed,
            global_batch_size=session.config.data.global_batch_size,
            is_final=trainer.step >= session.total_steps,
            percentage_of_data_seen=(trainer.samples_seen - session.samples_before) / expected,
            train_data_string=[source.name for source in trainer.loader.sources],
            data_state=trainer.data_state,
        )
        state = TrainingState(trainer.model, trainer.optimizer, trainer.scaler, trainer.averagers, {"trainer": counted})
        state.extra |= self._extra(progress)
        return progress, state

    def _extra(self, progress: Progress) -> dict[str, Any]:
        return {
            "name": self.session.paths.name,
            "progress": progress.to_json(),
            "samples_before": self.session.samples_before,
            "flags": dict(self.described),
        }

    def _forget_later_results(self) -> None:
        """Of validations that an earlier start has made after the state that this one goes on from: they come anew."""
        paths, seen = self.session.paths, self.trainer.samples_seen * self.session.params.seq_len
        if paths.enabled:
            run_on_master(lambda: filter_lines(paths.results, lambda line: (line[0].get("train_tokens") or 0) <= seen))

    # ------------------------------------------------------------------------------------------ what is said
    def _log_plan(self) -> None:
        config, session = self.session.config, self.session
        if config.optim.z_loss_coefficient:
            logging.info("Using CrossEntropyLossWithZLoss.")
        if self.trainer.peak_flops:
            peak = self.trainer.peak_flops / 1e9
            logging.info(f"MFU counts against {peak:.0f} GFLOP/s of matrix products a device.")
        logging.info("Precounting number of steps / tokens seen per checkpoint:")
        step_tokens = config.data.global_batch_size * session.params.seq_len
        for epoch in range(1, config.data.epochs + 1):
            steps = session.end_step(epoch)
            logging.info(f"==> Checkpoint {epoch}, steps {steps}, tokens seen {steps * step_tokens}")
        logging.info(f"Number of checkpoints to be made: {config.data.epochs}.")
