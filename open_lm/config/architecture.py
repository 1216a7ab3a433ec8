"""Find model configuration files by name or path, and check their contents. Imports no torch.

The keys of a file are COUNTS, SWITCHES, the fields of ArchitectureConfig (which are flags too) and those of ModelKeys.
docs/model_configs.md describes them.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.config.fields import FieldSpec
from open_lm.config.key_effects import keys_without_effect
from open_lm.config.model_keys import ModelKeys, relation_problems
from open_lm.config.sections import ArchitectureConfig, ModelConfig
from open_lm.errors import ConfigError, join_problems
from open_lm.system.names import unescape

CONFIG_DIR = Path(__file__).resolve().parents[1] / "model_configs"
COUNTS = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size")
SWITCHES = ("post_embed_norm", "weight_tying")
LEGACY_KEYS = ("model", "name", "norm_type")  # written by earlier tools and redundant
FAMILY_KEY = "family"  # the model_type of transformers that a model was imported from; only an export reads it
MODEL_FILE = "model.json"


def model_names() -> list[str]:
    """Return the model names that --model accepts, in natural order: open_lm_25m before open_lm_160m."""

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    return sorted((path.stem for path in CONFIG_DIR.glob("*.json")), key=natural)


def read_architecture(model: str) -> dict[str, Any]:
    """Read and check the configuration of --model: one of `model_names`, or the path or URL of a .json file.

    Returns:
        hidden_dim, n_layers, n_heads, seq_len, vocab_size, post_embed_norm, weight_tying, and the fields of
        ArchitectureConfig and ModelKeys that the file contains.

    Raises:
        ConfigError: an unknown name (the message lists similar names), a missing file, or invalid contents (the
            message lists all problems).
    """
    url = _url_of(model)
    return _check_contents(_read_file(model, url), f"--model {model} ({url.rpartition('/')[2]})")


def read_family(model: str) -> str | None:
    """Return the model_type of transformers that the configuration of --model states; None if it states none."""
    family = _read_file(model, _url_of(model)).get(FAMILY_KEY)
    return family if isinstance(family, str) else None


def _url_of(model: str) -> str:
    return model if model.endswith(".json") else str(CONFIG_DIR / f"{model}.json")


def _read_file(model: str, url: str) -> dict[str, Any]:
    if storage.info(url) is None:
        raise ConfigError(_not_found(model))
    try:
        contents = json.loads(storage.read_text(url))
    except ValueError as error:
        raise ConfigError(f"--model {model}: {url} is not valid JSON ({error})") from error
    if not isinstance(contents, dict):
        raise ConfigError(f"--model {model}: {url} contains a {type(contents).__name__}, expected a JSON object")
    return contents


def resolve_architecture(cfg: ModelConfig) -> dict[str, Any]:
    """Return the result of `read_architecture`, completed by the settings of `cfg` and the defaults of ModelKeys.

    Raises:
        ConfigError: as `read_architecture`, or keys that have no effect with these settings.
    """
    settings = {spec.name: getattr(cfg, spec.name) for spec in ArchitectureConfig.specs()}
    defaults = {spec.name: spec.default for spec in ModelKeys.specs()}
    values = {**defaults, **settings, **read_architecture(cfg.model)}
    problems = keys_without_effect(values)
    if problems:
        raise ConfigError(join_problems(list(problems.values()), f"--model {cfg.model}"))
    return values


def read_run_settings(checkpoint: str) -> dict[str, Any]:
    """Read the model settings from the params.txt of the run that wrote a checkpoint.

    If the file of --model no longer exists, `model` is the path of the copy in the run folder, {run}/model.json. A
    model.json in the folder `checkpoint` or next to it, as imported and exported models have one, takes precedence.

    Args:
        checkpoint: path or URL of {run}/checkpoints/epoch_N.pt or step_N/, or an exported folder.

    Returns:
        the fields of ModelConfig (model, model_norm, qk_norm, ...) by name; empty if there is no params.txt.
    """
    for folder in (checkpoint, _parent(checkpoint)):
        if storage.info(storage.join(folder, MODEL_FILE)) is not None:
            return {"model": storage.join(folder, MODEL_FILE)}
    written = read_written_params(checkpoint)
    specs = {spec.name: spec for spec in (*ArchitectureConfig.specs(), *ModelConfig.specs())}
    settings = {
        name: _parse_setting(written[name], spec)
        for name, spec in specs.items()
        if name in written and not (written[name] == "None" and not spec.optional)
    }
    model, copy = settings.get("model", ""), storage.join(_run_folder(checkpoint), MODEL_FILE)
    if model.endswith(".json") and not storage.exists(model) and storage.exists(copy):
        settings["model"] = copy
    return settings


def read_written_params(checkpoint: str) -> dict[str, str]:
    """Return the lines of the params.txt of the run that wrote a checkpoint, by key; empty if there is none."""
    url = storage.join(_run_folder(checkpoint), "params.txt")
    if not storage.exists(url):
        return {}
    lines = (line.partition(": ") for line in storage.read_lines(url))
    return {key: unescape(value) for key, _, value in lines}


def _run_folder(checkpoint: str) -> str:
    """Return the folder of the run that contains {run}/checkpoints/epoch_N.pt or step_N/."""
    return _parent(_parent(checkpoint))


def _parent(path: str) -> str:
    if storage.is_remote(path):
        return path.rstrip("/").rpartition("/")[0]
    return os.path.normpath(os.path.join(storage.local_path(path), ".."))


def _parse_setting(text: str, spec: FieldSpec) -> Any:
    if text == "None" and spec.optional:
        return None
    return text == "True" if spec.kind is bool else spec.kind(text)


def _not_found(model: str) -> str:
    names = model_names()
    if model.endswith(".json"):
        stem = Path(model).stem
        hint = f"; to use the model of this name, set --model {stem}" if stem in names else ""
        return f"--model {model}: file not found{hint}"
    similar = difflib.get_close_matches(model, names, n=5, cutoff=0.5) or names
    return (
        f"--model {model}: unknown model; similar names: {', '.join(similar)}. The path of a .json file is accepted too"
    )


def _check_contents(contents: dict[str, Any], label: str) -> dict[str, Any]:
    specs = {spec.name: spec for spec in (*ArchitectureConfig.specs(), *ModelKeys.specs())}
    problems = [f"{key} is missing" for key in COUNTS if key not in contents]
    problems += [_count_problem(key, contents[key]) for key in COUNTS if key in contents]
    checked: dict[str, Any] = dict.fromkeys(SWITCHES, False)
    for key, value in contents.items():
        if key in specs:
            problems.append(_field_problem(specs[key], value))
        elif key in SWITCHES and not isinstance(value, bool):
            problems.append(f"{key} is {value!r}, expected true or false")
        if key in (*specs, *SWITCHES, *COUNTS):
            checked[key] = value
        elif key == FAMILY_KEY and not isinstance(value, str):
            problems.append(f"{key} is {value!r}, expected a model_type of transformers")
        elif key not in (*LEGACY_KEYS, FAMILY_KEY):
            similar = difflib.get_close_matches(key, (*specs, *SWITCHES, *COUNTS), n=2, cutoff=0.7)
            hint = f"did you mean {' or '.join(similar)}?" if similar else "remove it"
            problems.append(f"the key {key} is unknown; {hint}")
    problems = [problem for problem in problems if problem] or relation_problems(checked)
    problems = problems or list(keys_without_effect(checked).values())
    if problems:
        raise ConfigError(join_problems(problems, label))
    return checked


def _count_problem(key: str, value: object) -> str:
    valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return "" if valid else f"{key} is {value!r}, expected an integer above 0"


_JSON_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "an object"}


def _field_problem(spec: FieldSpec, value: object) -> str:
    if value is None and spec.optional:
        return ""
    if spec.choices and value not in spec.choices:
        return f"{spec.name} is {value!r}, expected one of {', '.join(spec.choices)}"
    kinds = (int, float) if spec.kind is float else (spec.kind,)
    values = value if spec.many and isinstance(value, list) else [value]
    if any(not isinstance(v, kinds) or (isinstance(v, bool) and spec.kind is not bool) for v in values) or (
        spec.many and not isinstance(value, list)
    ):
        expected = f"a list, each {_JSON_KINDS[spec.kind]}" if spec.many else _JSON_KINDS[spec.kind]
        return f"{spec.name} is {value!r}, expected {expected}"
    return ""
