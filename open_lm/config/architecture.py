"""Model configurations on disk: finding them by name or path, and checking what they say. Imports no torch."""

from __future__ import annotations

import difflib
import json
import logging
import re
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.config.sections import ArchitectureConfig, FieldSpec, ModelConfig
from open_lm.errors import ConfigError, join_problems

log = logging.getLogger(__name__)

CONFIG_DIR = Path(__file__).resolve().parents[1] / "model_configs"
COUNTS = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size")
SWITCHES = ("post_embed_norm", "weight_tying")
LEGACY = ("model", "name", "norm_type")  # written by earlier tools, and said again by the keys that count


def model_names() -> list[str]:
    """Names that --model takes, in the order of their numbers."""

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    return sorted((path.stem for path in CONFIG_DIR.glob("*.json")), key=natural)


def architecture_of(model: str) -> dict[str, Any]:
    """The checked contents of the configuration that --model names: one of `model_names`, or the path of a .json file.

    Returns:
        hidden_dim, n_layers, n_heads, seq_len, vocab_size, post_embed_norm, weight_tying, and those of the fields of
        ArchitectureConfig that the file sets.

    Raises:
        ConfigError: an unknown name (near ones are listed), a missing file, or contents that cannot be used, all
            problems together.
    """
    path = Path(model) if model.endswith(".json") else CONFIG_DIR / f"{model}.json"
    if not path.is_file():
        raise ConfigError(_not_found(model))
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--model {model}: {path} is not valid JSON ({error})") from error
    if not isinstance(contents, dict):
        raise ConfigError(f"--model {model}: {path} holds a {type(contents).__name__}, expected a JSON object")
    return _checked(contents, f"--model {model} ({path.name})")


def gated_width(dim: int) -> int:
    """Hidden width of a gated feed-forward network for model width D: 8/3 of D, rounded up to a multiple of 256."""
    return 256 * -(-int(8 * dim / 3) // 256)


def settings_of_run(checkpoint: str) -> dict[str, Any]:
    """What the run that wrote {run}/checkpoints/epoch_N.pt (or step_N/) says about its model in {run}/params.txt.

    A --model whose file is not where the run found it is replaced by the run's own copy, {run}/model.json.

    Returns:
        fields of ModelConfig (model, model_norm, qk_norm, …) by name; empty where there is no such file.
    """
    folder = checkpoint.rstrip("/").rpartition("/")[0] or "."
    url = storage.join(folder, "..", "params.txt") if not storage.is_remote(folder) else _parent(folder) + "/params.txt"
    if not storage.exists(url):
        return {}
    lines = (line.partition(": ") for line in storage.read_text(url).splitlines())
    written = {key: value for key, _, value in lines}
    specs = {spec.name: spec for spec in (*ArchitectureConfig.specs(), *ModelConfig.specs())}
    settings = {
        name: _parsed(written[name], spec)
        for name, spec in specs.items()
        if name in written and not (written[name] == "None" and not spec.optional)
    }
    model, copy = settings.get("model", ""), Path(folder).parent / "model.json"
    if model.endswith(".json") and not Path(model).exists() and copy.exists():
        settings["model"] = str(copy)
    return settings


def _parent(url: str) -> str:
    return url.rstrip("/").rpartition("/")[0]


def _parsed(text: str, spec: FieldSpec) -> Any:
    if text == "None" and spec.optional:
        return None
    return text == "True" if spec.kind is bool else spec.kind(text)


def _not_found(model: str) -> str:
    names = model_names()
    if model.endswith(".json"):
        stem = Path(model).stem
        hint = f"; without the path, --model {stem} exists" if stem in names else ""
        return f"--model {model}: no such file{hint}"
    near = difflib.get_close_matches(model, names, n=5, cutoff=0.5) or names
    return f"--model {model}: no such model; near names: {', '.join(near)}. The path of a .json file works as well"


def _checked(contents: dict[str, Any], label: str) -> dict[str, Any]:
    specs = {spec.name: spec for spec in ArchitectureConfig.specs()}
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
        elif key not in LEGACY:
            log.warning("%s: the key %s is not known and has no effect", label, key)
    found = [problem for problem in problems if problem]
    if found:
        raise ConfigError(join_problems(found, label))
    return checked


def _count_problem(key: str, value: object) -> str:
    valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return "" if valid else f"{key} is {value!r}, expected a whole number above 0"


def _field_problem(spec: FieldSpec, value: object) -> str:
    if value is None and spec.optional:
        return ""
    if spec.choices and value not in spec.choices:
        return f"{spec.name} is {value!r}, expected one of {', '.join(spec.choices)}"
    kinds = (int, float) if spec.kind is float else (spec.kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and spec.kind is not bool):
        return f"{spec.name} is {value!r}, expected {spec.kind.__name__}"
    return ""
