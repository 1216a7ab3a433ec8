"""The parts of a run, built from its configuration: data, model, weights, trainer. Wires, decides nothing."""

from __future__ import annotations

import logging
import random
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from open_lm import checkpoint
from open_lm.averaging import ModelAverager
from open_lm.checkpoint import Progress
from open_lm.config import Config
from open_lm.config_checks import wants_training
from open_lm.data.loader import TrainLoader, ValLoader, build_train_loader, build_val_loaders
from open_lm.data.plan import epoch_end_step
from open_lm.distributed import Runtime, build_mesh, on_all
from open_lm.errors import CheckpointError, ConfigError
from open_lm.evaluate import EvaluationOptions
from open_lm.initialization import init_weights
from open_lm.metrics import device_peak_flops, model_flops_per_token
from open_lm.optim import build_optimizer
from open_lm.parallelize import parallelize, unwrap
from open_lm.precision import build_scaler, compute_dtype, get_autocast, parameter_dtype
from open_lm.run_folder import RunPaths
from open_lm.scheduler import build_scheduler
from open_lm.train import Report, StepOptions, Trainer


@dataclass
class Session:
    """A run whose parts stand. `params` is the model's shape, `resume` the checkpoint that the run goes on from or
    evaluates, `progress` what that says."""

    config: Config
    runtime: Runtime
    paths: RunPaths
    model: nn.Module
    params: Any
    train_loader: TrainLoader | None
    val_loaders: list[ValLoader]
    resume: str | None
    progress: Progress
    averagers: ModelAverager | None

    def end_step(self, epoch: int) -> int:
        """Optimizer steps done after `epoch` epochs."""
        data = self.config.data
        assert data.train_num_samples is not None
        return epoch_end_step(
            epoch,
            epoch_tokens=data.train_num_samples,
            seq_len=self.params.seq_len,
            global_batch_size=data.global_batch_size,
        )

    @property
    def total_steps(self) -> int:
        return self.end_step(self.config.data.epochs)


def build_session(config: Config, runtime: Runtime, paths: RunPaths, resume: str | None) -> Session:
    """Data first, which costs least to find wrong, then the model and its weights. Collective.

    `resume` is the checkpoint of --resume, found already. Batch sizes in `config` are resolved for the number of ranks.
    """
    if runtime.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as OpenLM has always trained
    _seed_everything(config.run.seed + runtime.rank)
    model = on_all(lambda: _create_model(config))
    params: Any = model.params
    train_loader, val_loaders = on_all(lambda: _build_loaders(config, runtime, params))
    model = parallelize(
        model,
        build_mesh(runtime, config.parallel),
        config.parallel,
        device=runtime.device,
        model_cfg=config.model,
        dtype=parameter_dtype(config.precision.precision),
        initialise=lambda made: init_weights(made, config.run.seed),
    )
    resume, progress = _load_weights(config, model, resume, training=train_loader is not None)
    averagers = ModelAverager(model, config.optim.averagers) if config.optim.averagers else None
    if averagers is not None and resume is not None:
        checkpoint.load_averagers(resume, averagers)
    return Session(config, runtime, paths, model, params, train_loader, val_loaders, resume, progress, averagers)


def build_trainer(session: Session, report: Report) -> Trainer:
    """The trainer at the step that the session's progress says, with its optimizer, schedule and place in the data."""
    config, device, loader = session.config, session.runtime.device, session.train_loader
    assert loader is not None
    optim, precision = config.optim, config.precision.precision
    optimizer = build_optimizer(session.model, optim)
    cooldown = None if optim.epochs_cooldown is None else session.end_step(config.data.epochs - optim.epochs_cooldown)
    trainer = Trainer(
        model=session.model,
        optimizer=optimizer,
        scheduler=build_scheduler(optim, optimizer, session.total_steps, cooldown),
        loader=loader,
        options=StepOptions(
            runtime=session.runtime,
            autocast=get_autocast(precision, device.type),
            accum_freq=optim.accum_freq,
            z_loss_coefficient=optim.z_loss_coefficient,
            grad_clip_norm=optim.grad_clip_norm,
            log_logit_mean=config.logging.log_logit_mean,
        ),
        report=report,
        seq_len=session.params.seq_len,
        global_batch_size=config.data.global_batch_size,
        total_steps=session.total_steps,
        log_every=config.logging.log_every_n_steps,
        scaler=build_scaler(precision, device),
        averagers=session.averagers,
        average_loss_every=optim.log_avg_model_training_loss,
        flops_per_token=model_flops_per_token(unwrap(session.model)),
        peak_flops=device_peak_flops(device, _matmul_dtype(config, device)),
    )
    _restore(session, trainer)
    return trainer


def evaluation_options(session: Session, samples_seen: int | None) -> EvaluationOptions:
    """For a validation after `samples_seen` sequences (None: not known)."""
    config = session.config
    return EvaluationOptions(
        runtime=session.runtime,
        autocast=get_autocast(config.precision.precision, session.runtime.device.type),
        cfg=config.validation,
        model_name=config.model.hf_model or config.model.model,
        checkpoint_path=session.resume,
        train_tokens=None if samples_seen is None else samples_seen * session.params.seq_len,
        log_every=config.logging.log_every_n_steps,
    )


def progress_after(session: Session, trainer: Trainer, epoch: int, before: tuple[int, int]) -> Progress:
    """What a checkpoint says when `epoch` epochs are done; `before`: step and sequences seen at the epoch's start."""
    assert session.train_loader is not None
    expected = max(trainer.step - before[0], 1) * session.config.data.global_batch_size
    return Progress(
        epoch=epoch,
        step=trainer.step,
        samples_seen=trainer.samples_seen,
        seed=session.config.run.seed,
        is_final=trainer.step >= session.total_steps,
        percentage_of_data_seen=(trainer.samples_seen - before[1]) / expected,
        train_data_string=[source.name for source in session.train_loader.sources],
        data_state=trainer.data_state,
    )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _create_model(config: Config) -> nn.Module:
    """Without memory, so that no rank ever holds what it will not keep; --hf-model comes with its weights."""
    if config.model.hf_model:
        from open_lm.hf.trainable import create_hf_model

        return create_hf_model(config.model)
    from open_lm.model import create_model

    with torch.device("meta"):
        return create_model(config.model)


def _build_loaders(config: Config, runtime: Runtime, params: Any) -> tuple[TrainLoader | None, list[ValLoader]]:
    data, validation = config.data, config.validation
    sizes: dict[str, Any] = {
        "seq_len": params.seq_len,
        "vocab_size": params.vocab_size,
        "rank": runtime.rank,
        "world_size": runtime.world_size,
    }
    train_loader = None
    if wants_training(data):
        rows = data.global_batch_size // runtime.world_size
        train_loader = build_train_loader(data, batch_size=rows, seed=config.run.seed, **sizes)
    rows = (validation.global_val_batch_size or data.global_batch_size) // runtime.world_size
    return train_loader, build_val_loaders(validation, data, batch_size=rows, **sizes)


def _load_weights(config: Config, model: nn.Module, resume: str | None, training: bool) -> tuple[str | None, Progress]:
    """Load what the flags name into the model; returns the checkpoint that the run goes on from, and its progress.

    Evaluation takes --resume and --pretrained alike; training goes on from --pretrained with --load-pretrained-state.
    """
    cfg = config.checkpoint
    if resume is None and cfg.pretrained and (cfg.load_pretrained_state or not training):
        resume = cfg.pretrained
    if resume is not None:
        progress = checkpoint.load_weights(resume, model)
        if training:
            _check_resumable(resume, progress, config.run.seed)
        return resume, progress
    if cfg.pretrained:
        checkpoint.load_weights(cfg.pretrained, model)
    elif cfg.average:
        checkpoint.load_average(cfg.average, cfg.average_coefficients, model)
    elif not training and not config.model.hf_model:
        raise ConfigError("there is no model to evaluate: give its checkpoint with --resume, --pretrained or --average")
    return None, Progress(step=0, samples_seen=0 if training else None)


def _check_resumable(path: str, progress: Progress, seed: int) -> None:
    if progress.step is None:
        raise CheckpointError(f"{path}: does not say after which step it was saved; begin a new run with --pretrained")
    if progress.seed not in (None, seed):
        raise CheckpointError(
            f"{path}: was trained with --seed {progress.seed}, this run has --seed {seed}, which orders the data "
            f"differently; continue with --seed {progress.seed}, or begin a new run from it with --pretrained"
        )


def _restore(session: Session, trainer: Trainer) -> None:
    """Optimizer, generators, counters and place in the data of the checkpoint that the run goes on from."""
    progress, path = session.progress, session.resume
    if path is None:
        return
    checkpoint.load_optimizer(Namespace(resume=path), session.model, trainer.optimizer, trainer.scaler)
    checkpoint.load_rng(path)
    batch = trainer.global_batch_size
    trainer.step = progress.step or 0
    trainer.samples_seen = trainer.step * batch if progress.samples_seen is None else progress.samples_seen
    if progress.data_state is not None:
        trainer.loader.rewind(progress.data_state)
    elif trainer.step:
        if session.runtime.is_master:
            logging.warning(
                f"{path}: says nothing about its place in the data; going on after the first {trainer.step * batch} "
                "sequences of this run's own order"
            )
        trainer.loader.rewind(trainer.loader.state, skip_batches=trainer.step)
    trainer.data_state = trainer.loader.state


def _matmul_dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.parallel.fsdp and (config.parallel.fsdp_amp or config.parallel.fsdp_pure_bf16):
        return torch.bfloat16
    return compute_dtype(config.precision.precision, device.type)
