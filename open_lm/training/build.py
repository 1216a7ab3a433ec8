"""The parts of a run, built from its configuration: data, model, weights, trainer. Wires, decides nothing."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from open_lm import checkpoint
from open_lm.checkpoint import Candidate, Progress, sharded
from open_lm.config.checks import wants_training
from open_lm.config.layout import Layout
from open_lm.config.sections import Config
from open_lm.data import provenance
from open_lm.data.loader import TrainLoader, ValLoader, build_train_loader, build_val_loaders
from open_lm.data.order import Source, epoch_end_step
from open_lm.distributed.context_parallel import check_length
from open_lm.distributed.precision import build_scaler, compute_dtype, get_autocast, parameter_dtype
from open_lm.distributed.processes import Runtime, build_layout, on_all, on_master
from open_lm.distributed.rng import make_deterministic, seed_everything
from open_lm.errors import BrokenCheckpoint, CheckpointError, ConfigError, DataError
from open_lm.evaluate.validation import EvaluationOptions, evaluate_sets, validation_metrics
from open_lm.kernels.cpu_memory import keep_freed_memory
from open_lm.model.initialization import init_weights
from open_lm.monitor.loggers import MetricLoggers, append_line
from open_lm.monitor.metrics import device_peak_flops, model_flops_per_token
from open_lm.monitor.run_folder import RunPaths
from open_lm.optim.averaging import ModelAverager
from open_lm.optim.build import build_optimizer
from open_lm.optim.schedules import build_scheduler
from open_lm.parallel.float8 import check_tokens
from open_lm.parallel.parallelize import parallelize, unwrap
from open_lm.training.control import RunControl
from open_lm.training.trainer import StepOptions, Trainer


@dataclass
class Session:
    """A run whose parts stand. `params` is the model's shape, `resume` the checkpoint that the run goes on from or
    evaluates, `progress` what that says; `samples_before` are the sequences trained on before its epoch,
    `saved_flags` the settings that it was saved with."""

    config: Config
    runtime: Runtime
    layout: Layout
    paths: RunPaths
    model: nn.Module
    params: Any
    train_loader: TrainLoader | None
    val_loaders: list[ValLoader]
    averagers: ModelAverager | None
    resume: str | None = None
    progress: Progress = field(default_factory=lambda: Progress(step=0))
    samples_before: int = 0
    saved_flags: dict[str, Any] = field(default_factory=dict)

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


def build_session(config: Config, runtime: Runtime, paths: RunPaths) -> Session:
    """Data first, which costs least to find wrong, then the model, initialised. Collective.

    Batch sizes in `config` are resolved for the number of ranks.
    """
    if runtime.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as OpenLM has always trained
    else:
        keep_freed_memory()
    layout = build_layout(runtime, config.parallel)
    seed_everything(config.run.seed + layout.data_rank)
    if config.run.deterministic:
        make_deterministic()
    model = on_all(lambda: _create_model(config, layout))
    params: Any = model.params
    if config.precision.fp8 and wants_training(config.data):
        check_tokens(config.data.global_batch_size, config.optim.accum_freq, params.seq_len, layout)
    train_loader, val_loaders = on_all(lambda: _build_loaders(config, layout, params))
    model = parallelize(
        model,
        layout,
        config.parallel,
        device=runtime.device,
        model_cfg=config.model,
        dtype=parameter_dtype(config.precision.precision),
        fp8=config.precision.fp8,
        initialise=lambda made: init_weights(made, config.run.seed),
    )
    averagers = ModelAverager(model, config.optim.averagers) if config.optim.averagers else None
    return Session(config, runtime, layout, paths, model, params, train_loader, val_loaders, averagers)


def build_trainer(session: Session, control: RunControl) -> Trainer:
    """The trainer of a new run, with its optimizer and schedule; it reports nothing yet."""
    config, device, loader = session.config, session.runtime.device, session.train_loader
    assert loader is not None
    optim, precision = config.optim, config.precision.precision
    optimizer = build_optimizer(session.model, optim)
    cooldown = None if optim.epochs_cooldown is None else session.end_step(config.data.epochs - optim.epochs_cooldown)
    return Trainer(
        model=session.model,
        optimizer=optimizer,
        scheduler=build_scheduler(optim, optimizer, session.total_steps, cooldown),
        loader=loader,
        options=StepOptions(
            runtime=session.runtime,
            layout=session.layout,
            autocast=get_autocast(precision, device.type),
            accum_freq=optim.accum_freq,
            z_loss_coefficient=optim.z_loss_coefficient,
            grad_clip_norm=optim.grad_clip_norm,
            log_logit_mean=config.logging.log_logit_mean,
            end_of_text_id=end_of_text_id(config, loader.sources),
        ),
        report=lambda values, step: None,
        seq_len=session.params.seq_len,
        global_batch_size=config.data.global_batch_size,
        total_steps=session.total_steps,
        log_every=config.logging.log_every_n_steps,
        scaler=build_scaler(precision, device),
        averagers=session.averagers,
        average_loss_every=optim.log_avg_model_training_loss,
        flops_per_token=model_flops_per_token(unwrap(session.model)),
        peak_flops=device_peak_flops(device, _matmul_dtype(config, device)),
        faults=config.faults,
        control=control,
    )


def evaluation_options(session: Session, samples_seen: int | None) -> EvaluationOptions:
    """For a validation after `samples_seen` sequences (None: not known)."""
    config = session.config
    return EvaluationOptions(
        runtime=session.runtime,
        layout=session.layout,
        autocast=get_autocast(config.precision.precision, session.runtime.device.type),
        cfg=config.validation,
        model_name=config.model.hf_model or config.model.model,
        checkpoint_path=session.resume,
        train_tokens=None if samples_seen is None else samples_seen * session.params.seq_len,
        log_every=config.logging.log_every_n_steps,
        end_of_text_id=end_of_text_id(config, [source for loader in session.val_loaders for source in loader.sources]),
    )


def end_of_text_id(config: Config, sources: Sequence[Source]) -> int | None:
    """The id that ends a document, for --document-mask; None without it. ConfigError where nothing says it."""
    if not config.data.document_mask:
        return None
    found = config.data.end_of_text_id
    found = provenance.end_of_text_id(sources) if found is None else found
    if found is None:
        raise ConfigError(
            "--document-mask has to know the id that ends a document, which no dataset.json beside the shards says: "
            "give --end-of-text-id"
        )
    return found


def validate(
    session: Session, loggers: MetricLoggers, options: EvaluationOptions, step: int, average: str | None = None
) -> list[dict[str, Any]]:
    """Validate, and record the results: a line of results.jsonl, and the loggers' numbers."""
    results = evaluate_sets(session.model, session.val_loaders, options)
    for result in results if average is not None else []:
        result["average"] = average
    if session.paths.enabled:
        on_master(lambda: append_line(session.paths.results, json.dumps(results)))
    tokens = {} if options.train_tokens is None else {"tokens": options.train_tokens}
    loggers.log({**tokens, **validation_metrics(results)}, step)
    return results


# ------------------------------------------------------------------------------------------ loading
def load_state(session: Session, trainer: Trainer | None, found: list[Candidate]) -> None:
    """Put the session where the first of the checkpoints `found` that can be read says; without any, load what
    --pretrained or --average name. Collective.

    Evaluation takes --resume and --pretrained alike; training goes on from --pretrained with --load-pretrained-state.
    """
    cfg = session.config.checkpoint
    if not found and cfg.pretrained and (cfg.load_pretrained_state or trainer is None):
        found = on_master(lambda: checkpoint.named(str(cfg.pretrained)))
    for candidate in found:
        try:
            restore_from(session, trainer, candidate)
            return
        except BrokenCheckpoint as error:
            if candidate is found[-1]:
                raise
            if session.runtime.is_master:
                logging.warning(f"checkpoint {candidate.url} is stepped over: {error}")
    if cfg.pretrained:
        checkpoint.load_weights(on_master(lambda: checkpoint.named(str(cfg.pretrained))[0].url), session.model)
    elif cfg.average:
        checkpoint.load_average(cfg.average, cfg.average_coefficients, session.model)
    elif trainer is None and not session.config.model.hf_model:
        raise ConfigError("there is no model to evaluate: give its checkpoint with --resume, --pretrained or --average")
    session.progress = Progress(step=0, samples_seen=0 if trainer is not None else None)


def restore_from(session: Session, trainer: Trainer | None, candidate: Candidate) -> None:
    """Load a checkpoint into the live run: weights, averages and, with a trainer, all that a training goes on with.

    Collective. CheckpointError where it does not fit; BrokenCheckpoint where it cannot be read, which leaves what is
    loaded so far.
    """
    if trainer is not None:  # before anything large is read
        saved = on_master(lambda: checkpoint.saved_progress(candidate.url, candidate.sharded))
        _check_resumable(candidate.url, saved, session.config)
    load = _load_sharded if candidate.sharded else _load_interchange
    session.progress, extra = load(session, trainer, candidate.url)
    session.resume = candidate.url
    if trainer is None:
        return
    progress = session.progress
    session.saved_flags = extra.get("flags", {})
    batch = trainer.global_batch_size
    trainer.step = progress.step or 0
    trainer.samples_seen = trainer.step * batch if progress.samples_seen is None else progress.samples_seen
    trainer.samples_per_source = dict(progress.samples_per_source or {})
    session.samples_before = int(extra.get("samples_before", trainer.samples_seen))
    if extra:
        trainer.restore(extra["trainer"])
    if progress.data_state is not None:
        _rewind(session, trainer.loader, progress.data_state)
    elif trainer.step:
        if session.runtime.is_master:
            logging.warning(
                f"{candidate.url}: says nothing about its place in the data; going on after the first "
                f"{trainer.step * batch} sequences of this run's own order"
            )
        trainer.loader.rewind(trainer.loader.state, skip_batches=trainer.step)
    trainer.data_state = trainer.loader.state


def _rewind(session: Session, loader: TrainLoader, data_state: dict[str, Any]) -> None:
    """Go to a place in the data; where they have changed, the error says shard by shard how."""
    try:
        loader.rewind(data_state)
    except DataError as error:
        before = provenance.read(session.paths.data) if session.paths.enabled else None
        changes = provenance.differences(before, provenance.describe(loader.sources)) if before else []
        new = [f"  - {change}" for change in changes if "shard" in change or provenance.DATASET_NAME in change]
        raise DataError("\n".join([str(error), *new])) from error


def _load_sharded(session: Session, trainer: Trainer | None, url: str) -> tuple[Progress, dict[str, Any]]:
    state = sharded.TrainingState(session.model, averagers=session.averagers)
    if trainer is not None:
        state.optimizer, state.scaler = trainer.optimizer, trainer.scaler
    extra = sharded.load(state, url)
    progress = Progress.from_json(extra["progress"])
    logging.info(f"loaded {url} (epoch {progress.epoch}, step {progress.step})")
    return progress, extra


def _load_interchange(session: Session, trainer: Trainer | None, url: str) -> tuple[Progress, dict[str, Any]]:
    progress = checkpoint.load_weights(url, session.model)
    if session.averagers is not None:
        checkpoint.load_averagers(url, session.averagers)
    if trainer is not None:
        checkpoint.load_optimizer(Namespace(resume=url), session.model, trainer.optimizer, trainer.scaler)
        checkpoint.load_rng(url)
    return progress, {}


def _check_resumable(url: str, progress: Progress, config: Config) -> None:
    if progress.step is None:
        raise CheckpointError(f"{url}: does not say after which step it was saved; begin a new run with --pretrained")
    seed = config.run.seed
    if progress.seed not in (None, seed):
        raise CheckpointError(
            f"{url}: was trained with --seed {progress.seed}, this run has --seed {seed}, which orders the data "
            f"differently; continue with --seed {progress.seed}, or begin a new run from it with --pretrained"
        )
    batch = config.data.global_batch_size
    saved = progress.global_batch_size
    if saved not in (None, batch):
        raise CheckpointError(
            f"{url}: was trained with {saved} sequences a step, this run has {batch}, which counts steps differently; "
            f"continue with --global-batch-size {saved}, or begin a new run from it with --pretrained"
        )


# ------------------------------------------------------------------------------------------ parts
def _create_model(config: Config, layout: Layout) -> nn.Module:
    """Without memory, so that no rank ever holds what it will not keep; --hf-model comes with its weights."""
    if config.model.hf_model:
        from open_lm.hf.trainable import create_hf_model

        return create_hf_model(config.model)
    from open_lm.model.transformer import create_model

    cfg = config.model
    if config.run.deterministic and cfg.attn_name == "auto":  # xformers' gradients differ from run to run
        cfg = replace(cfg, attn_name="torch_attn")
    with torch.device("meta"):
        model = create_model(cfg)
    check_length(model.seq_len, layout.context)
    return model


def _build_loaders(config: Config, layout: Layout, params: Any) -> tuple[TrainLoader | None, list[ValLoader]]:
    data, validation = config.data, config.validation
    sizes: dict[str, Any] = {
        "seq_len": params.seq_len,
        "vocab_size": params.vocab_size,
        "rank": layout.data_rank,
        "world_size": layout.data_size,
    }
    train_loader = None
    if wants_training(data):
        rows = data.global_batch_size // layout.data_size
        train_loader = build_train_loader(data, batch_size=rows, seed=config.run.seed, **sizes)
    rows = (validation.global_val_batch_size or data.global_batch_size) // layout.data_size
    return train_loader, build_val_loaders(validation, data, batch_size=rows, **sizes)


def _matmul_dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.parallel.fsdp and (config.parallel.fsdp_amp or config.parallel.fsdp_pure_bf16):
        return torch.bfloat16
    return compute_dtype(config.precision.precision, device.type)
