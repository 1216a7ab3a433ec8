"""Load the initial state of a run: from its own checkpoint or that of another run, or only weights."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from open_lm import checkpoint
from open_lm.checkpoint import Candidate, Progress, sharded
from open_lm.config.sections import Config
from open_lm.data import provenance
from open_lm.data.loader import TrainLoader
from open_lm.distributed.processes import run_on_master
from open_lm.errors import BrokenCheckpoint, CheckpointError, ConfigError, DataError
from open_lm.training.build import RunParts
from open_lm.training.trainer import Trainer


def load_state(parts: RunParts, trainer: Trainer | None, candidates: list[Candidate]) -> None:
    """Load the first readable checkpoint of `candidates`; without any, the weights of --pretrained or --average.

    Collective. An evaluation (no trainer) treats --pretrained like --resume. Training continues the checkpoint of
    --pretrained only with --load-pretrained-state.
    """
    cfg = parts.config.checkpoint
    if not candidates and cfg.pretrained and (cfg.load_pretrained_state or trainer is None):
        candidates = run_on_master(lambda: checkpoint.candidates_at(str(cfg.pretrained)))
    for candidate in candidates:
        try:
            restore_from(parts, trainer, candidate)
            return
        except BrokenCheckpoint as error:
            if candidate is candidates[-1]:
                raise
            if parts.runtime.is_master:
                logging.warning(f"skipping checkpoint {candidate.url}: {error}")
    if cfg.pretrained:
        checkpoint.load_weights(
            run_on_master(lambda: checkpoint.candidates_at(str(cfg.pretrained))[0].url), parts.model
        )
    elif cfg.average:
        checkpoint.load_average(cfg.average, cfg.average_coefficients, parts.model)
    elif trainer is None and not parts.config.model.hf_model:
        raise ConfigError("no model to evaluate: give its checkpoint with --resume, --pretrained or --average")
    parts.progress = Progress(step=0, samples_seen=0 if trainer is not None else None)


def restore_from(parts: RunParts, trainer: Trainer | None, candidate: Candidate) -> None:
    """Load a checkpoint into the live run: weights, averages and, with a trainer, everything that training continues.

    Collective.

    Raises:
        CheckpointError: the checkpoint does not fit this run.
        BrokenCheckpoint: it cannot be read; what was loaded before the error stays loaded.
    """
    if trainer is not None:  # before anything large is read
        saved = run_on_master(lambda: checkpoint.saved_progress(candidate.url, candidate.sharded))
        _check_resumable(candidate.url, saved, parts.config)
    load = _load_sharded if candidate.sharded else _load_interchange
    parts.progress, extra = load(parts, trainer, candidate.url)
    parts.resume = candidate.url
    if trainer is None:
        return
    progress = parts.progress
    parts.saved_flags = extra.get("flags", {})
    batch = trainer.global_batch_size
    trainer.step = progress.step or 0
    trainer.samples_seen = trainer.step * batch if progress.samples_seen is None else progress.samples_seen
    trainer.samples_per_source = dict(progress.samples_per_source or {})
    parts.samples_before = int(extra.get("samples_before", trainer.samples_seen))
    if extra:
        trainer.restore(extra["trainer"])
    if progress.data_state is not None:
        _rewind(parts, trainer.loader, progress.data_state)
    elif trainer.step:
        if parts.runtime.is_master:
            logging.warning(
                f"{candidate.url} does not record its position in the data; continuing after the first "
                f"{trainer.step * batch} sequences of this run's own order"
            )
        trainer.loader.rewind(trainer.loader.state, skip_batches=trainer.step)
    trainer.data_state = trainer.loader.state


def _rewind(parts: RunParts, loader: TrainLoader, data_state: dict[str, Any]) -> None:
    """Move the loader to a position; if the data have changed, raise an error that lists the changed shards."""
    try:
        loader.rewind(data_state)
    except DataError as error:
        before = provenance.read(parts.paths.data) if parts.paths.enabled else None
        changes = provenance.differences(before, provenance.describe(loader.sources)) if before else []
        details = [f"  - {change}" for change in changes if "shard" in change or provenance.DATASET_NAME in change]
        raise DataError("\n".join([str(error), *details])) from error


def _load_sharded(parts: RunParts, trainer: Trainer | None, url: str) -> tuple[Progress, dict[str, Any]]:
    state = sharded.TrainingState(parts.model, averagers=parts.averagers)
    if trainer is not None:
        state.optimizer, state.scaler = trainer.optimizer, trainer.scaler
    extra = sharded.load(state, url)
    progress = Progress.from_json(extra["progress"])
    logging.info(f"loaded {url} (epoch {progress.epoch}, step {progress.step})")
    return progress, extra


def _load_interchange(parts: RunParts, trainer: Trainer | None, url: str) -> tuple[Progress, dict[str, Any]]:
    progress = checkpoint.load_weights(url, parts.model)
    if parts.averagers is not None:
        checkpoint.load_averagers(url, parts.averagers)
    if trainer is not None:
        checkpoint.load_optimizer(Namespace(resume=url), parts.model, trainer.optimizer, trainer.scaler)
        checkpoint.load_rng(url)
    return progress, {}


def _check_resumable(url: str, progress: Progress, config: Config) -> None:
    if progress.step is None:
        raise CheckpointError(f"{url} does not record its step; start a new run from it with --pretrained")
    seed = config.run.seed
    if progress.seed not in (None, seed):
        raise CheckpointError(
            f"{url} was trained with --seed {progress.seed}, this run has --seed {seed}, which changes the data "
            f"order; continue with --seed {progress.seed}, or start a new run from it with --pretrained"
        )
    batch, saved_batch = config.data.global_batch_size, progress.global_batch_size
    if saved_batch not in (None, batch):
        raise CheckpointError(
            f"{url} was trained with {saved_batch} sequences per step, this run has {batch}, which changes the meaning "
            f"of a step; continue with --global-batch-size {saved_batch}, or start a new run from it with --pretrained"
        )
