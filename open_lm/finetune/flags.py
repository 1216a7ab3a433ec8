"""Flags of the commands for preferences and reinforcement learning: one field of a section is one flag.

Values come from the defaults, the recipe, the file of --config and the command line; later ones take precedence.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from open_lm.config.adapters import parse_lora
from open_lm.config.command_line import FlagParser, add_flag, convert, load_config_file
from open_lm.config.fields import FieldSpec, Section, flag
from open_lm.config.registry import LOGGERS
from open_lm.config.report_flags import energy_flag, report_flag
from open_lm.config.suggestions import suggest
from open_lm.errors import ConfigError, join_problems
from open_lm.system.names import user_path, weights_path

RECIPES = Path(__file__).resolve().parent / "recipes"
PRECISIONS = ("fp32", "amp_bf16")
OVERLONG_POLICIES = ("error", "drop")


@dataclass(frozen=True)
class PolicyConfig(Section):
    title: ClassVar[str] = "model"

    pretrained: str | None = flag(
        None,
        "model to start from: a run folder (its newest checkpoint), step_N, epoch_N.pt, a folder in the format of "
        "transformers, or a name on the hub",
        path=weights_path,
    )
    model: str | None = flag(
        None, "model configuration, by name or .json file, for weights without a run folder", path=user_path
    )
    tokenizer: str | None = flag(
        None, "tokenizer, for runs that do not record theirs; default: that of the run", path=user_path
    )
    lora: str | None = flag(
        None, "train low-rank adapters only, such as r=16,alpha=32,targets=all-linear; default: train all weights"
    )
    precision: str = flag(
        "fp32", "fp32, or amp_bf16: bf16 for matrix products and float32 for weights", choices=PRECISIONS
    )
    grad_checkpointing: bool = flag(False, "compute the activations of blocks again in the backward pass")


@dataclass(frozen=True)
class TuningRunConfig(Section):
    title: ClassVar[str] = "run"

    recipe: str | None = flag(None, "settings of a published recipe, by name, or a YAML file; see docs/finetuning.md")
    config: str | None = flag(
        None, "YAML or JSON file with flags as keys; it takes precedence over --recipe", path=user_path
    )
    name: str | None = flag(None, "name of the run and of its folder in --logs")
    logs: str = flag("./logs/", "parent folder of all run folders", path=user_path)
    resume: str | None = flag(
        None, "latest: continue the run of this --name from its newest complete checkpoint", choices=("latest",)
    )
    seed: int = flag(0, "random seed for data order, adapters, dropout and sampling")
    report_to: str = flag(
        "", "comma-separated destinations of metrics in addition to metrics.jsonl, or all", entries=LOGGERS
    )
    report: str = report_flag()
    energy: str = energy_flag()
    log_every_n_steps: int = flag(10, "log metrics every N steps")
    save_every_n_steps: int = flag(100, "save a checkpoint for --resume every N steps; the newest two are kept")
    val_every_n_steps: int = flag(0, "evaluate --val-data every N steps too; 0: only before and after training")


@dataclass(frozen=True)
class TuningDataConfig(Section):
    title: ClassVar[str] = "data"

    train_data: list[str] | None = flag(None, "JSON lines files for training", path=user_path)
    val_data: list[str] | None = flag(None, "JSON lines files for evaluation", path=user_path)
    overlong: str = flag(
        "error", "rows that are too long: stop with an error, or drop and count them", choices=OVERLONG_POLICIES
    )


@dataclass(frozen=True)
class TuningOptimConfig(Section):
    title: ClassVar[str] = "optimization"

    epochs: float = flag(1.0, "passes over the training data")
    max_steps: int | None = flag(None, "number of updates, instead of --epochs")
    global_batch_size: int = flag(64, "rows per update, over all processes and accumulation steps")
    batch_size: int | None = flag(None, "rows that a process computes at once; default: all of an update")
    lr: float = flag(1e-6, "learning rate")
    lr_scheduler: str = flag(
        "linear", "schedule of the learning rate", choices=("linear", "cosine", "constant", "constant_with_warmup")
    )
    warmup: float = flag(0.0, "steps of linear warmup, or, below 1, their share of all steps")
    wd: float = flag(0.0, "weight decay of AdamW")
    beta1: float = flag(0.9, "first beta of AdamW")
    beta2: float = flag(0.999, "second beta of AdamW")
    grad_clip_norm: float = flag(1.0, "largest norm of the gradient")
    trl: list[str] | None = flag(None, "further settings of the trainer of TRL, as KEY=VALUE")


COMMON = (PolicyConfig, TuningRunConfig, TuningDataConfig, TuningOptimConfig)


def parse(argv: Sequence[str], command: str, description: str, section: type[Section]) -> argparse.Namespace:
    """Parse the flags of a command. Return all settings as one flat object.

    Args:
        argv: the words of the command line.
        command: its name; its recipes are in recipes/{command}/.
        description: its help text.
        section: its own settings, in addition to `COMMON`.

    Raises:
        ConfigError: with all problems.
    """
    sections = (*COMMON, section)
    specs = {spec.name: spec for part in sections for spec in part.specs()}
    parsed = vars(_parser(command, description, sections).parse_args(list(argv)))
    sources: list[tuple[str, Mapping[str, Any]]] = [("command line", parsed)]
    if parsed.get("config"):
        sources.insert(0, (parsed["config"], load_config_file(parsed["config"])))
    recipe = next((values["recipe"] for _, values in reversed(sources) if values.get("recipe")), None)
    if recipe is not None:
        path = find_recipe(command, recipe)
        sources.insert(0, (path, load_config_file(path)))
    values, problems = _merge(sources, specs)
    problems += [f"--{name.replace('_', '-')} is missing" for name in ("pretrained", "train_data") if not values[name]]
    try:
        if values["lora"] is not None:
            parse_lora(values["lora"])
    except ConfigError as error:
        problems.append(str(error))
    problems += _range_problems(values)
    if problems:
        raise ConfigError(join_problems(problems, "invalid settings"))
    return argparse.Namespace(**values)


def _parser(command: str, description: str, sections: Sequence[type[Section]]) -> argparse.ArgumentParser:
    parser = FlagParser.of_program(
        f"open_lm.finetune.{command}",
        f"{description}\nrecipes: {', '.join(recipe_names(command))}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for section in sections:
        group = parser.add_argument_group(section.title)
        for spec in section.specs():
            add_flag(group, spec)
    return parser


def _merge(
    sources: Sequence[tuple[str, Mapping[str, Any]]], specs: Mapping[str, FieldSpec]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of all fields, later sources first, and the problems of all sources."""
    values: dict[str, Any] = {name: spec.default for name, spec in specs.items()}
    problems: list[str] = []
    for origin, mapping in sources:
        where = "" if origin == "command line" else f" (in {origin})"
        for key, raw in mapping.items():
            spec = specs.get(key)
            if spec is None:
                similar = suggest(key, specs.values())
                hint = f"; did you mean {', '.join(similar)}?" if similar else ""
                problems.append(f"{origin}: unknown key {key!r}{hint}")
                continue
            try:
                value = convert(raw, spec)
            except ConfigError as error:
                problems.append(f"{error}{where}")
                continue
            # Settings for TRL add up: those of a flag do not remove the others of a recipe.
            values[key] = [*(values[key] or []), *value] if key == "trl" and value else value
    return values, problems


def _range_problems(values: Mapping[str, Any]) -> list[str]:
    positive = ("global_batch_size", "lr", "epochs", "log_every_n_steps", "save_every_n_steps")
    optional = ("batch_size", "max_steps")
    not_negative = ("warmup", "wd", "val_every_n_steps", "grad_clip_norm", "seed")
    rules = [(name, values[name] > 0, "above 0") for name in positive]
    rules += [(name, values[name] > 0, "above 0") for name in optional if values[name] is not None]
    rules += [(name, values[name] >= 0, "0 or more") for name in not_negative]
    return [
        f"--{name.replace('_', '-')}: found {values[name]}, expected {expected}"
        for name, is_valid, expected in rules
        if not is_valid
    ]


def recipe_names(command: str) -> list[str]:
    """Return the names of the recipes of a command."""
    return sorted(path.stem for path in (RECIPES / command).glob("*.yaml"))


def find_recipe(command: str, recipe: str) -> str:
    """Return the file of a recipe, given by its name or its path. Raise ConfigError if there is none."""
    if recipe in recipe_names(command):
        return str(RECIPES / command / f"{recipe}.yaml")
    path = Path(user_path(recipe))
    if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
        return str(path)
    raise ConfigError(
        f"--recipe {recipe}: found no such recipe or file, expected one of {', '.join(recipe_names(command))} or a "
        "YAML file"
    )
