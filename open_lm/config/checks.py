"""Which settings contradict each other or are missing for a run. Pure functions of a Config."""

from __future__ import annotations

from collections.abc import Set
from pathlib import PurePath

from open_lm.config.layout import parse_mesh_dim
from open_lm.config.sections import Config, DataConfig, OptimConfig, ParallelConfig
from open_lm.errors import ConfigError
from open_lm.storage import parse_bytes

SCHEDULES = ("cosine", "const", "const-cooldown", "wsd")
OPTIMIZERS = ("adamw", "muon")
CHECKPOINTING_POLICIES = ("none", "full", "op")
REPORTERS = ("wandb", "tensorboard", "all")


def contradictions(config: Config, stated: Set[str] = frozenset()) -> list[str]:
    """Every problem that no run could have meant; `stated` names the settings that were given explicitly."""
    return [
        *_data_problems(config.data, stated),
        *_validation_problems(config),
        *_optimisation_problems(config.optim, config.data),
        *_parallel_problems(config),
        *_model_problems(config),
        *_checkpoint_problems(config),
        *_fault_problems(config),
        *_logging_problems(config),
        *_range_problems(config),
    ]


def missing_for_a_run(config: Config) -> list[str]:
    """What a training or evaluation run cannot do without."""
    problems = []
    if not wants_training(config.data) and not config.validation.val_data:
        problems.append(
            "there is nothing to do: give --train-data, --dataset-manifest or --dataset-type synthetic to train, "
            "or --val-data to evaluate"
        )
    if wants_training(config.data) and config.data.train_num_samples is None:
        problems.append("--train-num-samples is missing: give the number of tokens of an epoch")
    return problems


def wants_training(data: DataConfig) -> bool:
    """Whether there is anything to train on."""
    return bool(data.train_data or data.dataset_manifest or data.dataset_type == "synthetic")


def _data_problems(data: DataConfig, stated: Set[str]) -> list[str]:
    problems = []
    if data.train_data and data.dataset_manifest:
        problems.append("--train-data and --dataset-manifest exclude each other: give one of them")
    if data.dataset_manifest and data.dataset_resampled:
        problems.append(
            "--dataset-resampled draws shards with replacement, --dataset-manifest reads each once: give one of them"
        )
    if data.dataset_type == "synthetic" and (data.train_data or data.dataset_manifest):
        problems.append("--dataset-type synthetic needs no --train-data or --dataset-manifest: give one of them")
    if data.batch_size is not None and "global_batch_size" in stated:
        problems.append(
            f"--batch-size {data.batch_size} counts per device, --global-batch-size {data.global_batch_size} over all: "
            "give one of them"
        )
    try:
        parse_bytes(data.cache_limit)
    except ValueError as error:
        problems.append(f"--cache-limit: {error}")
    sources = len(data.dataset_manifest or data.train_data or [])
    weights = data.train_data_mix_weights
    if weights is not None and len(weights) != sources:
        problems.append(f"--train-data-mix-weights has {len(weights)} values for {sources} sources: give one for each")
    if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
        problems.append(f"--train-data-mix-weights {weights}: expected shares of 0 or more, one of them above 0")
    if data.squash_mask_left and data.target_mask_left is None:
        problems.append("--squash-mask-left removes the token of --target-mask-left, which is missing")
    return problems


def _validation_problems(config: Config) -> list[str]:
    validation = config.validation
    keys, sets = validation.val_data_key, validation.val_data or []
    if keys is not None and len(keys) not in (1, len(sets)):
        return [
            f"--val-data-key has {len(keys)} values for {len(sets)} of --val-data: give one for each, or one for all"
        ]
    return []


def _optimisation_problems(optim: OptimConfig, data: DataConfig) -> list[str]:
    problems = []
    if optim.lr_scheduler not in SCHEDULES:
        problems.append(f"--lr-scheduler: found {optim.lr_scheduler!r}, expected one of {', '.join(SCHEDULES)}")
    if optim.optimizer not in OPTIMIZERS:
        problems.append(f"--optimizer: found {optim.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    if optim.lr_scheduler == "const-cooldown" and optim.epochs_cooldown is None:
        problems.append(
            "--lr-scheduler const-cooldown needs --epochs-cooldown, the number of last epochs that cool down"
        )
    if optim.epochs_cooldown is not None and optim.epochs_cooldown > data.epochs:
        problems.append(f"--epochs-cooldown {optim.epochs_cooldown} is more than --epochs {data.epochs}")
    if optim.log_avg_model_training_loss and not optim.averagers:
        problems.append("--log-avg-model-training-loss needs --averagers, whose models' loss it logs")
    if data.batch_size is None and optim.accum_freq > 0 and data.global_batch_size % optim.accum_freq:
        problems.append(
            f"--global-batch-size {data.global_batch_size} does not divide into --accum-freq {optim.accum_freq} "
            "micro-batches"
        )
    return problems


def _parallel_problems(config: Config) -> list[str]:
    parallel, problems = config.parallel, []
    if parallel.context_parallel > 1 and config.model.attn_name == "custom_attn":
        problems.append("--attn-name custom_attn needs whole sequences: leave out --context-parallel")
    if parallel.fsdp_amp and parallel.fsdp_pure_bf16:
        problems.append("--fsdp-amp reduces gradients in float32, --fsdp-pure-bf16 in bfloat16: give one of them")
    if parallel.fsdp_hybrid and parallel.fsdp_hybrid_o2:
        problems.append("--fsdp-hybrid and --fsdp-hybrid-o2 exclude each other: give one of them")
    if parallel.mesh_dim is not None:
        try:
            parse_mesh_dim(parallel.mesh_dim)
        except ConfigError as error:
            problems.append(str(error))
        flags = {"--fsdp-hybrid": parallel.fsdp_hybrid, "--fsdp-hybrid-o2": parallel.fsdp_hybrid_o2}
        flags["--tensor-parallel"] = parallel.tensor_parallel != 1
        given = ", ".join(flag for flag, is_given in flags.items() if is_given)
        if given:
            problems.append(f"--mesh-dim says how ranks are divided, and so does {given}: give one of them")
    return problems


_CHANGING_ATTENTION = ("xformers_attn", "xformers_attn_variable_length", "sdpa_cudnn")
_SPLITS = ("tensor_parallel", "context_parallel", "mesh_dim")


def _model_problems(config: Config) -> list[str]:
    model, problems = config.model, []
    if model.moe_freq > 0 and not model.moe_num_experts:
        problems.append(f"--moe-freq {model.moe_freq} needs --moe-num-experts")
    if model.moe_num_experts and model.moe_top_k > model.moe_num_experts:
        problems.append(f"--moe-top-k {model.moe_top_k} is more than --moe-num-experts {model.moe_num_experts}")
    custom = ("attn_activation", "attn_seq_scalar", "attn_seq_scalar_alpha")
    absent = [name for name in custom if getattr(model, name) is None]
    if model.attn_name == "custom_attn" and absent:
        flags = ", ".join("--" + name.replace("_", "-") for name in absent)
        problems.append(f"--attn-name custom_attn needs {flags}")
    policy = model.activation_checkpointing
    if policy not in CHECKPOINTING_POLICIES and not (policy.isdecimal() and int(policy) > 0):
        problems.append(
            f"--activation-checkpointing: found {policy!r}, expected {', '.join(CHECKPOINTING_POLICIES)} or a number "
            "of 1 or more"
        )
    if model.grad_checkpointing and policy not in ("none", "full"):
        problems.append(
            f"--grad-checkpointing recomputes blocks in full, --activation-checkpointing {policy} in part: give one of "
            "them"
        )
    if model.hf_model:
        splits = [spec for spec in ParallelConfig.specs() if spec.name in _SPLITS]
        given = [spec.flag for spec in splits if getattr(config.parallel, spec.name) != spec.default]
        if given:
            problems.append(f"{', '.join(given)}: models of --hf-model are not split so; use --fsdp")
    if model.hf_model and not model.hf_seq_len:
        problems.append(f"--hf-model {model.hf_model} needs --hf-seq-len, the length of its training sequences")
    if model.hf_model and config.data.document_mask:
        problems.append("--document-mask needs a model of this package; those of --hf-model see whole sequences")
    if model.hf_model and policy not in ("none", "full"):
        problems.append(
            f"--activation-checkpointing {policy}: models of --hf-model recompute all or nothing: give full"
        )
    needing = {"--fsdp": config.parallel.fsdp, "--fp8": config.precision.fp8}
    problems += [
        f"--hf-model with {flag} needs --hf-fsdp-block, the class name of the model's layers"
        for flag, is_given in needing.items()
        if is_given and model.hf_model and not model.hf_fsdp_block
    ]
    if model.torchcompile and model.torchcompile_mode != "default" and config.optim.accum_freq > 1:
        problems.append(
            f"--torchcompile-mode {model.torchcompile_mode} replays CUDA graphs, which write gradients where those of "
            "the micro-batch before are: leave out --accum-freq, or take the mode default"
        )
    if config.run.deterministic and model.attn_name in _CHANGING_ATTENTION:
        problems.append(
            f"--attn-name {model.attn_name}: its kernels give other bits from run to run, which --deterministic rules "
            "out; choose torch_attn"
        )
    return problems


def _checkpoint_problems(config: Config) -> list[str]:
    checkpoint, problems = config.checkpoint, []
    coefficients = checkpoint.average_coefficients
    if coefficients is not None and len(coefficients) != len(checkpoint.average or []):
        problems.append(
            f"--average-coefficients has {len(coefficients)} values for {len(checkpoint.average or [])} of --average"
        )
    if checkpoint.load_pretrained_state and not checkpoint.pretrained:
        problems.append("--load-pretrained-state needs --pretrained, whose optimizer state it loads")
    if checkpoint.average and checkpoint.pretrained:
        problems.append("--average and --pretrained both say which weights to start from: give one of them")
    if checkpoint.checkpoint_format == "interchange" and checkpoint.save_milestone_every:
        problems.append("--save-milestone-every keeps sharded checkpoints: leave out --checkpoint-format interchange")
    return problems


def _fault_problems(config: Config) -> list[str]:
    faults, problems = config.faults, []
    if faults.skip_loss_spikes is not None and faults.rollback_loss_spikes is not None:
        problems.append("--skip-loss-spikes and --rollback-loss-spikes exclude each other: give one of them")
    if config.checkpoint.checkpoint_format == "interchange" and faults.rollback_loss_spikes is not None:
        problems.append(
            "--rollback-loss-spikes goes back to a sharded checkpoint: leave out --checkpoint-format interchange"
        )
    return problems


def _logging_problems(config: Config) -> list[str]:
    checkpoint, logging, problems = config.checkpoint, config.logging, []
    unknown = [name for name in logging.report_to.replace(",", " ").split() if name not in REPORTERS]
    if unknown:
        problems.append(
            f"--report-to: found {', '.join(unknown)}, expected {', '.join(REPORTERS)} or several by commas"
        )
    if logging.logs.lower() == "none":
        if logging.remote_sync:
            problems.append("--logs none writes nothing, so --remote-sync has nothing to copy")
        if checkpoint.checkpoint_dir:
            problems.append("--logs none writes nothing, so --checkpoint-dir gets no checkpoint")
        if logging.copy_codebase:
            problems.append("--logs none writes nothing, so --copy-codebase has nowhere to copy to")
        if checkpoint.resume == "latest":
            problems.append("--resume latest looks for checkpoints in --logs, which is none: give a checkpoint's path")
    remote = logging.remote_sync
    if remote is not None and logging.remote_sync_protocol == "s3" and not remote.startswith("s3://"):
        problems.append(
            f"--remote-sync {remote}: --remote-sync-protocol s3 expects s3://bucket/folder; give "
            "--remote-sync-protocol fsspec for other addresses"
        )
    run = config.run.name
    if run is not None and (PurePath(run).is_absolute() or ".." in PurePath(run).parts or not run.strip()):
        problems.append(f"--name {run!r} must name a folder below --logs")
    return problems


_AT_LEAST_ONE = (
    *("train_num_samples", "epochs", "global_batch_size", "batch_size", "accum_freq", "log_every_n_steps"),
    *("val_num_samples", "val_frequency", "global_val_batch_size", "val_iter_ci", "moe_top_k", "remote_sync_frequency"),
    *("tensor_parallel", "context_parallel"),
)
_MORE_THAN_ZERO = ("grad_clip_norm", "read_timeout", "skip_loss_spikes", "rollback_loss_spikes", "dist_timeout")
_AT_LEAST_ZERO = (
    *("workers", "warmup", "wd", "eps", "z_loss_coefficient", "save_frequency", "moe_freq", "lr", "force_min_lr"),
    *("end_of_text_id", "save_every_n_steps", "save_every_minutes", "keep_last", "save_milestone_every"),
    *("max_skipped_steps", "hang_timeout"),
)


def _range_problems(config: Config) -> list[str]:
    problems = []
    for section in vars(config).values():
        for spec in section.specs():
            value, name = getattr(section, spec.name), spec.name
            if value is None:
                continue
            if name in _AT_LEAST_ONE and value < 1:
                problems.append(f"{spec.flag}: found {value}, expected 1 or more")
            if name in _AT_LEAST_ZERO and not value >= 0:
                problems.append(f"{spec.flag}: found {value}, expected 0 or more")
            if name in ("beta1", "beta2", "muon_momentum") and not 0 <= value < 1:
                problems.append(f"{spec.flag}: found {value}, expected at least 0 and below 1")
            if name in ("data_tolerate_error_p", "lr_decay_fraction") and not 0 <= value <= 1:
                problems.append(f"{spec.flag}: found {value}, expected a share from 0 to 1")
            if name in _MORE_THAN_ZERO and not value > 0:
                problems.append(f"{spec.flag}: found {value}, expected more than 0")
    return problems
