"""Build the parts of a run from its configuration: data, model, trainer. Decides nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from open_lm.checkpoint import AdapterRecord, Progress, weights_sha256
from open_lm.config.adapters import parse_lora
from open_lm.config.checks import wants_training
from open_lm.config.layout import MeshLayout
from open_lm.config.sections import Config
from open_lm.data import provenance
from open_lm.data.epochs import epoch_end_step
from open_lm.data.loader import TrainLoader, build_train_loader
from open_lm.data.order import Source
from open_lm.data.validation_loader import ValLoader, build_val_loaders
from open_lm.distributed.context_parallel import check_sequence_length
from open_lm.distributed.precision import build_scaler, compute_dtype, get_autocast, parameter_dtype
from open_lm.distributed.processes import Runtime, build_layout, run_on_all_ranks
from open_lm.distributed.rng import make_deterministic, seed_everything
from open_lm.errors import ConfigError
from open_lm.finetune.distillation import Distillation, build_distillation
from open_lm.kernels.cpu_memory import keep_freed_memory
from open_lm.model.adapters import add_adapters
from open_lm.model.initialization import init_weights
from open_lm.monitor.metrics import device_peak_flops, model_flops_per_token
from open_lm.monitor.run_folder import RunPaths
from open_lm.optim.averaging import ModelAverager
from open_lm.optim.build import build_optimizer
from open_lm.optim.schedules import build_scheduler
from open_lm.parallel.expert_parallel import check_has_experts
from open_lm.parallel.float8 import check_micro_batch_tokens
from open_lm.parallel.parallelize import parallelize, unwrap
from open_lm.training.control import RunControl
from open_lm.training.gradient_noise import GradientNoise
from open_lm.training.step import StepOptions
from open_lm.training.trainer import Trainer


@dataclass
class RunParts:
    """The parts of a run and its progress.

    Attributes:
        params: shape of the model (seq_len, vocab_size, ...).
        resume: the checkpoint that the run continues from or evaluates.
        progress: progress that this checkpoint records.
        samples_before: sequences trained on before the current epoch.
        saved_flags: settings that the checkpoint was saved with.
        distillation: the teacher of a training run that has one.
        adapters: with --lora, the settings and the base of the adapters; None before a native base is loaded.
    """

    config: Config
    runtime: Runtime
    layout: MeshLayout
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
    adapters: AdapterRecord | None = None
    distillation: Distillation | None = None

    def end_step(self, epoch: int) -> int:
        """Return the number of optimizer steps in the first `epoch` epochs."""
        data = self.config.data
        assert data.train_num_samples is not None
        return epoch_end_step(
            epoch,
            epoch_tokens=data.train_num_samples,
            seq_len=self.params.seq_len,
            global_batch_size=data.global_batch_size,
        )

    def tokens(self, samples: int | None) -> int | None:
        """Return the tokens of training sequences; None if their number is unknown."""
        return None if samples is None else samples * self.params.seq_len

    @property
    def sources(self) -> list[Source]:
        """The sources of the training and validation data."""
        train = [] if self.train_loader is None else self.train_loader.sources
        return [*train, *(source for loader in self.val_loaders for source in loader.sources)]

    @property
    def total_steps(self) -> int:
        return self.end_step(self.config.data.epochs)


def build_parts(config: Config, runtime: Runtime, paths: RunPaths) -> RunParts:
    """Build data loaders and the initialized model. Collective.

    Data come first: they are the cheapest part to find wrong. Batch sizes in `config` are resolved for the number of
    ranks (see open_lm.training.setup.resolve_batch_sizes).
    """
    if runtime.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the original OpenLM
    else:
        keep_freed_memory()
    layout = build_layout(runtime, config.parallel)
    seed_everything(config.run.seed + layout.seed_offset)
    if config.run.deterministic:
        make_deterministic()
    model = run_on_all_ranks(lambda: _create_model(config, layout))
    params: Any = model.params
    adapters = None
    if config.adapters.lora is not None and wants_training(config.data):
        adapters = run_on_all_ranks(lambda: _add_adapters(config, model))
    if config.precision.fp8 and wants_training(config.data):
        check_micro_batch_tokens(config.data.global_batch_size, config.optim.accum_freq, params.seq_len, layout)
    if layout.expert > 1:
        run_on_all_ranks(lambda: check_has_experts(model, layout.expert))
    train_loader, val_loaders = run_on_all_ranks(lambda: _build_loaders(config, layout, params))
    model = parallelize(
        model,
        layout,
        config.parallel,
        device=runtime.device,
        model_cfg=config.model,
        dtype=parameter_dtype(config.precision.precision),
        fp8=config.precision.fp8,
        initialise=lambda module: init_weights(module, config.run.seed),
    )
    averagers = ModelAverager(model, config.optim.averagers) if config.optim.averagers else None
    parts = RunParts(
        config, runtime, layout, paths, model, params, train_loader, val_loaders, averagers, adapters=adapters
    )
    if train_loader is not None:
        sources = train_loader.sources
        end_id = run_on_all_ranks(lambda: end_of_text_id(config, sources))
        parts.distillation = build_distillation(config, runtime, layout, params, train_loader, end_id)
    return parts


def build_trainer(parts: RunParts, control: RunControl) -> Trainer:
    """Build the trainer of a new run with its optimizer and schedule. Set `trainer.report` to log its values."""
    config, device, loader = parts.config, parts.runtime.device, parts.train_loader
    assert loader is not None
    optim, precision = config.optim, config.precision.precision
    optimizer = build_optimizer(parts.model, optim)
    cooldown = None if optim.epochs_cooldown is None else parts.end_step(config.data.epochs - optim.epochs_cooldown)
    noise = None
    if config.logging.log_gradient_noise:
        noise = GradientNoise(
            parts.model,
            parts.layout,
            optim.accum_freq,
            device=device,
            seq_len=parts.params.seq_len,
            global_batch_size=config.data.global_batch_size,
        )
    return Trainer(
        model=parts.model,
        optimizer=optimizer,
        scheduler=build_scheduler(optim, optimizer, parts.total_steps, cooldown),
        loader=loader,
        options=StepOptions(
            runtime=parts.runtime,
            layout=parts.layout,
            autocast=get_autocast(precision, device.type),
            accum_freq=optim.accum_freq,
            reduces_every_micro_batch=config.parallel.reduces_every_micro_batch,
            z_loss_coefficient=optim.z_loss_coefficient,
            grad_clip_norm=optim.grad_clip_norm,
            log_logit_mean=config.logging.log_logit_mean,
            end_of_text_id=end_of_text_id(config, loader.sources),
            distillation=parts.distillation,
        ),
        report=lambda values, step: None,
        seq_len=parts.params.seq_len,
        global_batch_size=config.data.global_batch_size,
        total_steps=parts.total_steps,
        log_every=config.logging.log_every_n_steps,
        scaler=build_scaler(precision, device),
        averagers=parts.averagers,
        average_loss_every=optim.log_avg_model_training_loss,
        flops_per_token=model_flops_per_token(unwrap(parts.model)),
        peak_flops=device_peak_flops(device, _matmul_dtype(config, device)),
        faults=config.faults,
        control=control,
        gradient_noise=noise,
    )


def end_of_text_id(config: Config, sources: Sequence[Source]) -> int | None:
    """Return the token id that ends a document for --document-mask, or None without that flag.

    Raises:
        ConfigError: neither --end-of-text-id nor a dataset.json next to the shards states the id.
    """
    if not config.data.document_mask:
        return None
    if config.data.end_of_text_id is not None:
        return config.data.end_of_text_id
    token_id = provenance.end_of_text_id(sources)
    if token_id is None:
        raise ConfigError(
            "--document-mask needs the id that ends a document, and no dataset.json next to the shards states it: "
            "give --end-of-text-id"
        )
    return token_id


def _create_model(config: Config, layout: MeshLayout) -> nn.Module:
    """Create the model without memory, so that each rank only allocates its shard; --hf-model comes with weights."""
    if config.model.hf_model:
        from open_lm.hf.trainable import create_hf_model

        return create_hf_model(config.model, for_training=wants_training(config.data))
    from open_lm.model.transformer import create_model

    cfg = config.model
    if config.run.deterministic and cfg.attn_name == "auto":  # gradients of xformers differ from run to run
        cfg = replace(cfg, attn_name="torch_attn")
    with torch.device("meta"):
        model = create_model(cfg)
    check_sequence_length(model.seq_len, layout.context)
    return model


def _add_adapters(config: Config, model: nn.Module) -> AdapterRecord | None:
    """Add the adapters of --lora and apply --qlora; return the record of a base that is loaded already (--hf-model)."""
    assert config.adapters.lora is not None
    settings, name, record = parse_lora(config.adapters.lora), config.model.hf_model, None
    if name is not None:
        name = os.path.abspath(name) if os.path.isdir(name) else name
        record = AdapterRecord(settings, name, weights_sha256(model.state_dict()), True, config.adapters.qlora)
    add_adapters(model, settings, config.run.seed, quantize=config.adapters.qlora is not None)
    return record


def _build_loaders(config: Config, layout: MeshLayout, params: Any) -> tuple[TrainLoader | None, list[ValLoader]]:
    data, validation = config.data, config.validation
    shared: dict[str, Any] = {
        "seq_len": params.seq_len,
        "vocab_size": params.vocab_size,
        "rank": layout.data_rank,
        "world_size": layout.data_size,
    }
    train_loader = None
    if wants_training(data):
        batch_size = data.global_batch_size // layout.data_size
        is_new_run = config.checkpoint.resume is None and not config.checkpoint.load_pretrained_state
        train_loader = build_train_loader(
            data,
            batch_size=batch_size,
            seed=config.run.seed,
            reads_whole_run=is_new_run,
            caches=config.distillation.distill_cache or (),
            **shared,
        )
    batch_size = (validation.global_val_batch_size or data.global_batch_size) // layout.data_size
    val_loaders = build_val_loaders(validation, data, batch_size=batch_size, **shared)
    loaders: list[TrainLoader | ValLoader] = [*([train_loader] if train_loader is not None else []), *val_loaders]
    provenance.check_vocabulary([source for loader in loaders for source in loader.sources], params.vocab_size)
    return train_loader, val_loaders


def _matmul_dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.parallel.fsdp and (config.parallel.fsdp_amp or config.parallel.fsdp_pure_bf16):
        return torch.bfloat16
    return compute_dtype(config.precision.precision, device.type)
