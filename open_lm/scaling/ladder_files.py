"""Write and read the folder of a ladder: ladder.json, model files, and one YAML per run for open_lm.main --config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from open_lm import storage
from open_lm.config.command_line import load_config_file, parse_args
from open_lm.errors import ConfigError
from open_lm.scaling.evaluation import KEY, check_evaluation
from open_lm.scaling.ladder import DECAY, Rung
from open_lm.scaling.number_types import LADDER_FILE
from open_lm.scaling.shapes import MODEL_FLAGS
from open_lm.storage.strict_json import to_json

_FORMAT = "open_lm.ladder/2"
# Settings that the plan decides, so that a base file must not.
_PLANNED = frozenset({
    "name", "model", "train_num_samples", "epochs", "global_batch_size", "lr", "warmup", "lr_scheduler",
    "lr_decay_fraction", "save_milestone_every", *MODEL_FLAGS, "pretrained", "load_pretrained_state", "logs", "resume",
    "checkpoint_dir",  # branches and evaluations read the checkpoints in the folder of the ladder
})  # fmt: skip
# Settings of the runs of Gadre et al. 2024, which a base file may replace.
_DEFAULTS: dict[str, Any] = {
    "wd": 0.033,
    "beta2": 0.95,
    "grad_clip_norm": 1.0,
    "z_loss_coefficient": 1e-4,
    "val_tok_ci": True,
}


@dataclass(frozen=True)
class PlannedRun:
    """A run of ladder.json.

    Attributes:
        name: name of the run.
        config: path of its YAML file.
        folder: its run folder.
        trunk: name of the run from which it branches, or None.
        params: number of parameters.
        tokens: number of training tokens, including those of its trunk up to the branch.
        cost_flops: FLOPs of its training, without those of its trunk.
        is_target: whether it is the run to predict.
        trained_steps: number of its steps, without those of its trunk.
    """

    name: str
    config: str
    folder: str
    trunk: str | None
    params: int
    tokens: int
    cost_flops: float
    is_target: bool = False
    trained_steps: int = 0


@dataclass(frozen=True)
class Ladder:
    """The content of ladder.json: the runs, trunks before branches, and the evaluation on tasks (or None)."""

    runs: Sequence[PlannedRun]
    evaluation: dict[str, Any] | None

    @property
    def target(self) -> list[PlannedRun]:
        """The run to predict, if it is planned."""
        return [planned for planned in self.runs if planned.is_target]


def write_ladder(folder: str, rungs: Sequence[Rung], base: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write a ladder.

    Args:
        folder: local folder to write, which must not contain a ladder.
        rungs: its runs; trunks come before their branches.
        base: settings of all runs.
        facts: further values of ladder.json, such as the target.

    Raises:
        ConfigError: the folder contains a ladder, or a setting is invalid.
    """
    root = Path(folder)
    if (root / LADDER_FILE).exists():
        raise ConfigError(f"{folder}: contains a ladder already; choose another folder, or delete {LADDER_FILE}")
    planned = sorted(_PLANNED & base.keys())
    if planned:
        raise ConfigError(f"--base or --set: found {', '.join(planned)}, which the plan decides; remove them")
    evaluation = check_evaluation(base.get(KEY))
    settings = {key: value for key, value in base.items() if key != KEY}
    configs = {rung.name: _config(root, rung, settings) for rung in rungs}
    storage.makedirs(root / "configs")
    for rung in rungs:
        if rung.shape.architecture:
            storage.write_text(root / rung.shape.model, to_json(dict(rung.shape.architecture), indent=1) + "\n")
    for name, config in configs.items():
        storage.write_text(root / "configs" / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False))
    for name in configs:
        _check(root / "configs" / f"{name}.yaml")
    content = ladder_values(rungs, {**facts, KEY: evaluation})
    storage.write_text(root / LADDER_FILE, to_json(content, indent=1) + "\n")


def ladder_values(rungs: Sequence[Rung], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ladder.json."""
    return {"format": _FORMAT, **facts, "runs": [_values(rung) for rung in rungs]}


def _config(root: Path, rung: Rung, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run."""
    model = str(root / rung.shape.model) if rung.shape.architecture else rung.shape.model
    config: dict[str, Any] = {
        "name": rung.name,
        "logs": str(root / "runs"),
        "model": model,
        **MODEL_FLAGS,
        **_DEFAULTS,
        **base,
        "train_num_samples": rung.tokens,
        "epochs": 1,
        "global_batch_size": rung.global_batch,
        "lr": float(f"{rung.lr:.4g}"),
        "warmup": rung.warmup,
        "lr_scheduler": rung.schedule,
        "resume": "latest",
    }
    if "val_data" not in config:
        del config["val_tok_ci"]
    if rung.schedule == "wsd":
        config["lr_decay_fraction"] = DECAY
    if rung.milestone:
        config["save_milestone_every"] = rung.milestone
    if rung.trunk is not None:
        checkpoint = root / "runs" / rung.trunk / "checkpoints" / f"step_{rung.start:08d}"
        config |= {"pretrained": str(checkpoint), "load_pretrained_state": True}
    return config


def _check(path: Path) -> None:
    """Raise ConfigError if the trainer rejects a file of settings."""
    parse_args(["--config", str(path)])


def _values(rung: Rung) -> dict[str, Any]:
    return {
        "name": rung.name,
        "model": rung.shape.label,
        "params": rung.shape.params,
        "active_params": rung.shape.active_params,
        "params_non_embedding": rung.shape.params_non_embedding,
        "multiplier": rung.multiplier,
        "tokens": rung.tokens,
        "steps": rung.steps,
        "global_batch": rung.global_batch,
        "lr": rung.lr,
        "warmup": rung.warmup,
        "trunk": rung.trunk,
        "start": rung.start,
        "is_target": rung.is_target,
        "flops": 6.0 * rung.shape.params * rung.tokens,
        "exact_flops": rung.tokens * rung.shape.flops_per_token,
        "cost_flops": rung.cost,
    }


def read_ladder(folder: str) -> Ladder:
    """Return the ladder in a folder.

    Raises:
        ConfigError: a folder without a valid ladder.
    """
    path = Path(folder) / LADDER_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: found no {LADDER_FILE}, expected a folder that `plan` wrote")
    try:
        content = json.loads(storage.read_text(path))
        if content.get("format") != _FORMAT:
            raise ConfigError(f"{path}: found format {content.get('format')!r}, expected {_FORMAT!r}")
        runs = [_planned_run(folder, item) for item in content["runs"]]
        return Ladder(sorted(runs, key=lambda run: run.trunk is not None), content[KEY])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a ladder ({error}); write it again with `plan`") from error


def _planned_run(folder: str, item: Mapping[str, Any]) -> PlannedRun:
    return PlannedRun(
        name=item["name"],
        config=str(Path(folder) / "configs" / f"{item['name']}.yaml"),
        folder=str(Path(folder) / "runs" / item["name"]),
        trunk=item["trunk"],
        is_target=item["is_target"],
        trained_steps=item["steps"] - item["start"],
        params=item["params"],
        tokens=item["tokens"],
        cost_flops=item["cost_flops"],
    )


def read_base(path: str | None, settings: Sequence[str]) -> dict[str, Any]:
    """Return the settings of --base FILE and --set KEY=VALUE, with underscores.

    Raises:
        ConfigError: a file that cannot be read, or a text without `=` or with a value that is not YAML.
    """
    values = dict(load_config_file(path, "--base")) if path else {}
    for text in settings:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--set: found {text!r}, expected KEY=VALUE such as precision=amp_bf16")
        try:
            values[key.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set: found {text!r}, whose value is not valid YAML; expected KEY=VALUE") from None
    return values
