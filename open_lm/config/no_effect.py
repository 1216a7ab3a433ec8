"""Find flags that are set but have no effect because of other flags or of the model's JSON file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from open_lm.config.distill_section import DistillConfig
from open_lm.config.registry import Registry
from open_lm.config.sections import ArchitectureConfig, Config, DataConfig, ParallelConfig, ValidationConfig


def flags_without_effect(config: Config, architecture: Mapping[str, Any] | None = None) -> list[str]:
    """Return one sentence for each flag that differs from its default and has no effect.

    `architecture` holds the contents of the model's JSON file (see `read_architecture`), which take precedence over
    flags. Its keys that are also flags are reported too.
    """
    file = dict(architecture or {})
    reasons = settings_without_effect(config, file)
    sentences = []
    for spec, value in config.settings():
        if value == spec.default:
            continue
        if spec.no_effect:
            sentences.append(f"{spec.flag} has no effect: {spec.no_effect}")
        elif spec.name in reasons:
            sentences.append(f"{spec.flag} has no effect {reasons[spec.name]}")
        elif spec.name in file and file[spec.name] != value:
            sentences.append(
                f"{spec.flag} has no effect: the --model file sets {spec.name} to {file[spec.name]} and takes "
                "precedence"
            )
    for spec in ArchitectureConfig.specs():
        if file.get(spec.name, spec.default) != spec.default and (spec.no_effect or spec.name in reasons):
            reason = f": {spec.no_effect}" if spec.no_effect else f" {reasons[spec.name]}"
            sentences.append(f"the key {spec.name} of the --model file has no effect{reason}")
    return sentences


def settings_without_effect(config: Config, architecture: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the names of settings that other settings disable, with the reason."""
    reasons: dict[str, str] = {}
    for names, has_effect, reason in _CONDITIONS:
        if not has_effect(config):
            reasons |= {name: reason for name in names if name not in reasons}
    file = architecture or {}
    if not file.get("mup", config.model.mup):
        reasons |= dict.fromkeys(("mup_base_width", "mup_base_head_dim"), "without --mup")
    if not file.get("moe_freq", config.model.moe_freq):
        reasons |= dict.fromkeys(
            ("moe_num_experts", "moe_top_k", "moe_capacity_factor", "moe_loss_weight"), _NO_EXPERTS
        )
    for spec, value in config.settings():
        if spec.registry is not None:
            chosen = file.get(spec.name, value)
            reasons = {**_unused_settings(spec.flag, chosen, spec.registry), **reasons}
    return reasons


def _unused_settings(flag: str, value: str, registry: Registry) -> dict[str, str]:
    """Return the settings that only other entries of a flag's registry use, with the reason."""
    users: dict[str, list[str]] = {}
    for entry in registry.entries().values():
        for setting in (*entry.facts.get("requires", ()), *entry.facts.get("uses", ())):
            users.setdefault(setting, []).append(entry.name)
    return {
        setting: f"without {flag} {names[0]}" if len(names) == 1 else f"with {flag} {value}"
        for setting, names in users.items()
        if value not in names
    }


def _has_data(c: Config) -> bool:
    return bool(c.data.train_data or c.data.dataset_manifest or c.data.train_text)


def _trains(c: Config) -> bool:
    return _has_data(c) or c.data.dataset_type == "synthetic"


def _only_evaluates(c: Config) -> bool:
    live = c.live_evaluation
    return not _trains(c) and bool(c.validation.val_data or live.icl_yaml or live.sample_prompts)


_NO_EXPERTS = "without --moe-freq"
# Settings, the condition under which they have an effect, and the reason otherwise. The first reason is reported.
_CONDITIONS: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (
        tuple(spec.name for spec in ParallelConfig.specs() if spec.name.startswith("fsdp_")),
        lambda c: c.parallel.fsdp,
        "without --fsdp",
    ),
    (("accum_reduce",), lambda c: c.parallel.fsdp, "without --fsdp, which shards gradients"),
    (
        ("async_tensor_parallel",),
        lambda c: c.parallel.tensor_parallel != 1 or not (c.parallel.mesh_dim or ",1").endswith(",1"),
        "without --tensor-parallel",
    ),
    (("async_tensor_parallel",), lambda c: c.model.torchcompile, "without --torchcompile"),
    (("accum_reduce",), lambda c: c.optim.accum_freq > 1, "without --accum-freq above 1"),
    (
        ("model", *(spec.name for spec in ArchitectureConfig.specs())),
        lambda c: c.model.hf_model is None,
        "with --hf-model, which defines the architecture",
    ),
    (("hf_seq_len", "hf_fsdp_block"), lambda c: c.model.hf_model is not None, "without --hf-model"),
    (
        ("hf_fsdp_block",),
        lambda c: c.parallel.fsdp or c.model.torchcompile or c.precision.fp8,
        "without --fsdp, --torchcompile or --fp8",
    ),
    (
        ("torchcompile",),
        lambda c: c.model.hf_model is None or c.model.hf_fsdp_block is not None,
        "with --hf-model but without --hf-fsdp-block, the class name of its layers",
    ),
    (
        (
            *("warmup", "lr_scheduler", "force_min_lr", "lr_cooldown_end", "lr_cooldown_power"),
            *("epochs_cooldown", "lr_decay_fraction", "lr_decay_shape"),
        ),
        lambda c: not c.optim.skip_scheduler,
        "with --skip-scheduler",
    ),
    (("torchcompile_mode",), lambda c: c.model.torchcompile, "without --torchcompile"),
    (
        ("dataset_resampled", "multiple_data_passes", "train_data_upsampling_factors", "disable_buffer"),
        lambda c: c.data.dataset_type != "synthetic",
        "with --dataset-type synthetic",
    ),
    (
        ("multiple_data_passes",),
        lambda c: not c.data.train_text,
        "with --train-text, which is read again when it ends",
    ),
    (("data_key",), lambda c: not c.data.train_text, "with --train-text, which has no shards of other formats"),
    (
        ("train_data_mix_weights",),
        _has_data,
        "without --train-data, --dataset-manifest or --train-text",
    ),
    (
        ("lora", "qlora"),
        lambda c: not _only_evaluates(c),
        "without training data: the adapters of the evaluated checkpoint are merged into the weights of their base",
    ),
    (
        tuple(spec.name for spec in DataConfig.specs() if spec.name.startswith("text_")),
        lambda c: bool(c.data.train_text),
        "without --train-text",
    ),
    (
        ("cache_limit",),
        lambda c: c.data.cache_dir is not None or bool(c.data.train_text),
        "without --cache-dir or --train-text",
    ),
    (("end_of_text_id",), lambda c: c.data.document_mask, "without --document-mask"),
    (
        tuple(spec.name for spec in DistillConfig.specs()),
        _trains,
        "without training data",
    ),
    (
        ("distill_weight", "distill_temperature", "distill_loss", "distill_precision"),
        lambda c: c.distillation.distills,
        "without --distill-model, --distill-pretrained or --distill-cache",
    ),
    (("distill_precision",), lambda c: c.distillation.loads_teacher, "with --distill-cache"),
    (("data_tolerate_error_p",), lambda c: c.data.ignore_parse_errors, "without --ignore-parse-errors"),
    (
        ("pretrained", "load_pretrained_state", "average", "average_coefficients"),
        lambda c: c.checkpoint.resume in (None, "latest") or c.adapters.lora is not None,  # --pretrained is the base
        "with --resume, which names the checkpoint to load",
    ),
    (
        tuple(spec.name for spec in ValidationConfig.specs() if spec.name not in ("val_data", "global_val_batch_size")),
        lambda c: bool(c.validation.val_data),
        "without --val-data",
    ),
    (
        ("val_max_pop_ci", "val_iter_ci"),
        lambda c: c.validation.val_seq_ci or c.validation.val_tok_ci,
        "without --val-seq-ci or --val-tok-ci",
    ),
    (
        ("icl_every_n_steps", "icl_max_examples", "icl_data_dir", "icl_max_time_share"),
        lambda c: c.live_evaluation.icl_yaml is not None,
        "without --icl-yaml",
    ),
    (
        ("sample_every_n_steps", "sample_temperature", "sample_max_tokens"),
        lambda c: c.live_evaluation.sample_prompts is not None,
        "without --sample-prompts",
    ),
    (
        ("icl_every_n_steps", "icl_max_time_share", "sample_every_n_steps"),
        _trains,
        "without training data",
    ),
    (("profile_steps", "log_gradient_noise"), lambda c: not _only_evaluates(c), "without training data"),
    (
        ("tokenizer",),
        lambda c: bool(
            c.live_evaluation.icl_yaml is not None or c.live_evaluation.sample_prompts is not None or c.data.train_text
        ),
        "without --train-text, --icl-yaml or --sample-prompts",
    ),
    (
        ("remote_sync_frequency", "remote_sync_protocol"),
        lambda c: c.logging.remote_sync is not None,
        "without --remote-sync",
    ),
    (
        ("wandb_project_name",),
        lambda c: any(name in c.logging.report_to for name in ("wandb", "trackio", "all")),
        "without wandb or trackio in --report-to",
    ),
    (
        ("wandb_notes",),
        lambda c: any(name in c.logging.report_to for name in ("wandb", "all")),
        "without wandb in --report-to",
    ),
)
