"""Settings of the pipeline: one YAML file, with changes from the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from open_lm import storage
from open_lm.errors import ConfigError, join_problems

COMPUTED_FLAGS = (  # flags of open_lm.main that the pipeline sets
    *("config", "recipe", "name", "logs", "resume", "model", "hf-model", "dataset-manifest", "train-data", "data-key"),
    *("val-data", "val-names", "icl-yaml", "icl-data-dir", "sample-prompts", "checkpoint-dir", "checkpoint-format"),
)


@dataclass(frozen=True)
class Text:
    """The text: a data set as `datasets.load_dataset` finds it.

    Attributes:
        dataset: name on the Hugging Face hub, or a local folder of data files.
        subset: subset (configuration) of the data set, such as sample-10BT.
        train, valid: splits or slices of them, such as train[:10%].
        streaming: fetch only the documents of the splits, which are then slices by numbers, such as train[:2000].
        key: column with the text.
        source_key: column with the name of a document's source (dots reach nested fields); null: one source.
        offline_mb: with --offline, megabytes of text from the Python installation.
        offline_vocab_size: with --offline, ids of the tokenizer that is trained on it, and of the model.
    """

    dataset: str
    subset: str | None = None
    train: str = "train[:99%]"
    valid: str = "train[99%:]"
    streaming: bool = False
    key: str = "text"
    source_key: str | None = None
    offline_mb: float = 4.0
    offline_vocab_size: int = 2048


@dataclass(frozen=True)
class Settings:
    """All settings; the YAML file has these keys.

    Attributes:
        name: name of the run.
        text: the training text.
        model: name or .json file of a model configuration, or its keys.
        train: flags of open_lm.main.
        tokenizer: hub name, folder or file; with --offline one is trained.
        preprocess: flags of datapreprocess/make_2048.py.
        training_tasks: YAML files of the tasks inside training, relative to the repository.
        evaluation_tasks: YAML files of the tasks of the evaluation after training.
        prompts: prompts of the samples before the first step and after the last one.
        launcher: command that starts the ranks; empty: one process.
        plan: flags of open_lm.plan that describe the devices.
        release: flags of open_lm.release; empty: no release.
    """

    name: str
    text: Text
    model: str | Mapping[str, Any]
    train: Mapping[str, Any]
    tokenizer: str = "openai-community/gpt2"
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    training_tasks: Sequence[str] = ("scripts/e2e/hellaswag.yaml",)
    evaluation_tasks: Sequence[str] = ("eval/in_memory_hf_eval.yaml",)
    prompts: Sequence[str] = ()
    launcher: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    release: Mapping[str, Any] = field(default_factory=dict)

    def values(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the settings of these names as JSON values."""
        return {name: value for name, value in asdict(self).items() if name in names}


def read_settings(path: Path, changes: Sequence[str] = (), launcher: str | None = None) -> Settings:
    """Read a YAML file and apply changes KEY=VALUE, whose keys reach nested settings with dots.

    Raises:
        StorageError: a file that cannot be read.
        ConfigError: no YAML, or unknown keys or values of another type (all of them are listed).
    """
    try:
        content = yaml.safe_load(storage.read_text(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a YAML file ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found {type(content).__name__}, expected keys and values")
    for change in changes:
        _apply(content, change)
    problems = _problems(Settings, content, "")
    if isinstance(content.get("text"), dict):
        problems += _problems(Text, content["text"], "text.")
    computed = sorted(set(COMPUTED_FLAGS) & {str(name).replace("_", "-") for name in content.get("train") or ()})
    problems += [f"train.{name}: the pipeline relies on its own value of this flag; remove it" for name in computed]
    if problems:
        raise ConfigError(join_problems(problems, str(path)))
    settings = Settings(**{**content, "text": Text(**content["text"])})
    return settings if launcher is None else replace(settings, launcher=launcher)


def _apply(content: dict[str, Any], change: str) -> None:
    key, sign, text = change.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {change}: expected KEY=VALUE, such as train.lr=0.001")
    *parents, last = key.split(".")
    for name in parents:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {change}: {name} has no keys")
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: the value is not YAML ({error})") from error


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "bool": (bool,),
    "float": (int, float),
    "int": (int,),
    "Text": (dict,),
    "str | Mapping[str, Any]": (str, dict),
    "Mapping[str, Any]": (dict,),
    "Sequence[str]": (list,),
}


def _problems(section: type, content: Mapping[str, Any], prefix: str) -> list[str]:
    """Return what is wrong with the keys and the types of a section."""
    specs = {spec.name: spec for spec in fields(section)}
    problems = []
    for name, value in content.items():
        if name not in specs:
            similar = difflib.get_close_matches(str(name), specs, n=1) or sorted(specs)
            problems.append(f"{prefix}{name}: unknown key; did you mean {' or '.join(similar)}?")
            continue
        kinds = _KINDS[str(specs[name].type)]
        valid = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not valid or (list in kinds and any(not isinstance(item, str) for item in value)):
            problems.append(f"{prefix}{name}: found {value!r}, expected {specs[name].type}")
    for name, spec in specs.items():
        if name not in content and spec.default is MISSING and spec.default_factory is MISSING:
            problems.append(f"{prefix}{name}: missing")
    return problems


def flag_words(flags: Mapping[str, Any], repeat: bool = False) -> list[str]:
    """Return flags as words of a command line: true is a flag without a value, a list is several values.

    With `repeat`, the flag of a list is repeated before each value.
    """
    words: list[str] = []
    for name, value in flags.items():
        flag = f"--{name}"
        if isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, list):
            words += [word for item in value for word in (flag, str(item))] if repeat else [flag, *map(str, value)]
        elif value is not None:
            words += [flag, str(value)]
    return words
