"""Summarize the settings of a run for the console: those that matter, and those that differ from their defaults."""

from __future__ import annotations

from typing import Any

from open_lm.config.checks import wants_training
from open_lm.config.sections import Config

_TRAINING = (
    *("model", "train_data", "dataset_manifest", "train_text", "train_num_samples", "epochs", "global_batch_size"),
    *("optimizer", "lr", "lr_scheduler", "warmup", "precision"),
)
_EVALUATION = ("model", "resume", "pretrained", "average", "val_data", "global_val_batch_size", "precision")
_UNITS = {"train_num_samples": " tokens per epoch", "val_num_samples": " tokens", "warmup": " steps"}
_MAX_LENGTH = 200  # characters of a value


def summarize_settings(config: Config, params_file: str | None) -> list[str]:
    """Return two messages: the main settings, and all others that differ from their defaults.

    Numbers are those that were given, so --train-num-samples counts tokens, unlike in params.txt. `params_file` has the
    complete list.
    """
    specs = {spec.name: spec for spec, _ in config.settings()}
    values = {spec.name: value for spec, value in config.settings()}
    if values["hf_model"] is not None:
        values["model"] = f"{values['hf_model']} (transformers)"
    main = _TRAINING if wants_training(config.data) else _EVALUATION
    skipped = {*main, "hf_model", *(() if values["val_data"] else ("global_val_batch_size",))}
    others = [name for name in specs if name not in skipped and values[name] != specs[name].default]
    where = f" (all settings: {params_file})" if params_file else ""
    messages = [_table(f"Main settings{where}:", values, [name for name in main if values[name] is not None])]
    if others:
        messages.append(_table("Other settings that differ from the defaults:", values, others))
    return messages


def _table(heading: str, values: dict[str, Any], names: list[str]) -> str:
    return "\n".join([heading, *(f"  {name}: {_shown(values[name])}{_UNITS.get(name, '')}" for name in names)])


def _shown(value: Any) -> str:
    """Return a value as text, several values without brackets, shortened if they are many."""
    if not isinstance(value, list):
        return str(value)
    text = " ".join(map(str, value))
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}… ({len(value)} values)"
