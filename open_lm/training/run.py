"""The stages of a run: settings, parts, state, then an evaluation or a training with validation, checkpoints and stops.

Next on the path of a batch: open_lm.training.trainer.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

from open_lm.checkpoint import Candidate, CheckpointManager, Progress, candidates_at, find_candidates
from open_lm.checkpoint.adapters import KEY as ADAPTERS_KEY
from open_lm.checkpoint.sharded import TrainingState
from open_lm.config.checks import wants_training
from open_lm.data import provenance
from open_lm.data.tokenizers import check_tokenizers
from open_lm.distributed.processes import Runtime, run_on_all_ranks, run_on_master
from open_lm.errors import CheckpointError, DataError, join_problems
from open_lm.evaluate.validation import loss_problems, non_finite_weights
from open_lm.monitor.loggers import MetricLoggers, log_to_file
from open_lm.monitor.run_folder import RunPaths
from open_lm.monitor.watchdog import Watchdog, long_operation
from open_lm.report.run_records import RunRecords
from open_lm.system.names import setting_text
from open_lm.training.build import RunParts, build_parts, build_trainer
from open_lm.training.control import Decision, RunControl
from open_lm.training.diagnostics import Diagnostics
from open_lm.training.evaluations.moment import Moment
from open_lm.training.evaluations.runner import Evaluations
from open_lm.training.out_of_memory import explained_out_of_memory
from open_lm.training.raw_text import IndexingStopped, prepare_text
from open_lm.training.restore import load_state, restore_from
from open_lm.training.run_length import run_length_problems
from open_lm.training.setup import (
    check_device,
    open_records,
    open_run,
    resolve_epoch_length,
    resolve_settings,
    start_logging,
    warn_changed_flags,
)
from open_lm.training.trainer import Trainer, TrainingDiverged

SAVE_TIMEOUT_S = 6 * 3600.0  # the watchdog allows this much extra time for saving to a slow store
_MAX_ROLLBACKS = 5  # to the same checkpoint


def run(args: argparse.Namespace, architecture: dict[str, Any], runtime: Runtime, stack: ExitStack) -> None:
    """Train or evaluate as `args` request; `stack` closes what the run opens. Collective.

    Adds to `args` what the run resolves (name, batch sizes, paths, ...). `architecture` is the model's JSON file.
    """
    first_resume = args.resume  # restarted ranks continue their own run, if it has a checkpoint
    run_on_all_ranks(lambda: resolve_epoch_length(args, architecture))
    config, layout = resolve_settings(args, runtime)
    trains = wants_training(config.data)
    control = RunControl(runtime.is_master, config.checkpoint.save_every_minutes)
    if trains:  # an evaluation has nothing to save: a signal ends it
        stack.enter_context(control)
    start_log_file = start_logging(args, config, runtime, stack)
    check_device(config, architecture, runtime, layout)
    paths = RunPaths(config.logging.logs, args.name, config.checkpoint.checkpoint_dir)
    run_on_master(lambda: stack.enter_context(paths.claim(config.checkpoint.resume)))
    saved = find_candidates(config.checkpoint, config.logging, paths)
    if config.checkpoint.resume == "latest" and not saved:
        run_on_master(paths.check_checkpoint_dir)
        if first_resume not in (None, "latest"):
            saved = run_on_master(lambda: candidates_at(first_resume))
    try:
        config = prepare_text(args, config, architecture, runtime, paths, stack=stack, is_stopped=control.is_stopped)
    except IndexingStopped:
        if runtime.is_master:
            logging.warning("stopped by a signal before training; the same command continues the text index")
        return
    folder = paths.diagnostics if paths.enabled else None
    diagnostics = stack.enter_context(Diagnostics(config.diagnostics, runtime, folder))
    with explained_out_of_memory(config, layout, runtime, diagnostics.write_snapshot):
        parts = build_parts(config, runtime, paths)
        weights = _loaded_weights(parts, saved)
        compared = [*weights, *(parts.distillation.weights if parts.distillation is not None else ())]
        run_on_master(lambda: check_tokenizers(parts.sources, compared, config.data.allow_other_tokenizer))
        evaluations = Evaluations(parts, weights[0] if weights else None)
        trainer = build_trainer(parts, control) if trains else None
        load_state(parts, trainer, saved)
        args.resume = parts.resume
        loggers, flags = open_run(args, architecture, parts, stack)
        records = open_records(parts, stack)
        if runtime.is_master:
            warn_changed_flags(parts.saved_flags, flags)
            for problem in (
                run_length_problems(config, trainer.scheduler, parts.total_steps) if trainer is not None else ()
            ):
                logging.warning(problem)
            if not config.data.document_mask and (names := provenance.with_conversations(parts.sources)):
                logging.warning(
                    f"{', '.join(names)}: the data have packed conversations; without --document-mask, attention "
                    "crosses their borders"
                )
        start_log_file(paths)
        # Entered last, so that it exits first: a failing rank reports before it waits for anything.
        stack.enter_context(Watchdog(config.faults.hang_timeout, runtime, folder))
        if trainer is None:
            evaluate(parts, evaluations, loggers)
            records.rank_times.exchange_energy()
        else:
            trainer.report = loggers.log
            diagnostics.limit_to(parts.total_steps)
            trainer.at_step = diagnostics.at_step
            Training(parts, trainer, evaluations, loggers, flags=flags, records=records).run()


def _loaded_weights(parts: RunParts, saved: Sequence[Candidate]) -> list[str]:
    """Return the checkpoints that the run loads: the newest of `saved`, or those of --pretrained or --average."""
    cfg = parts.config.checkpoint
    return [saved[0].url] if saved else [cfg.pretrained] if cfg.pretrained else cfg.average or []


def evaluate(parts: RunParts, evaluations: Evaluations, loggers: MetricLoggers) -> None:
    """Evaluate the loaded weights or, with --averagers, the first averaged model.

    Raises:
        CheckpointError: there is no such average, or a loss is not finite.
    """
    logging.info("No training required, evaluating instead.")
    step, weights = parts.progress.step or 0, parts.resume or " + ".join(parts.config.checkpoint.average or [])
    name, averager = next(iter(parts.averagers.avgs_dict.items())) if parts.averagers else (None, None)
    if averager is not None and not averager.is_loaded:
        raise CheckpointError(
            f"--averagers {name}: {weights or 'the model'} has no such average; evaluate its weights without "
            "--averagers, or give a checkpoint of a run with this averager"
        )
    if averager is not None:
        logging.info(f"=> evaluation avg {name}")
    with nullcontext() if averager is None else averager.applied():
        evaluations.start(loggers, step)
        moment = Moment(step, parts.tokens(parts.progress.samples_seen), weights or None, average=name)
        failure = evaluations.run(moment, all_kinds=True)
        if problems := loss_problems(evaluations.validation_results(step) or []):
            problems += non_finite_weights(parts.model)
            error = CheckpointError(join_problems(problems, f"{weights or 'the model'} cannot be evaluated"))
            error.on_every_rank = True
            raise error
        if failure is not None:
            raise failure


class _Stopped(Exception):
    """A stop of the run after a signal; its state is saved."""


class Training:
    """The epochs of a training run: from the trainer's restored state to the last step.

    flags: the run's settings, which its checkpoints record.
    """

    def __init__(
        self,
        parts: RunParts,
        trainer: Trainer,
        evaluations: Evaluations,
        loggers: MetricLoggers,
        *,
        flags: Mapping[str, Any],
        records: RunRecords,
    ) -> None:
        self.parts, self.trainer, self.evaluations = parts, trainer, evaluations
        self.loggers, self.flags, self.records = loggers, flags, records
        self.manager = CheckpointManager(parts.paths, parts.config.checkpoint, parts.config.data.epochs)
        self._rollbacks: dict[int, int] = {}  # step of a checkpoint -> number of rollbacks to it
        trainer.after_step, trainer.rank_times = self._after_step, records.rank_times
        records.progress = trainer.progress

    def run(self) -> None:
        """Train to the end, or until a signal; then save the state and return normally.

        Raises:
            TrainingDiverged: too many bad steps; the state is in checkpoints_failed/.
            StorageError: a checkpoint cannot be written.
        """
        self.manager.start()
        self._finish_interrupted_epoch()
        self._log_schedule()
        try:
            self._evaluate_start()
            self._run_epochs()
            logging.info("Model has seen the desired number of tokens. Ending training.")
        except _Stopped:
            outcome = "the state is saved; the same command with --resume latest continues from it"
            if not self.parts.paths.enabled:
                outcome = "nothing is saved because of --logs none"
            if self.parts.runtime.is_master:
                logging.warning(f"stopped by a signal after step {self.trainer.step}; {outcome}")
        except TrainingDiverged:
            with long_operation("saving", SAVE_TIMEOUT_S):
                path = self.manager.save_failed(*self._snapshot(self.parts.progress.epoch))
            saved = f"; the state is saved in {path}" if path is not None else ""
            logging.error(f"Training exiting due to NaN value{saved}")
            raise
        with long_operation("saving", SAVE_TIMEOUT_S):
            self.manager.finish()
        self.evaluations.log_times()

    def _finish_interrupted_epoch(self) -> None:
        """Complete the end of an epoch after which the previous process was killed."""
        parts, progress = self.parts, self.parts.progress
        at_epoch_end = progress.epoch > 0 and progress.step == parts.end_step(progress.epoch)
        if at_epoch_end and parts.config.checkpoint.resume == "latest":
            self.manager.write_missing_files(parts.resume, progress)

    # ------------------------------------------------------------------------------------------ epochs
    def _run_epochs(self) -> None:
        parts, trainer = self.parts, self.trainer
        while parts.end_step(parts.progress.epoch) < parts.total_steps:
            epoch = parts.progress.epoch
            logging.info(f"Start epoch {epoch}")
            names = setting_text([source.name for source in trainer.loader.sources])
            logging.info(f"=> epoch {epoch}, training on {names}")
            end_step = parts.end_step(epoch + 1)
            # A checkpoint with other epochs, such as one of the original OpenLM, may be behind this epoch's first step.
            trainer.run_epoch(epoch, end_step, min(parts.end_step(epoch), trainer.step))
            if trainer.step >= end_step:  # else it rolled back to an earlier epoch
                self._end_epoch(epoch + 1)

    def _end_epoch(self, epoch: int) -> None:
        """Validate if due, and save. A failed validation is raised after saving."""
        parts, trainer = self.parts, self.trainer
        progress, state = self._snapshot(epoch)
        if progress.is_final and parts.runtime.is_master:
            total = parts.total_steps
            logging.info(f"step: {trainer.step} has reached/exceeded total_steps: {total}. ending training.")
        failure = self.evaluations.run(self._moment(epoch, self.manager.epoch_checkpoint(progress)))
        if failure is not None:
            logging.error(f"an evaluation failed; saving the checkpoint before ending: {failure}")
        results = self.evaluations.validation_results(trainer.step)
        if results is not None:
            progress = replace(progress, evaluation_metrics=results)
        values = {
            "tokens": trainer.samples_seen * parts.params.seq_len,
            "train/epochs_done": progress.epoch,
            "train/percentage_of_data_seen": progress.percentage_of_data_seen,
        }
        self.loggers.log(values, trainer.step)
        parts.progress = progress
        parts.samples_before = trainer.samples_seen
        state.extra |= self._extra(progress)
        with long_operation("saving", SAVE_TIMEOUT_S):
            self.manager.save_epoch(progress, state)
            if failure is not None:
                self.manager.finish()
                raise failure
        self.records.update()

    # ------------------------------------------------------------------------------------------ after each step
    def _after_step(self, decision: Decision) -> None:
        self.manager.check()
        if decision.stop:
            self._save_step(wait=True)
            raise _Stopped
        if decision.rollback:
            self._roll_back()
            return
        if self.trainer.step >= self.parts.end_step(self.parts.progress.epoch + 1):
            return  # `_end_epoch` evaluates and saves
        moment = Moment(self.trainer.step)
        if self.evaluations.is_due(moment):
            with self.trainer.stopwatch.paused():
                self._evaluate_step()
        if self.manager.is_due(self.trainer.step, decision.save):
            self._save_step()

    # ------------------------------------------------------------------------------------------ evaluations
    def _evaluate_start(self) -> None:
        """Evaluate the state that training starts from, unless the run has done so; drop results of later states."""
        is_new_run = self.parts.config.checkpoint.resume != "latest" or self.parts.resume is None
        moment = replace(self._moment(), is_start=True, is_new_run=is_new_run)
        # A run without a checkpoint starts again, with other weights perhaps.
        self.evaluations.rewind(moment if self.parts.resume is not None else replace(moment, step=-1, tokens=-1))
        self.evaluations.start(self.loggers, self.trainer.step)
        failure = self.evaluations.run(moment)
        if failure is not None:
            raise failure

    def _evaluate_step(self) -> None:
        """Run the evaluations that are due after a step inside an epoch. A failure is raised after saving."""
        self.trainer.state()  # updates its counts and waits for the device
        failure = self.evaluations.run(self._moment())
        if failure is not None:
            logging.error(f"an evaluation failed; saving the checkpoint before ending: {failure}")
            self._save_step(wait=True)
            raise failure

    def _moment(self, epochs_done: int | None = None, checkpoint: str | None = None) -> Moment:
        trainer = self.trainer
        return Moment(
            trainer.step,
            self.parts.tokens(trainer.samples_seen),
            checkpoint,
            epochs_done,
            is_last=trainer.step >= self.parts.total_steps,
        )

    # ------------------------------------------------------------------------------------------ saving
    def _save_step(self, wait: bool = False) -> None:
        with long_operation("saving", SAVE_TIMEOUT_S):  # may have to wait for the previous save
            self.manager.save_step(*self._snapshot(self.parts.progress.epoch), wait=wait)
        self.records.update()

    def _roll_back(self) -> None:
        """Load the run's newest checkpoint and continue from it, skipping the data seen since."""
        with long_operation("saving", SAVE_TIMEOUT_S):
            self.manager.finish()
        trainer, step, data_state = self.trainer, self.trainer.step, self.trainer.data_state
        newest = self.manager.newest(step)
        if newest is None:
            logging.warning("loss spike before the first checkpoint: the step is skipped, no checkpoint to go back to")
            return
        assert data_state is not None
        try:
            trainer.loader.check_has_batches(data_state, self.parts.total_steps - newest.step)
        except DataError:
            logging.warning(
                f"loss spike: the step is skipped without going back to step {newest.step}, because the remaining data "
                "do not suffice to skip those seen since (give --multiple-data-passes or more data)"
            )
            return
        self._rollbacks[newest.step] = self._rollbacks.get(newest.step, 0) + 1
        if self._rollbacks[newest.step] > _MAX_ROLLBACKS:
            raise TrainingDiverged(
                f"{_MAX_ROLLBACKS + 1} loss spikes after the checkpoint of step {newest.step}; continue from it with a "
                "lower --lr or --grad-clip-norm, and check the data"
            )
        with long_operation("loading", SAVE_TIMEOUT_S):
            restore_from(self.parts, trainer, newest)
        self.loggers.rewind(newest.step)
        self.evaluations.rewind(self._moment())
        trainer.loader.rewind(data_state)
        trainer.data_state = trainer.loader.state  # a new object, which makes the trainer restart its batches
        logging.warning(
            f"loss spike at step {step}: rolled back to the state of step {newest.step}; the {step - newest.step} "
            "batches since are skipped"
        )

    # ------------------------------------------------------------------------------------------ state
    def _snapshot(self, epoch: int) -> tuple[Progress, TrainingState]:
        """Return the run's progress with `epoch` epochs done, and its live state. Collective."""
        parts, trainer = self.parts, self.trainer
        trainer_state = trainer.state()  # also updates the trainer's counts
        steps = trainer.step - parts.end_step(parts.progress.epoch)
        expected_samples = max(steps, 1) * parts.config.data.global_batch_size
        progress = Progress(
            epoch=epoch,
            step=trainer.step,
            samples_seen=trainer.samples_seen,
            samples_per_source=trainer_state["samples_per_source"],
            seed=parts.config.run.seed,
            global_batch_size=parts.config.data.global_batch_size,
            is_final=trainer.step >= parts.total_steps,
            percentage_of_data_seen=(trainer.samples_seen - parts.samples_before) / expected_samples,
            train_data_string=[source.name for source in trainer.loader.sources],
            data_state=trainer.data_state,
        )
        extra = {"trainer": trainer_state}
        state = TrainingState(trainer.model, trainer.optimizer, trainer.scaler, trainer.averagers, extra)
        state.extra |= self._extra(progress)
        return progress, state

    def _extra(self, progress: Progress) -> dict[str, Any]:
        adapters = self.parts.adapters
        return {
            "name": self.parts.paths.name,
            "progress": progress.to_json(),
            "samples_before": self.parts.samples_before,
            "flags": dict(self.flags),
            **({} if adapters is None else {ADAPTERS_KEY: adapters.to_json()}),
        }

    def _log_schedule(self) -> None:
        config, parts = self.parts.config, self.parts
        if config.optim.z_loss_coefficient:
            logging.info("Using CrossEntropyLossWithZLoss.")
        if self.trainer.peak_flops:
            peak = self.trainer.peak_flops / 1e9
            logging.info(f"MFU is relative to {peak:.0f} GFLOP/s of matrix products per device.")
        step_tokens = config.data.global_batch_size * parts.params.seq_len
        logging.info(f"{parts.total_steps} steps of {step_tokens} tokens, {parts.total_steps * step_tokens} in total.")
        log_to_file("Precounting number of steps / tokens seen per checkpoint:")
        for epoch in range(1, config.data.epochs + 1):
            steps = parts.end_step(epoch)
            log_to_file(f"==> Checkpoint {epoch}, steps {steps}, tokens seen {steps * step_tokens}")
        logging.info(f"Number of checkpoints to be made: {config.data.epochs}.")
