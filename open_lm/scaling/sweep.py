"""Plan a sweep: the runs of a grid of settings over models, and the folder of their settings. Imports no torch."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from open_lm import storage
from open_lm.config.architecture import read_architecture
from open_lm.config.command_line import all_specs, parse_args
from open_lm.config.model_keys import feed_forward_width, scales_with_width
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError
from open_lm.scaling.ladder_files import PlannedRun
from open_lm.storage.strict_json import to_json

SWEEP_FILE = "sweep.json"
STANDARD, MUP = "standard", "mup"  # parametrizations
REPLICATE = "seed"  # runs that differ only in this setting are repetitions
_FORMAT = "open_lm.sweep/1"
_MIN_VALUES = 3  # needed to fit a minimum
# Settings of all runs, which --base and --set may replace.
_DEFAULTS: dict[str, Any] = {"epochs": 1, "checkpoint_format": "sharded", "report": "none", "energy": "none"}
# The command reads the states of runs from the folder of the sweep, so a base file must not set another one.
_PLANNED = frozenset({"name", "logs", "checkpoint_dir", "model", "resume", "mup", "mup_base_width"})


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        name: name of the run, which contains its settings.
        model: name of the model, without its folder.
        width: hidden_dim of the model.
        parametrization: STANDARD or MUP.
        settings: the varied settings; the first one is the axis of the sweep.
    """

    name: str
    model: str
    width: int
    parametrization: str
    settings: dict[str, float]


def parse_grid(texts: Sequence[str]) -> dict[str, list[float]]:
    """Return the values of each setting of --vary KEY=LOW:HIGH:N or KEY=VALUE,VALUE, ascending.

    Raises:
        ConfigError: a key is no numeric flag of the trainer, its values cannot be read, or the first has fewer than 3.
    """
    grid: dict[str, list[float]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        key = key.strip().replace("-", "_")
        spec = all_specs().get(key)
        if spec is None or spec.kind not in (int, float) or spec.many or key in _PLANNED or key in grid:
            raise ConfigError(
                f"--vary: found {text!r}, expected a numeric flag of open_lm.main, once, such as lr=1e-3:3e-2:6"
            )
        grid[key] = _numbers(text, values, whole=spec.kind is int)
    axis = next(iter(grid), None)
    if axis is None or len(grid[axis]) < _MIN_VALUES or axis == REPLICATE:
        raise ConfigError(
            f"--vary: found {' '.join(texts)}, expected at least {_MIN_VALUES} values of the first setting, whose "
            "minimum is fitted; further settings such as seed=1,2 follow"
        )
    return grid


def _numbers(text: str, values: str, whole: bool) -> list[float]:
    """Return the distinct numbers of LOW:HIGH:N, evenly spaced in their logarithm, or of a list with commas, ascending.

    whole: the setting is an integer, to which numbers of LOW:HIGH:N are rounded.
    """
    try:
        if ":" not in values:
            numbers = [float(part) for part in values.split(",")]
        else:
            low, high, count = values.split(":")
            ends, steps = (math.log(float(low)), math.log(float(high))), int(count) - 1
            numbers = [math.exp(ends[0] + (ends[1] - ends[0]) * i / steps) for i in range(steps + 1)]
            numbers = [float(round(number)) if whole else float(f"{number:.3g}") for number in numbers]
        if not numbers or not all(map(math.isfinite, numbers)):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"--vary: found {text!r}, expected KEY=LOW:HIGH:NUMBER, spaced evenly in the logarithm, or KEY=VALUE,VALUE"
        ) from None
    if whole and not all(map(float.is_integer, numbers)):
        raise ConfigError(f"--vary: found {text!r}, expected integers")
    return sorted(set(numbers))


def scaled_architecture(values: Mapping[str, Any], width: int, ffn_type: str) -> dict[str, Any]:
    """Return an architecture at another width, with heads of the same width and the same depth.

    The hidden widths of the feed-forward network and of experts grow in proportion, rounded to integers but not to
    larger multiples. If the embeddings are scaled by sqrt(width), the scale becomes that of the new width.

    Args:
        values: the contents of a model's JSON file.
        width: the new hidden_dim.
        ffn_type: --ffn-type, for files without it.

    Raises:
        ConfigError: the heads do not fit into the width.
    """
    base, num_heads = values["hidden_dim"], values["n_heads"]
    head = values.get("head_dim") or base // num_heads
    counts = {"n_heads": num_heads, **{key: values[key] for key in ("n_kv_heads",) if values.get(key)}}
    if width < 1 or any(count * width % base for count in counts.values()):
        step = math.lcm(*(base // math.gcd(base, count) for count in counts.values()))
        raise ConfigError(f"--widths: found {width}, expected multiples of {step}, which have complete heads of {head}")
    ffn_dim = values.get("ffn_dim") or feed_forward_width(values.get("ffn_type", ffn_type), base)
    dense = {} if values.get("moe_freq") == 1 else {"ffn_dim": ffn_dim}  # 1: experts in all blocks
    widths = {**dense, **{key: values[key] for key in ("moe_ffn_dim",) if values.get(key)}}
    scaled = {key: count * width // base for key, count in counts.items()}
    scaled |= {key: round(count * width / base) for key, count in widths.items()}
    if scales_with_width(values.get("embedding_scale", 1.0), base):
        scaled["embedding_scale"] = math.sqrt(width)
    return {**values, **scaled, "hidden_dim": width, "head_dim": head}


def choose_models(
    names: Sequence[str] | None, widths: Sequence[int] | None, base: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the architectures by name: those of --models, or one model scaled to --widths.

    base: settings of all runs, whose `model` is the default.

    Raises:
        ConfigError: no model, several models to scale, equal names, or settings that the command decides.
    """
    names = names or ([str(base["model"])] if base.get("model") else [])
    if not names or (widths and len(names) > 1):
        found = f"{len(names)} models" if names else "no model"
        raise ConfigError(f"--models: found {found}; expected model configurations, or with --widths one to scale")
    architectures = {name: read_architecture(name) for name in names}
    taken = [f"--models {name}: found mup" for name, values in architectures.items() if values.get("mup")]
    taken += [f"--base: found {key}" for key in ("mup", "mup_base_width") if key in base]
    if taken:
        raise ConfigError(f"{taken[0]}, which the command decides; remove it, and set --mup-base-width")
    if not widths:
        labels = {Path(name).name.removesuffix(".json"): values for name, values in architectures.items()}
        if len(labels) < len(names):
            raise ConfigError(f"--models: found {' '.join(names)}, expected files with different names, once each")
        return labels
    flags = {spec.name: base.get(spec.name, spec.default) for spec in ModelConfig.specs()}
    (named,) = architectures.values()
    architecture = {"moe_freq": flags["moe_freq"], **named}
    return {f"w{width}": scaled_architecture(architecture, width, flags["ffn_type"]) for width in sorted(set(widths))}


def mup_settings(models: Iterable[Mapping[str, Any]], base_width: int | None) -> dict[str, Any]:
    """Return the settings of muP for architectures.

    They contain mup_base_head_dim if the architectures of the base width agree on the width of a head.

    base_width: --mup-base-width; None for the smallest width.

    Raises:
        ConfigError: a width below 1.
    """
    models = list(models)
    if base_width is not None and base_width < 1:
        raise ConfigError(f"--mup-base-width: found {base_width}, expected at least 1")
    base_width = base_width or min(values["hidden_dim"] for values in models)
    bases = [values for values in models if values["hidden_dim"] == base_width]
    heads = {values.get("head_dim") or base_width // values["n_heads"] for values in bases}
    known = {"mup_base_head_dim": heads.pop()} if len(heads) == 1 else {}
    return {"mup": True, "mup_base_width": base_width, **known}


def write_sweep(
    folder: str,
    models: Mapping[str, Mapping[str, Any]],
    grid: Mapping[str, Sequence[float]],
    base: Mapping[str, Any],
    parametrizations: Mapping[str, int | None],
) -> list[SweepRun]:
    """Write sweep.json, the model files and one YAML per run for open_lm.main --config; return the runs.

    Args:
        folder: local folder. A sweep that it contains must be the same one.
        models: architectures by name.
        grid: the varied settings with their values.
        base: settings of all runs.
        parametrizations: STANDARD, MUP or both, with --mup-base-width (default: the smallest width).

    Raises:
        ConfigError: the folder contains another sweep, or a setting is invalid.
    """
    root = Path(folder)
    taken = sorted((_PLANNED - {"model"} | grid.keys()) & base.keys())
    if taken:
        raise ConfigError(f"--base: found {', '.join(taken)}, which the sweep decides; remove them")
    mup = {
        name: mup_settings(models.values(), width) if name == MUP else {} for name, width in parametrizations.items()
    }
    runs, configs = [], {}
    for (name, values), parametrization in itertools.product(models.items(), parametrizations):
        for numbers in itertools.product(*grid.values()):
            settings = dict(zip(grid, numbers, strict=True))
            words = [name, parametrization, *(f"{key}{_text(value)}" for key, value in settings.items())]
            run = SweepRun("_".join(words), name, values["hidden_dim"], parametrization, settings)
            runs.append(run)
            configs[run.name] = _config(root, run, base, mup[parametrization])
    content = {"format": _FORMAT, "configs": configs, "models": dict(models), "runs": list(map(asdict, runs))}
    path = root / SWEEP_FILE
    if path.exists() and _read(path) != json.loads(to_json(content)):
        raise ConfigError(
            f"{folder}: contains another sweep; continue it without further flags, or name another folder"
        )
    for name in ("models", "configs"):
        storage.makedirs(root / name)
    for name, values in models.items():
        storage.write_text(root / "models" / f"{name}.json", to_json(dict(values), indent=1) + "\n")
    for name, config in configs.items():
        storage.write_text(root / "configs" / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False))
        parse_args(["--config", str(root / "configs" / f"{name}.yaml")])
    storage.write_text(path, to_json(content, indent=1) + "\n")
    return runs


def _text(value: float) -> str:
    """Return the shortest text that identifies a value."""
    short = f"{value:g}"
    if float(short) == value:
        return short
    return str(int(value)) if value.is_integer() else repr(value)


def _config(root: Path, run: SweepRun, base: Mapping[str, Any], mup: Mapping[str, Any]) -> dict[str, Any]:
    specs = all_specs()
    values = {key: specs[key].kind(value) for key, value in run.settings.items()}
    config = {**_DEFAULTS, **mup, **base, "name": run.name, "logs": str(root / "runs"), "resume": "latest", **values}
    config["model"] = str(root / "models" / f"{run.model}.json")
    return config


def read_sweep(folder: str) -> list[SweepRun]:
    """Return the runs of sweep.json. Raise ConfigError for a folder without a valid sweep."""
    path = Path(folder) / SWEEP_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: found no {SWEEP_FILE}; start a sweep with --vary, such as --vary lr=1e-3:3e-2:6")
    content = _read(path)
    try:
        return [SweepRun(**item) for item in content["runs"]]
    except (KeyError, TypeError) as error:
        raise _not_a_sweep(path, error) from error


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a sweep.json."""
    try:
        content: dict[str, Any] = json.loads(storage.read_text(path))
        found = content.get("format")
    except (ValueError, AttributeError) as error:
        raise _not_a_sweep(path, error) from error
    if found != _FORMAT:
        raise ConfigError(f"{path}: found format {found!r}, expected {_FORMAT!r}")
    return content


def _not_a_sweep(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: not a sweep ({error}); delete it and start the sweep again")


def planned_run(folder: str, run: SweepRun) -> PlannedRun:
    """Return a run in the form that launchers expect."""
    root = Path(folder)
    return PlannedRun(
        name=run.name,
        config=str(root / "configs" / f"{run.name}.yaml"),
        folder=str(root / "runs" / run.name),
        trunk=None,
        params=0,
        tokens=0,
        cost_flops=0.0,
    )
