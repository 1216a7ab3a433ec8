"""Which flags are in use and change nothing, beside others or beside the model's file. Pure functions of a Config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from open_lm.config.sections import ArchitectureConfig, Config, ParallelConfig, ValidationConfig


def ineffective_flags(config: Config, architecture: Mapping[str, Any] | None = None) -> list[str]:
    """A sentence for each accepted flag that is in use and changes nothing.

    `architecture` is what the model's JSON file says (see model_files.architecture_of), which wins over flags.
    """
    file = dict(architecture or {})
    idle: dict[str, str] = {}
    for names, is_used, why in _USED_ONLY:
        if not is_used(config):
            idle |= {name: why for name in names if name not in idle}
    if not file.get("moe_freq", config.model.moe_freq):
        idle |= dict.fromkeys(("moe_num_experts", "moe_top_k", "moe_capacity_factor", "moe_loss_weight"), _NO_EXPERTS)
    sentences = []
    for section in vars(config).values():
        for spec in section.specs():
            value = getattr(section, spec.name)
            if value == spec.default:
                continue
            if spec.ineffective:
                sentences.append(f"{spec.flag} has no effect: {spec.ineffective}")
            elif spec.name in idle:
                sentences.append(f"{spec.flag} has no effect {idle[spec.name]}")
            elif spec.name in file and file[spec.name] != value:
                sentences.append(f"{spec.flag} has no effect: the file of --model says {file[spec.name]}, which wins")
    return sentences


_NO_EXPERTS = "without --moe-freq"
# Flags, whether they are used, and what to say where they are not; the first reason counts.
_USED_ONLY: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (
        tuple(spec.name for spec in ParallelConfig.specs() if spec.name.startswith("fsdp_")),
        lambda c: c.parallel.fsdp,
        "without --fsdp",
    ),
    (
        ("model", *(spec.name for spec in ArchitectureConfig.specs())),
        lambda c: c.model.hf_model is None,
        "with --hf-model, which brings its own architecture",
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
        "with --hf-model and no --hf-fsdp-block, which says what its layers are",
    ),
    (
        ("attn_activation", "attn_seq_scalar", "attn_seq_scalar_alpha"),
        lambda c: c.model.attn_name == "custom_attn",
        "without --attn-name custom_attn",
    ),
    (
        (
            *("warmup", "lr_scheduler", "force_min_lr"),
            *("lr_cooldown_end", "lr_cooldown_power", "epochs_cooldown"),
        ),
        lambda c: not c.optim.skip_scheduler,
        "with --skip-scheduler",
    ),
    (
        ("lr_cooldown_power", "epochs_cooldown"),
        lambda c: c.optim.lr_scheduler == "const-cooldown",
        "without --lr-scheduler const-cooldown",
    ),
    (
        ("lr_decay_fraction", "lr_decay_shape"),
        lambda c: c.optim.lr_scheduler == "wsd" and not c.optim.skip_scheduler,
        "without --lr-scheduler wsd",
    ),
    (("muon_momentum",), lambda c: c.optim.optimizer == "muon", "without --optimizer muon"),
    (("torchcompile_mode",), lambda c: c.model.torchcompile, "without --torchcompile"),
    (
        ("lr_cooldown_end", "force_min_lr"),
        lambda c: c.optim.lr_scheduler != "const",
        "with --lr-scheduler const",
    ),
    (
        ("dataset_resampled", "multiple_data_passes", "train_data_upsampling_factors", "disable_buffer"),
        lambda c: c.data.dataset_type != "synthetic",
        "with --dataset-type synthetic",
    ),
    (("cache_limit",), lambda c: c.data.cache_dir is not None, "without --cache-dir"),
    (("end_of_text_id",), lambda c: c.data.document_mask, "without --document-mask"),
    (("data_tolerate_error_p",), lambda c: c.data.ignore_parse_errors, "without --ignore-parse-errors"),
    (
        ("pretrained", "load_pretrained_state", "average", "average_coefficients"),
        lambda c: c.checkpoint.resume in (None, "latest"),
        "with --resume, which names the checkpoint to go on from",
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
        ("remote_sync_frequency", "remote_sync_protocol"),
        lambda c: c.logging.remote_sync is not None,
        "without --remote-sync",
    ),
    (
        ("wandb_project_name", "wandb_notes"),
        lambda c: any(name in c.logging.report_to for name in ("wandb", "all")),
        "without wandb in --report-to",
    ),
)
