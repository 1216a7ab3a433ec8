"""The settings of TRL's trainers from the flags of a command."""

from __future__ import annotations

import dataclasses
import difflib
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from open_lm.config.adapters import parse_lora
from open_lm.errors import ConfigError, join_problems
from open_lm.model.adapters import target_layers

# Settings that would upload, run code of others or write elsewhere; the flags of the command set all the others.
_REFUSED = ("push_to_hub", "hub_", "trust_remote_code", "output_dir", "logging_dir", "log_completions_hub_repo")


def trl_config(config_class: Any, args: Namespace, output: str, own: Mapping[str, Any]) -> Any:
    """Return the settings of a trainer.

    Args:
        config_class: DPOConfig or GRPOConfig.
        args: the flags of the command.
        output: folder of the checkpoints for --resume.
        own: settings of this trainer only.

    Raises:
        ConfigError: settings that TRL refuses, unknown keys of --trl, or keys that have a flag.
    """
    settings = {**_common(args, output), **own}
    extra = parse_extra(args.trl or [], config_class, settings)
    try:
        return config_class(**settings, **extra)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"TRL refuses these settings: {error}") from error


def _common(args: Namespace, output: str) -> dict[str, Any]:
    from accelerate import PartialState

    world_size = PartialState().num_processes
    rows = args.batch_size or max(1, args.global_batch_size // world_size)
    if args.global_batch_size % (rows * world_size):
        raise ConfigError(
            f"--global-batch-size: found {args.global_batch_size}, expected a multiple of --batch-size {rows} times "
            f"{world_size} processes"
        )
    return {
        "output_dir": output,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": args.global_batch_size // (rows * world_size),
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps or -1,
        "learning_rate": args.lr,
        "lr_scheduler_type": args.lr_scheduler,
        "warmup_steps": args.warmup if args.warmup < 1 else int(args.warmup),
        "weight_decay": args.wd,
        "adam_beta1": args.beta1,
        "adam_beta2": args.beta2,
        "max_grad_norm": args.grad_clip_norm,
        "seed": args.seed,
        "data_seed": args.seed,
        "bf16": args.precision == "amp_bf16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": args.grad_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if args.grad_checkpointing else None,
        "logging_steps": args.log_every_n_steps,
        "logging_nan_inf_filter": False,
        "save_steps": args.save_every_n_steps,
        "save_total_limit": 2,
        "eval_strategy": "steps" if args.val_data and args.val_every_n_steps else "no",
        "eval_steps": args.val_every_n_steps or None,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
    }


def parse_extra(items: list[str], config_class: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of --trl KEY=VALUE; a value is YAML. Raise ConfigError with all problems."""
    import yaml

    names = {field.name for field in dataclasses.fields(config_class)}
    values: dict[str, Any] = {}
    problems = []
    for item in items:
        key, separator, text = item.partition("=")
        if not separator:
            problems.append(f"{item!r}: expected KEY=VALUE")
        elif key.startswith(_REFUSED) or key in settings:
            reason = "is set by a flag of this command" if key in settings else "is not available here"
            problems.append(f"{key}: {reason}")
        elif key not in names:
            similar = difflib.get_close_matches(key, names, n=3)
            hint = f"; did you mean {', '.join(similar)}?" if similar else ""
            problems.append(f"{key}: not a setting of {config_class.__name__}{hint}")
        else:
            try:
                values[key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                problems.append(f"{key}: {text!r} is not valid YAML ({error})")
    if problems:
        raise ConfigError(join_problems(problems, "--trl"))
    return values


def peft_config(args: Namespace, model: Any) -> Any:
    """Return the configuration of PEFT for --lora; None without it."""
    if args.lora is None:
        return None
    from peft import LoraConfig

    lora = parse_lora(args.lora)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        target_modules=lora_targets(model, lora.targets),
    )


def lora_targets(model: Any, targets: str) -> list[str]:
    """Return the names of the layers of a model that get adapters, as `target_layers` selects them.

    Raises:
        ConfigError: the model has no such layer.
    """
    names = sorted(target_layers(model, targets))
    if not names:
        raise ConfigError(f"--lora targets={targets}: the model has no such layer of class Linear")
    return names
