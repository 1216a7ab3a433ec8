"""Read the YAML files of an evaluation, find the data of their tasks, and report all problems together.

The files have llm-foundry's format, so that both engines read the same ones.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.config.evaluation_sections import EVAL_PRECISIONS
from open_lm.errors import ConfigError, DataError, join_problems
from open_lm.evaluate.icl.gauntlet import Gauntlet, parse_gauntlet
from open_lm.evaluate.icl.task_types import TASK_TYPES, known_metrics
from open_lm.system.names import user_path
from open_lm.tokenizer import Tokenizer

HOW_TO_GET_DATA = (
    "This command collects the task data, from llm-foundry's repository or other sources (see its --help):\n"
    "    python -m open_lm.evaluate.icl.download --output FOLDER\n"
    "  Then pass --data-dir FOLDER, or set data_dir in the YAML file."
)
_HOW_TO_SELECT = " --tasks NAME… runs only some of the tasks."
EXTRA_KEYS = ("random_baseline",)  # keys of a task's entry that llm-foundry does not support
_REFERENCE = re.compile(r"\$\{\s*([^{}]+?)\s*\}")
_ENVIRONMENT = "oc.env:"  # before the name of an environment variable, and a default after a comma
_MAX_REFERENCES = 16  # depth of settings that refer to other settings
AGGREGATES = ("core", "extended", "openlm")  # scores over several tasks, see aggregates.py
KNOWN_SETTINGS = (
    "data_dir", "max_seq_len", "device_eval_batch_size", "precision", "seed", "icl_tasks", "aggregates",
    "eval_gauntlet",
)  # fmt: skip


@dataclass
class Task:
    """One entry of icl_tasks.

    Attributes:
        label: name of the task.
        kind: llm-foundry's icl_task_type.
        shots: numbers of examples in the prompt; each is a separate evaluation.
        data: path or URL of the .jsonl file.
        config: the entry in llm-foundry's format.
        baseline: score of random guessing, if the entry specifies it.
    """

    label: str
    kind: str
    shots: list[int]
    data: str
    config: dict[str, Any]
    baseline: float | None = None

    @property
    def is_hub(self) -> bool:
        return self.data.startswith("hf://")

    def data_record(self) -> dict[str, str | None]:
        """Return the label, the absolute path or URL of the data, and its sha256 (hex); None for data of the hub."""
        if self.is_hub:
            return {"task": self.label, "data": self.data, "sha256": None}
        location = self.data if storage.is_remote(self.data) else os.path.abspath(storage.local_path(self.data))
        digest = hashlib.sha256(storage.read_bytes(self.data)).hexdigest()
        return {"task": self.label, "data": location, "sha256": digest}


@dataclass
class EvalSettings:
    """The settings of the YAML files. Settings other than tasks come from the first file."""

    tasks: list[Task]
    max_seq_len: int | None = None
    batch_size: int = 8
    precision: str = "fp32"
    seed: int = 1
    aggregates: list[str] = field(default_factory=list)  # names in AGGREGATES, of all files
    gauntlet: Gauntlet | None = None  # of the first file that has one
    ignored: list[str] = field(default_factory=list)  # settings of the first file that have no effect

    def check_fit(self, tokenizer: Tokenizer, vocab_size: int, seq_len: int, *, model: str, file: str) -> None:
        """Raise ConfigError if the tokenizer or these settings do not match a model.

        Args:
            tokenizer: the tokenizer of the evaluation.
            vocab_size: number of ids that the model accepts.
            seq_len: sequence length of the model.
            model: the model's name, for messages.
            file: the YAML file of these settings, for messages.
        """
        problems = []
        if tokenizer.vocab_size > vocab_size:
            problems.append(
                f"--tokenizer {tokenizer.name} has ids up to {tokenizer.vocab_size - 1}, but {model} accepts only ids "
                f"below {vocab_size}; pass the tokenizer of the model's training data"
            )
        if self.max_seq_len and self.max_seq_len > seq_len:
            problems.append(
                f"{file}: max_seq_len is {self.max_seq_len}, but the sequence length of {model} is {seq_len}; lower it "
                "or leave it empty"
            )
        if problems:
            raise ConfigError(join_problems(problems))


def read_settings(
    files: Sequence[str],
    data_dir: str | None = None,
    only: Sequence[str] | None = None,
    *,
    yaml_flag: str = "--eval-yaml",
    data_flag: str = "--data-dir",
) -> EvalSettings:
    """Read evaluation YAML files without loading models or downloading data.

    Args:
        files: YAML files; their tasks are combined.
        data_dir: folder of the tasks' data; overrides the `data_dir` of each file.
        only: labels of the tasks to run; default: all.
        yaml_flag, data_flag: the flags of `files` and `data_dir`, for messages.

    Raises:
        ConfigError: lists all missing or invalid files, entries and data.
    """
    problems: list[str] = []
    contents = [_load(file, data_dir, problems, yaml_flag) for file in files]
    entries = [(file, item) for file, content in zip(files, contents, strict=True) for item in content["icl_tasks"]]
    tasks = [task for file, entry in entries if (task := _task(entry, file, problems)) is not None]
    labels = [str(entry["label"]) for _, entry in entries if isinstance(entry, dict) and entry.get("label")]
    problems += [f"task {label} is listed more than once" for label in sorted(set(labels)) if labels.count(label) > 1]
    unknown = [name for name in only or [] if name not in labels]
    if unknown:
        problems.append(f"--tasks {' '.join(unknown)}: expected some of {', '.join(labels) or 'the tasks'}")
    aggregates: list[str] = []
    for file, content in zip(files, contents, strict=True):
        aggregates += _names(content, "aggregates", AGGREGATES, f"{file}: ", problems)
    first = contents[0]
    settings = EvalSettings(
        [task for task in tasks if not only or task.label in only],
        max_seq_len=_number(first, "max_seq_len", None, f"{files[0]}: ", problems),
        batch_size=_number(first, "device_eval_batch_size", 8, f"{files[0]}: ", problems) or 8,
        precision=str(first.get("precision") or "fp32"),
        seed=_number(first, "seed", 1, f"{files[0]}: ", problems) or 0,
        aggregates=list(dict.fromkeys(aggregates)),
        gauntlet=_gauntlet(files, contents, problems),
        ignored=[key for key, value in first.items() if key not in KNOWN_SETTINGS and value],
    )
    if settings.precision not in EVAL_PRECISIONS:
        problems.append(f"{files[0]}: precision is {settings.precision}, expected one of {', '.join(EVAL_PRECISIONS)}")
    if problems:
        raise ConfigError(join_problems(problems, "invalid evaluation settings"))
    missing = [problem for task in settings.tasks for problem in _data_problems(task)]
    if missing:
        advice = HOW_TO_GET_DATA.replace("--data-dir", data_flag)
        advice += _HOW_TO_SELECT if yaml_flag == "--eval-yaml" else ""
        raise ConfigError(join_problems(missing, "task data") + f"\n  {advice}")
    return settings


def _load(file: str, data_dir: str | None, problems: list[str], flag: str) -> dict[str, Any]:
    """Return the settings of a YAML file with resolved ${…}. icl_tasks is always a list."""
    import yaml

    file_problems: list[str] = []
    resolved: Any = None
    if not storage.exists(file):
        file_problems.append("no such file")
    else:
        try:
            content = yaml.safe_load(storage.read_text(file))
            if isinstance(content, dict):
                if data_dir is not None:
                    content["data_dir"] = data_dir
                elif content.get("data_dir"):
                    folder = file.rpartition("/")[0] if storage.is_remote(file) else str(Path(file).resolve().parent)
                    content["data_dir"] = storage.join(folder, user_path(str(content["data_dir"])))
                resolved = _resolve(content, content)
        except (yaml.YAMLError, ValueError) as error:
            file_problems.append(f"cannot be read ({' '.join(str(error).split())})")
    if not file_problems and not (isinstance(resolved, dict) and isinstance(resolved.get("icl_tasks"), list)):
        file_problems.append("expected settings with a list icl_tasks")
    problems += [f"{flag} {file}: {problem}" for problem in file_problems]
    return {"icl_tasks": []} if file_problems else dict(resolved)


def _gauntlet(files: Sequence[str], contents: Sequence[dict[str, Any]], problems: list[str]) -> Gauntlet | None:
    """Return the Gauntlet of the first file that has one: settings, or the path of a YAML file with them."""
    for file, content in zip(files, contents, strict=True):
        value = content.get("eval_gauntlet")
        if isinstance(value, str):
            folder = file.rpartition("/")[0] if storage.is_remote(file) else str(Path(file).resolve().parent)
            path = user_path(value)
            path = path if storage.exists(path) else storage.join(folder, path)
            value = _yaml_of(path, f"{file}: eval_gauntlet", problems).get("eval_gauntlet")
            return None if value is None else parse_gauntlet(value, path, problems)
        if value is not None:
            return parse_gauntlet(value, file, problems)
    return None


def _yaml_of(path: str, where: str, problems: list[str]) -> dict[str, Any]:
    """Return the content of a YAML file with the key eval_gauntlet; otherwise add a problem."""
    import yaml

    try:
        content = yaml.safe_load(storage.read_text(path)) if storage.exists(path) else None
    except (yaml.YAMLError, ValueError):
        content = None
    if isinstance(content, dict) and "eval_gauntlet" in content:
        return content
    problems.append(f"{where} is {path}, expected settings or the path of a YAML file with the key eval_gauntlet")
    return {}


def _resolve(value: Any, settings: dict[str, Any], depth: int = 0) -> Any:
    """Return a value of a YAML file with each ${name} and ${name.key} replaced by that setting.

    ${oc.env:NAME} and ${oc.env:NAME,default} are environment variables, as in OmegaConf.

    Raises:
        ValueError: a name that does not exist, or names that refer to each other in a circle.
    """
    if isinstance(value, dict):
        return {key: _resolve(item, settings, depth) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, settings, depth) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    if depth > _MAX_REFERENCES:
        raise ValueError(f"{value} refers to itself")

    def lookup(name: str) -> Any:
        if name.startswith(_ENVIRONMENT):
            return _environment_value(name.removeprefix(_ENVIRONMENT))
        found: Any = settings
        for key in name.split("."):
            if not isinstance(found, dict) or key not in found:
                raise ValueError(f"${{{name}}} is not a setting of the file")
            found = found[key]
        return _resolve(found, settings, depth + 1)

    whole = _REFERENCE.fullmatch(value)
    return lookup(whole[1]) if whole else _REFERENCE.sub(lambda match: str(lookup(match[1])), value)


def _environment_value(text: str) -> str:
    name, has_default, default = (part.strip() for part in text.partition(","))
    if name not in os.environ and not has_default:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ.get(name, default)


def _task(entry: Any, file: str, problems: list[str]) -> Task | None:
    if not isinstance(entry, dict) or not entry.get("label"):
        problems.append(f"{file}: an entry of icl_tasks has no label: {entry!r}")
        return None
    label = str(entry["label"])
    kind, data, shots = entry.get("icl_task_type"), entry.get("dataset_uri"), entry.get("num_fewshot")
    task_problems = []
    if not isinstance(kind, str) or kind not in TASK_TYPES:
        task_problems.append(f"icl_task_type is {kind!r}, expected one of {', '.join(TASK_TYPES)}")
    if not isinstance(data, str) or not data:
        task_problems.append(f"dataset_uri is {data!r}, expected the path or URL of a .jsonl file")
    if not isinstance(shots, list) or not shots or not all(isinstance(n, int) and n >= 0 for n in shots):
        task_problems.append(f"num_fewshot is {shots!r}, expected a list of integers such as [0]")
    baseline = entry.get("random_baseline")
    if baseline is not None and not (isinstance(baseline, (int, float)) and 0 <= baseline < 1):
        task_problems.append(f"random_baseline is {baseline!r}, expected a number of at least 0 and below 1")
    _number(entry, "max_seq_len", None, "", task_problems)
    _names(entry, "metric_names", known_metrics(), "", task_problems)
    problems += [f"{file}: task {label}: {problem}" for problem in task_problems]
    if task_problems or kind is None or data is None or shots is None:
        return None
    config = {key: value for key, value in entry.items() if key not in EXTRA_KEYS}
    return Task(label, kind, shots, _find_data(user_path(data)), config, baseline)


def _find_data(data: str) -> str:
    """Return the path of task data. A missing file is searched in the subfolders, as in llm-foundry's repository."""
    if storage.is_remote(data) or data.startswith("hf://") or Path(data).is_file():
        return data
    path = Path(data)
    matches = list(path.parent.glob(f"*/{glob.escape(path.name)}")) if path.parent.is_dir() else []
    return str(matches[0]) if len(matches) == 1 else data


def _number(content: dict[str, Any], key: str, default: int | None, where: str, problems: list[str]) -> int | None:
    value = content.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < (0 if key == "seed" else 1):
        problems.append(f"{where}{key} is {value!r}, expected an integer")
        return default
    return value


def _names(content: dict[str, Any], key: str, known: Sequence[str], where: str, problems: list[str]) -> list[str]:
    """Return a list of names of a YAML file; add a problem if it is no list, or has unknown names."""
    value = content.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        problems.append(f"{where}{key} is {value!r}, expected a list with some of {', '.join(known)}")
        return []
    unknown = [str(name) for name in value if name not in known]
    if unknown:
        problems.append(f"{where}{key} has {', '.join(unknown)}, expected some of {', '.join(known)}")
    return [] if unknown else value


def _data_problems(task: Task) -> list[str]:
    if task.is_hub:
        return []
    if not storage.exists(task.data):
        return [f"{task.label}: {task.data} is missing"]
    with storage.open_file(task.data) as file:
        line = file.readline()
    columns = list(TASK_TYPES.get(task.kind).column_names(task.config).values())
    columns += ["category"] if task.config.get("has_categories") else []
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        return [f"{task.label}: the first line of {task.data} is not a JSON object"]
    missing = [name for name in columns if name not in row]
    if missing:
        return [
            f"{task.label}: {task.data} lacks {', '.join(missing)} (it has {', '.join(row)}), "
            f"which {task.kind} tasks need"
        ]
    return []


def first_examples(task: Task, max_examples: int | None) -> list[str]:
    """Return the lines of the first examples of a task, of each category if it has categories; None means all."""
    counts: dict[str, int] = {}
    selected = []
    for number, line in enumerate(storage.read_lines(task.data), start=1):
        if not line.strip():
            continue
        category = _category(line, task, number) if task.config.get("has_categories") else ""
        counts[category] = counts.get(category, 0) + 1
        if max_examples is None or counts[category] <= max_examples:
            selected.append(line)
    return selected


def _category(line: str, task: Task, number: int) -> str:
    try:
        return str(json.loads(line)["category"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{task.data}: line {number} has no category; expected JSON with that key") from error
