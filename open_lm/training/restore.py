"""Load the state that a run starts from: its own checkpoint, another run's, or weights only.

A way of loading must leave no part of the run's state behind: tests/training/test_state_table.py lists the parts of the
state and the ways to start, with what each way does to each part.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from dataclasses import replace
from typing import Any

from open_lm import checkpoint, storage
from open_lm.checkpoint import AdapterRecord, Candidate, Progress, sharded
from open_lm.config.adapters import parse_lora
from open_lm.config.architecture import read_written_params
from open_lm.config.sections import Config
from open_lm.data import provenance
from open_lm.data.epochs import epoch_sequences
from open_lm.data.loader import TrainLoader
from open_lm.data.resume import is_started, position_text
from open_lm.distributed.processes import run_on_master
from open_lm.errors import BrokenCheckpoint, CheckpointError, ConfigError, DataError
from open_lm.model.adapters import reset_magnitudes
from open_lm.training.build import RunParts
from open_lm.training.trainer import Trainer


def load_state(parts: RunParts, trainer: Trainer | None, candidates: list[Candidate]) -> None:
    """Load the first readable checkpoint of `candidates`; without any, the weights of --pretrained or --average.

    Collective. An evaluation (no trainer) treats --pretrained like --resume. Training continues the checkpoint of
    --pretrained only with --load-pretrained-state: as a new run, which may have another seed and other data.

    Raises:
        CheckpointError: the checkpoint does not fit this run, or all candidates are broken.
        ConfigError: another run's checkpoint leaves this run no step to train.
        DataError: the data differ from those of a resumed checkpoint, or do not suffice.
    """
    cfg = parts.config.checkpoint
    is_new_run = not candidates and bool(cfg.pretrained) and (cfg.load_pretrained_state or trainer is None)
    if is_new_run:
        candidates = run_on_master(lambda: checkpoint.candidates_at(str(cfg.pretrained)))
    if parts.config.adapters.lora is not None and trainer is not None:
        _load_base(parts, candidates)
    if candidates:
        _restore_first(parts, trainer, candidates, is_new_run)
    else:
        _load_weights(parts, trainer)
    if trainer is None:
        return
    if candidates and (is_new_run or cfg.resume != "latest"):
        _check_steps_left(parts, trainer.step)
    trainer.loader.check_has_batches(trainer.loader.state, parts.total_steps - trainer.step)


def _load_base(parts: RunParts, candidates: list[Candidate]) -> None:
    """Load the frozen weights of a run with --lora: those of --pretrained, or the base that the checkpoint names."""
    if parts.adapters is not None:  # --hf-model is loaded already
        return
    cfg, adapters = parts.config.checkpoint, parts.config.adapters

    def find() -> AdapterRecord:
        assert adapters.lora is not None
        if cfg.pretrained:
            base = checkpoint.candidates_at(str(cfg.pretrained))[0].url
            base = base if storage.is_remote(base) else os.path.abspath(storage.local_path(base))
        else:
            saved = checkpoint.adapter_record(candidates[0].url) if candidates else None
            if saved is None:
                raise ConfigError("--lora requires --pretrained, the weights that stay fixed")
            base = saved.base
        sha256 = checkpoint.weights_sha256(checkpoint.read_model_state(base)[0])
        return AdapterRecord(parse_lora(adapters.lora), base, sha256, qlora=adapters.qlora)

    parts.adapters = run_on_master(find)
    checkpoint.load_weights(parts.adapters.base, parts.model)
    reset_magnitudes(parts.model)


def _restore_first(parts: RunParts, trainer: Trainer | None, candidates: list[Candidate], is_new_run: bool) -> None:
    """Load the first candidate that is not broken."""
    for candidate in candidates:
        try:
            restore_from(parts, trainer, candidate, is_new_run)
            return
        except BrokenCheckpoint as error:
            if candidate is candidates[-1]:
                raise
            if parts.runtime.is_master:
                logging.warning(f"skipping checkpoint {candidate.url}: {error}")


def _load_weights(parts: RunParts, trainer: Trainer | None) -> None:
    """Load the weights of --pretrained or --average, if given; all other parts of the state are those of a new run."""
    cfg = parts.config.checkpoint
    if parts.adapters is not None:
        logging.info(f"training adapters ({parts.adapters.settings.text()}) for {parts.adapters.base}")
    elif cfg.pretrained:
        pretrained = str(cfg.pretrained)
        checkpoint.load_weights(run_on_master(lambda: checkpoint.candidates_at(pretrained)[0].url), parts.model)
    elif cfg.average:
        checkpoint.load_average(cfg.average, cfg.average_coefficients, parts.model)
    elif trainer is None and not parts.config.model.hf_model:
        raise ConfigError("no model to evaluate: give its checkpoint with --resume, --pretrained or --average")
    if parts.averagers is not None:
        parts.averagers.reset()
    parts.progress = Progress(step=0, samples_seen=0 if trainer is not None else None)


def restore_from(parts: RunParts, trainer: Trainer | None, candidate: Candidate, is_new_run: bool = False) -> None:
    """Load a checkpoint into the live run: weights, averages and, with a trainer, everything that training continues.

    Collective. is_new_run: training continues another run's checkpoint, possibly with another seed and other data.

    Raises:
        CheckpointError: the checkpoint does not fit this run.
        BrokenCheckpoint: it cannot be read; what was loaded before the error stays loaded.
    """
    if trainer is not None:  # before anything large is read
        saved = run_on_master(lambda: checkpoint.saved_progress(candidate.url, candidate.sharded))
        _check_continues(candidate.url, saved, parts.config, is_new_run)
    _check_adapters(parts, trainer, candidate.url)
    run_on_master(lambda: checkpoint.check_parametrization(candidate.url, parts.model))
    load = _load_sharded if candidate.sharded else _load_interchange
    parts.progress, extra = load(parts, trainer, candidate.url)
    parts.resume = candidate.url
    if trainer is None:
        return
    progress = parts.progress
    parts.saved_flags = extra.get("flags") or run_on_master(lambda: _written_settings(parts, candidate.url))
    batch = trainer.global_batch_size
    trainer.step = progress.step or 0
    trainer.samples_seen = trainer.step * batch if progress.samples_seen is None else progress.samples_seen
    trainer.samples_per_source = dict(progress.samples_per_source or {})
    parts.samples_before = int(extra.get("samples_before", trainer.samples_seen))
    if extra:
        trainer.restore(extra["trainer"])
    has_other_data = (_continue_in_new_run if is_new_run else _continue_data)(parts, trainer)
    if has_other_data:
        trainer.forget_losses()
    trainer.data_state = trainer.loader.state


def _check_adapters(parts: RunParts, trainer: Trainer | None, url: str) -> None:
    """Raise CheckpointError if training cannot continue a checkpoint because of its adapters, or of missing ones."""
    saved, current = run_on_master(lambda: checkpoint.adapter_record(url)), parts.adapters
    if saved is not None and trainer is None and parts.averagers is not None:
        raise CheckpointError(
            f"{url}: contains only the adapters of the averages; give the file of the average, such as poly_8_1_N.pt, "
            "with --pretrained instead of --averagers"
        )
    if trainer is None or saved is current is None:
        return
    if saved is None:
        raise CheckpointError(f"{url}: is a checkpoint of a full model without adapters; give it as --pretrained")
    if current is None:
        raise CheckpointError(
            f"{url}: contains only adapters; continue with --lora {saved.settings.text()}, or start a new run of the "
            "full model from it with --pretrained"
        )
    saved.check_base(current.base_sha256, current.base, url)
    if replace(saved.settings, dropout=0.0) != replace(current.settings, dropout=0.0) or saved.qlora != current.qlora:
        found, expected = (f"{r.settings.text()} (--qlora {r.qlora})" for r in (current, saved))
        raise CheckpointError(f"{url}: was trained with --lora {expected}, but this run has {found}; use the same")


def _continue_data(parts: RunParts, trainer: Trainer) -> bool:
    """Move the loader to the checkpoint's position; return whether the data differ (--allow-changed-data)."""
    if parts.progress.data_state is not None:
        return _rewind(parts, trainer.loader, parts.progress.data_state)
    if trainer.step:
        if parts.runtime.is_master:
            logging.warning(
                f"{parts.resume} does not record its position in the data; continuing after the first "
                f"{trainer.step * trainer.global_batch_size} sequences of this run's own order"
            )
        trainer.loader.rewind(trainer.loader.state, skip_batches=trainer.step)
    return False


def _continue_in_new_run(parts: RunParts, trainer: Trainer) -> bool:
    """Move the loader of a new run to the checkpoint's position in each source that both have, and log where.

    Other sources start at their beginning; with another seed, which gives another order, all of them do. Return whether
    any of the data differ.
    """
    state, loader, seed = parts.progress.data_state, trainer.loader, parts.config.run.seed
    has_other_data, reason = True, ""
    if state is None:
        reason = " (the checkpoint does not record its position in the data)"
    elif state["seed"] != seed:
        reason = f" (--seed was {state['seed']}, now it is {seed})"
    else:
        has_other_data = loader.rewind(state, allow_changed=True)
    if parts.runtime.is_master:
        data = ", ".join(
            f"{source.name} from " + (position_text(position) if is_started(position) else "its beginning")
            for source, position in zip(loader.sources, loader.state["sources"], strict=True)
        )
        logging.info(
            f"this run continues {parts.resume} from epoch {parts.progress.epoch}, step {trainer.step}, with its "
            f"optimizer and at this step of the schedule; data: {data}{reason}"
        )
    return has_other_data


def _rewind(parts: RunParts, loader: TrainLoader, data_state: dict[str, Any]) -> bool:
    """Move the loader to a position; if the data have changed, raise an error that lists the changed shards."""
    try:
        return loader.rewind(data_state)
    except DataError as error:
        before = provenance.read(parts.paths.data) if parts.paths.enabled else None
        changes = provenance.differences(before, provenance.describe(loader.sources)) if before else []
        details = [f"  - {change}" for change in changes if "shard" in change or provenance.DATASET_NAME in change]
        raise DataError("\n".join([str(error), *details])) from error


def _written_settings(parts: RunParts, url: str) -> dict[str, str]:
    """Return the params.txt of the run that wrote an interchange checkpoint, which does not contain its settings."""
    is_own = parts.config.checkpoint.resume == "latest" and parts.paths.enabled
    return read_written_params(url) or (read_written_params(parts.paths.results) if is_own else {})


def _load_sharded(parts: RunParts, trainer: Trainer | None, url: str) -> tuple[Progress, dict[str, Any]]:
    if trainer is None and run_on_master(lambda: checkpoint.adapter_record(url)) is not None:
        return checkpoint.load_weights(url, parts.model), {}  # with the adapters merged
    state = sharded.TrainingState(parts.model, averagers=parts.averagers)
    if trainer is not None:
        state.optimizer, state.scaler = trainer.optimizer, trainer.scaler
    extra = sharded.load(state, url)
    progress = Progress.from_json(extra["progress"])
    logging.info(f"loaded {url} (epoch {progress.epoch}, step {progress.step})")
    return progress, extra


def _load_interchange(parts: RunParts, trainer: Trainer | None, url: str) -> tuple[Progress, dict[str, Any]]:
    load = checkpoint.load_weights if parts.adapters is None else checkpoint.load_adapters
    progress = load(url, parts.model)
    if parts.averagers is not None:
        checkpoint.load_averagers(url, parts.averagers)
    if trainer is not None:
        checkpoint.load_optimizer(Namespace(resume=url), parts.model, trainer.optimizer, trainer.scaler)
        checkpoint.load_rng(url)
    return progress, {}


def _check_continues(url: str, progress: Progress, config: Config, is_new_run: bool) -> None:
    """Raise CheckpointError if training cannot continue from this progress."""
    advice = "start a new run from its weights: " + (
        "remove --load-pretrained-state" if is_new_run else "give it as --pretrained"
    )
    if progress.step is None:
        raise CheckpointError(f"{url} does not record its step; {advice}")
    seed = config.run.seed
    if progress.seed not in (None, seed) and not is_new_run:
        raise CheckpointError(
            f"{url} was trained with --seed {progress.seed}, this run has --seed {seed}, which changes the data "
            f"order; continue with --seed {progress.seed}, continue its state in a new run with --pretrained and "
            f"--load-pretrained-state, or {advice}"
        )
    batch, saved_batch = config.data.global_batch_size, progress.global_batch_size
    if saved_batch not in (None, batch):
        raise CheckpointError(
            f"{url} was trained with {saved_batch} sequences per step, this run has {batch}, which changes the meaning "
            f"of a step; continue with --global-batch-size {saved_batch}, or {advice}"
        )


def _check_steps_left(parts: RunParts, step: int) -> None:
    """Raise ConfigError with the flags to raise if the checkpoint's progress leaves this run no step to train."""
    data, epoch = parts.config.data, parts.progress.epoch
    if epoch < data.epochs and step < parts.total_steps:
        return
    assert data.train_num_samples is not None
    seq_len, next_sequences = parts.params.seq_len, (step + 1) * data.global_batch_size
    epochs = max(epoch + 1, -(-next_sequences // epoch_sequences(data.train_num_samples, seq_len)))
    advice = f"raise --epochs to {epochs} or more"
    if epoch < data.epochs:
        tokens = -(-next_sequences // data.epochs) * seq_len
        advice += f", or --train-num-samples to {tokens} or more"
    raise ConfigError(
        f"{parts.resume} is at epoch {epoch}, step {step}, but this run ends after {data.epochs} epochs of "
        f"--train-num-samples {data.train_num_samples}, {parts.total_steps} steps, so no step is left; {advice}"
    )
