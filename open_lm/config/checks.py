"""Check the settings of a run for contradictions and missing values. All functions are pure functions of a Config."""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import PurePath

from open_lm.config.adapters import parse_lora
from open_lm.config.layout import parse_mesh_dim
from open_lm.config.no_effect import settings_without_effect
from open_lm.config.registry import ATTENTION, LOGGERS
from open_lm.config.sections import CHECKPOINTING_POLICIES, Config, DataConfig, ParallelConfig
from open_lm.errors import ConfigError
from open_lm.storage import parse_bytes


def contradictions(config: Config, given: Set[str] = frozenset()) -> list[str]:
    """Return all problems that are errors in every kind of run. `given` names the settings that were set explicitly.

    A setting that has no effect contradicts nothing (see no_effect.py).
    """
    off = settings_without_effect(config).keys()
    return [
        *_data_problems(config.data, given, off),
        *config.data.text_problems(),
        *_validation_problems(config, off),
        *_live_evaluation_problems(config),
        *_optimization_problems(config, off),
        *_parallel_problems(config, off),
        *_model_problems(config, given, off),
        *_adapter_problems(config, off),
        *_registry_problems(config, off),
        *_checkpoint_problems(config, off),
        *([] if "distill_cache" in off else config.distillation.cache_problems(config.data)),
        *_fault_problems(config),
        *_logging_problems(config),
        *([] if "profile_steps" in off else config.diagnostics.problems(config.logging.logs)),
        *_range_problems(config),
    ]


def missing_for_a_run(config: Config) -> list[str]:
    """Return the settings that a training or evaluation run requires and that are missing, one message each."""
    problems = []
    if not wants_training(config.data) and not wants_evaluation(config):
        problems.append(
            "there is nothing to do: set --train-data, --dataset-manifest, --train-text or --dataset-type synthetic to "
            "train, or --val-data, --icl-yaml or --sample-prompts to evaluate"
        )
    # With a recipe or raw text, an epoch is one pass over the data (training.setup.resolve_epoch_length).
    is_one_pass = config.run.recipe is not None or config.data.train_text
    if wants_training(config.data) and config.data.train_num_samples is None and not is_one_pass:
        problems.append("--train-num-samples is missing: set the number of tokens per epoch")
    if config.data.train_text and config.live_evaluation.tokenizer is None:
        problems.append("--train-text requires --tokenizer, which turns the text into ids")
    return problems


def wants_training(data: DataConfig) -> bool:
    """Return whether there are training data."""
    return bool(data.train_data or data.dataset_manifest or data.train_text or data.dataset_type == "synthetic")


def wants_evaluation(config: Config) -> bool:
    """Return whether there is something to evaluate: validation data, tasks or prompts."""
    live = config.live_evaluation
    return bool(config.validation.val_data or live.icl_yaml or live.sample_prompts)


def only_evaluates(config: Config) -> bool:
    """Return whether the run evaluates and has no training data, so that settings of the training are not used."""
    return wants_evaluation(config) and not wants_training(config.data)


def _data_problems(data: DataConfig, given: Set[str], off: Set[str]) -> list[str]:
    problems = []
    kinds = {
        "--train-data": data.train_data, "--dataset-manifest": data.dataset_manifest, "--train-text": data.train_text
    }  # fmt: skip
    given_kinds = [flag for flag, values in kinds.items() if values]
    if len(given_kinds) > 1:
        problems.append(f"{' and '.join(given_kinds)} are mutually exclusive: set one of them")
    if data.dataset_manifest and data.dataset_resampled:
        problems.append(
            "--dataset-resampled samples shards with replacement, but --dataset-manifest reads each shard once: remove "
            "one of them"
        )
    if data.dataset_type == "synthetic" and given_kinds:
        problems.append(f"--dataset-type synthetic does not use {' or '.join(given_kinds)}: remove one or the other")
    if data.batch_size is not None and "global_batch_size" in given:
        problems.append(
            f"--batch-size {data.batch_size} is per device, --global-batch-size {data.global_batch_size} is over all "
            "devices: set one of them"
        )
    try:
        parse_bytes(data.cache_limit)
    except ValueError as error:
        problems.append(f"--cache-limit: {error}")
    sources = len(data.dataset_manifest or data.train_data or data.train_text or [])
    weights = None if "train_data_mix_weights" in off else data.train_data_mix_weights
    if weights is not None and len(weights) != sources:
        problems.append(
            f"--train-data-mix-weights: found {len(weights)} values for {sources} sources; set one for each"
        )
    if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
        problems.append(
            f"--train-data-mix-weights: found {weights}, expected weights of 0 or more, at least one of them above 0"
        )
    if data.squash_mask_left and data.target_mask_left is None:
        problems.append("--squash-mask-left requires --target-mask-left, the token that it removes")
    return problems


def _validation_problems(config: Config, off: Set[str]) -> list[str]:
    validation = config.validation
    keys, names, sets = validation.val_data_key, validation.val_names, validation.val_data or []
    problems = []
    if keys is not None and "val_data_key" not in off and len(keys) not in (1, len(sets)):
        problems.append(
            f"--val-data-key: found {len(keys)} values for {len(sets)} validation sets; set one for each, or one for "
            "all"
        )
    if names is not None and "val_names" not in off and not len(set(names)) == len(names) == len(sets):
        problems.append(
            f"--val-names: found {' '.join(names)} for {len(sets)} validation sets; set one name for each, all of them "
            "different"
        )
    return problems


def _live_evaluation_problems(config: Config) -> list[str]:
    invalid = [value for value in config.live_evaluation.sample_temperature or [] if not 0 <= value < float("inf")]
    if invalid:
        return [f"--sample-temperature: found {', '.join(map(str, invalid))}, expected numbers of 0 or more"]
    return []


def _optimization_problems(config: Config, off: Set[str]) -> list[str]:
    optim, data, problems = config.optim, config.data, []
    if only_evaluates(config):
        return []
    if optim.epochs_cooldown is not None and "epochs_cooldown" not in off and optim.epochs_cooldown > data.epochs:
        problems.append(f"--epochs-cooldown {optim.epochs_cooldown} is greater than --epochs {data.epochs}")
    if optim.log_avg_model_training_loss and not optim.averagers:
        problems.append("--log-avg-model-training-loss requires --averagers, the weights whose loss it logs")
    if data.batch_size is None and optim.accum_freq > 0 and data.global_batch_size % optim.accum_freq:
        problems.append(
            f"--global-batch-size {data.global_batch_size} is not divisible by --accum-freq {optim.accum_freq}, the "
            "number of micro-batches"
        )
    return problems


def _parallel_problems(config: Config, off: Set[str]) -> list[str]:
    parallel, problems = config.parallel, []
    attention = config.model.attn_name
    if parallel.context_parallel > 1 and "attn_name" not in off and ATTENTION.fact(attention, "whole_sequences"):
        problems.append(f"--attn-name {attention} does not support split sequences: remove --context-parallel")
    if parallel.fsdp_amp and parallel.fsdp_pure_bf16:
        problems.append(
            "--fsdp-amp reduces gradients in float32, --fsdp-pure-bf16 reduces them in bfloat16: set one of them"
        )
    if parallel.fsdp_hybrid and parallel.fsdp_hybrid_o2:
        problems.append("--fsdp-hybrid and --fsdp-hybrid-o2 are mutually exclusive: set one of them")
    if parallel.mesh_dim is not None:
        try:
            parse_mesh_dim(parallel.mesh_dim)
        except ConfigError as error:
            problems.append(str(error))
        flags = {"--fsdp-hybrid": parallel.fsdp_hybrid, "--fsdp-hybrid-o2": parallel.fsdp_hybrid_o2}
        flags["--tensor-parallel"] = parallel.tensor_parallel != 1
        given = ", ".join(flag for flag, is_given in flags.items() if is_given)
        if given:
            problems.append(f"--mesh-dim and {given} both define the device mesh: set one of them")
    return problems


_PARALLEL_SPLITS = ("tensor_parallel", "context_parallel", "expert_parallel", "mesh_dim")


def _model_problems(config: Config, given: Set[str], off: Set[str]) -> list[str]:
    model, problems = config.model, []
    if model.moe_freq > 0 and not model.moe_num_experts:
        problems.append(f"--moe-freq {model.moe_freq} requires --moe-num-experts")
    if model.moe_num_experts and "moe_top_k" not in off and model.moe_top_k > model.moe_num_experts:
        problems.append(f"--moe-top-k {model.moe_top_k} is greater than --moe-num-experts {model.moe_num_experts}")
    policy = model.activation_checkpointing
    if policy not in CHECKPOINTING_POLICIES and not (policy.isdecimal() and int(policy) > 0):
        problems.append(
            f"--activation-checkpointing: found {policy!r}, expected {', '.join(CHECKPOINTING_POLICIES)} or a number "
            "of 1 or more"
        )
    if model.grad_checkpointing and policy not in ("none", "full"):
        problems.append(
            f"--grad-checkpointing recomputes all activations, --activation-checkpointing {policy} only some of them: "
            "set one of them"
        )
    compiles = model.torchcompile and model.torchcompile_mode != "default"
    if compiles and config.optim.accum_freq > 1 and not only_evaluates(config):
        problems.append(
            f"--torchcompile-mode {model.torchcompile_mode} uses CUDA graphs, which overwrite the gradients of the "
            "previous micro-batch: remove --accum-freq, or use the mode default"
        )
    is_deterministic = "attn_name" in off or ATTENTION.fact(model.attn_name, "deterministic", True)
    if config.run.deterministic and not is_deterministic:
        problems.append(
            f"--attn-name {model.attn_name}: its kernels are not deterministic, but --deterministic is set; use "
            "torch_attn"
        )
    return problems + (_hf_model_problems(config, given) if model.hf_model else [])


def _hf_model_problems(config: Config, given: Set[str]) -> list[str]:
    model, problems = config.model, []
    splits = [spec for spec in ParallelConfig.specs() if spec.name in _PARALLEL_SPLITS]
    unsupported = [spec.flag for spec in splits if getattr(config.parallel, spec.name) != spec.default]
    if unsupported:
        problems.append(f"{', '.join(unsupported)}: not supported with --hf-model; use --fsdp")
    if not model.hf_seq_len:
        problems.append(f"--hf-model {model.hf_model} requires --hf-seq-len, the length of its training sequences")
    if model.mup:
        problems.append(
            "--mup is not supported with --hf-model, whose initialization and attention it does not define; import "
            "the model with python -m open_lm.hf.convert import and train it as --model"
        )
    if config.data.document_mask:
        recipe = None if "document_mask" in given else config.run.recipe
        problems.append(
            f"--document-mask{f' of --recipe {recipe}' if recipe else ''} is not supported with --hf-model, which "
            "computes attention over full sequences; set --no-document-mask"
        )
    if model.activation_checkpointing not in ("none", "full"):
        problems.append(
            f"--activation-checkpointing {model.activation_checkpointing}: --hf-model supports only none and full; use "
            "full"
        )
    needing = {"--fsdp": config.parallel.fsdp, "--fp8": config.precision.fp8}
    return problems + [
        f"--hf-model with {flag} requires --hf-fsdp-block, the class name of the model's layers"
        for flag, is_given in needing.items()
        if is_given and not model.hf_fsdp_block
    ]


def _adapter_problems(config: Config, off: Set[str]) -> list[str]:
    adapters, checkpoint, parallel, problems = config.adapters, config.checkpoint, config.parallel, []
    if "lora" in off:
        return []
    if adapters.lora is None:
        return ["--qlora quantizes the frozen weights of --lora: set --lora too"] if adapters.qlora else []
    try:
        parse_lora(adapters.lora)
    except ConfigError as error:
        problems.append(str(error))
    has_base = checkpoint.pretrained or config.model.hf_model or checkpoint.resume not in (None, "latest")
    if not has_base and not checkpoint.average:
        problems.append("--lora requires --pretrained (or --hf-model), the weights that stay fixed")
    if checkpoint.average:
        problems.append("--lora does not support --average: give one checkpoint with --pretrained")
    if checkpoint.pretrained and config.model.hf_model:
        problems.append("--lora with --hf-model trains adapters for the weights of --hf-model: remove --pretrained")
    if checkpoint.load_pretrained_state:
        problems.append("--lora starts with a new optimizer: remove --load-pretrained-state")
    if config.precision.fp8:
        problems.append("--lora does not support --fp8: remove one of them")
    if adapters.qlora and (parallel.fsdp or parallel.tensor_parallel > 1 or parallel.mesh_dim is not None):
        problems.append(
            "--qlora does not support --fsdp, --tensor-parallel and --mesh-dim, because 4-bit weights cannot be "
            "sharded: every rank holds them all; remove these flags, or train without --qlora"
        )
    return problems


def _registry_problems(config: Config, off: Set[str]) -> list[str]:
    """Return the problems of the selected optimizer, schedule and so on that require settings which are missing."""
    problems = []
    values = {spec.name: value for spec, value in config.settings()}
    for spec, value in config.settings():
        if spec.registry is None or value not in spec.registry or spec.name in off:
            continue
        required = spec.registry.fact(value, "requires", ())
        missing = ["--" + name.replace("_", "-") for name in required if values[name] is None]
        if missing:
            problems.append(f"{spec.flag} {value} requires {', '.join(missing)}")
    return problems


_COEFFICIENT_TOLERANCE = 0.01  # accepts rounded thirds


def _checkpoint_problems(config: Config, off: Set[str]) -> list[str]:
    checkpoint, problems = config.checkpoint, []
    coefficients = None if "average_coefficients" in off else checkpoint.average_coefficients
    if coefficients is not None and len(coefficients) != len(checkpoint.average or []):
        problems.append(
            f"--average-coefficients: found {len(coefficients)} values for {len(checkpoint.average or [])} checkpoints "
            "of --average; set one for each"
        )
    if coefficients is not None and not abs(sum(coefficients) - 1) <= _COEFFICIENT_TOLERANCE:
        problems.append(
            f"--average-coefficients: {', '.join(map(str, coefficients))} add up to {sum(coefficients):g}, expected 1; "
            "divide each by their sum"
        )
    if checkpoint.load_pretrained_state and "pretrained" not in off and not checkpoint.pretrained:
        problems.append("--load-pretrained-state requires --pretrained, the checkpoint whose state it continues")
    if checkpoint.average and checkpoint.pretrained and "pretrained" not in off:
        problems.append("--average and --pretrained both define the initial weights: set one of them")
    if checkpoint.checkpoint_format == "interchange" and checkpoint.save_milestone_every:
        problems.append(
            "--save-milestone-every requires sharded checkpoints: remove it, or remove --checkpoint-format interchange"
        )
    return problems


def _fault_problems(config: Config) -> list[str]:
    faults, problems = config.faults, []
    if faults.skip_loss_spikes is not None and faults.rollback_loss_spikes is not None:
        problems.append("--skip-loss-spikes and --rollback-loss-spikes are mutually exclusive: set one of them")
    if config.checkpoint.checkpoint_format == "interchange" and faults.rollback_loss_spikes is not None:
        problems.append(
            "--rollback-loss-spikes requires sharded checkpoints: remove it, or remove --checkpoint-format interchange"
        )
    return problems


def _logging_problems(config: Config) -> list[str]:
    checkpoint, logging, problems = config.checkpoint, config.logging, []
    known = (*LOGGERS, "all")
    unknown = [name for name in logging.report_to.replace(",", " ").split() if name not in known]
    if unknown:
        problems.append(
            f"--report-to: found {', '.join(unknown)}, expected {', '.join(known)} or a comma-separated list"
        )
    if logging.logs.lower() == "none":
        if logging.remote_sync:
            problems.append("--remote-sync copies the run's folder, but --logs none writes none: remove one of them")
        if checkpoint.checkpoint_dir:
            problems.append("--checkpoint-dir: --logs none writes no checkpoints; remove one of them")
        if logging.copy_codebase:
            problems.append(
                "--copy-codebase copies to the run's folder, but --logs none writes none: remove one of them"
            )
        if checkpoint.resume == "latest":
            problems.append("--resume latest searches in --logs, but --logs is none: set the path of a checkpoint")
    remote = logging.remote_sync
    if remote is not None and logging.remote_sync_protocol == "s3" and not remote.startswith("s3://"):
        problems.append(
            f"--remote-sync: found {remote}, but --remote-sync-protocol s3 expects s3://bucket/folder; set "
            "--remote-sync-protocol fsspec for other URLs"
        )
    run = config.run.name
    if run is not None and (PurePath(run).is_absolute() or ".." in PurePath(run).parts or not run.strip()):
        problems.append(f"--name: found {run!r}, expected the name of a folder inside --logs")
    return problems


_AT_LEAST_ONE = (
    *("train_num_samples", "epochs", "global_batch_size", "batch_size", "accum_freq", "log_every_n_steps"),
    *("val_num_samples", "val_frequency", "global_val_batch_size", "val_iter_ci", "moe_top_k", "remote_sync_frequency"),
    *("tensor_parallel", "context_parallel", "expert_parallel", "val_max_batches", "icl_max_examples"),
    "sample_max_tokens",
)
_ABOVE_ZERO = (
    *("grad_clip_norm", "read_timeout", "skip_loss_spikes", "rollback_loss_spikes", "dist_timeout"),
    "distill_temperature",
)
_AT_LEAST_ZERO = (
    *("workers", "warmup", "wd", "eps", "z_loss_coefficient", "save_frequency", "moe_freq", "lr", "force_min_lr"),
    *("end_of_text_id", "save_every_n_steps", "save_every_minutes", "keep_last", "save_milestone_every"),
    *("max_skipped_steps", "hang_timeout", "icl_every_n_steps", "sample_every_n_steps"),
)
_FRACTIONS = ("data_tolerate_error_p", "lr_decay_fraction", "distill_weight")


# Names of settings, the condition on their values (which NaN never satisfies), and its description.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (_AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
    (_AT_LEAST_ZERO, lambda value: value >= 0, "0 or more"),
    (("beta1", "beta2", "muon_momentum"), lambda value: 0 <= value < 1, "at least 0 and less than 1"),
    (_FRACTIONS, lambda value: 0 <= value <= 1, "a fraction from 0 to 1"),
    (_ABOVE_ZERO, lambda value: value > 0, "a number above 0"),
    (("icl_max_time_share",), lambda value: 0 < value < 1, "a share above 0 and below 1"),
)


def _range_problems(config: Config) -> list[str]:
    return [
        f"{spec.flag}: found {value}, expected {expected}"
        for spec, value in config.settings()
        for names, is_valid, expected in _RANGES
        if value is not None and spec.name in names and not is_valid(value)
    ]
