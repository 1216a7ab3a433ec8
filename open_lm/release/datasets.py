"""The data of a run in a bundle: records of the training data, instructions that rebuild them, and evaluation data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.data.manifest import DATASET_NAME, MANIFEST_NAME
from open_lm.errors import ConfigError, UserError
from open_lm.names import split_joined
from open_lm.release import layout
from open_lm.release.privacy import Redactor
from open_lm.release.run_facts import RunFacts
from open_lm.storage.strict_json import to_json

_TOKENIZER = "tokenizer"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class DataFolder:
    """A folder of shards that a run was trained on.

    Attributes:
        number: from 1; its folder in the bundle is data/{number:02}.
        source: its source in data.json: the value of --dataset-manifest or --train-data.
        location: path or URL of the folder.
        record: the content of dataset.json; None without one.
        has_manifest: whether it has a manifest.jsonl.
        included: whether the bundle has its shards.
    """

    number: int
    source: Record
    location: str
    record: Record | None
    has_manifest: bool
    included: bool

    @property
    def place(self) -> str:
        """Its folder in the bundle."""
        return f"{layout.DATA}/{self.number:02}"

    @property
    def has_hashes_of_inputs(self) -> bool:
        """Whether dataset.json states a digest of each raw file, so that the folder can be rebuilt and compared."""
        inputs = (self.record or {}).get("inputs") or []
        return bool(inputs) and all("sha256" in item or "sha256_of_pieces" in item for item in inputs)


def find_folders(facts: RunFacts, include_shards: bool) -> list[DataFolder]:
    """Return the folders of the training data, in the order of the run's sources; none if data.json is missing."""
    folders: list[DataFolder] = []
    for source in (facts.data or {}).get("sources", []):
        for location in _locations(str(source["name"])):
            record = _read_json(storage.join(location, DATASET_NAME))
            has_manifest = _exists(storage.join(location, MANIFEST_NAME))
            included = include_shards and _exists(location + "/")
            folders.append(DataFolder(len(folders) + 1, source, location, record, has_manifest, included))
    return folders


def _locations(name: str) -> list[str]:
    """Return the folders of a value of --dataset-manifest or --train-data."""
    parts = [name] if name.endswith(".jsonl") else split_joined(name)
    return list(dict.fromkeys(part.rpartition("/")[0] or "." for part in parts if not part.startswith("pipe:")))


def _exists(location: str) -> bool:
    try:
        return bool(storage.list_files(location)) if location.endswith("/") else storage.info(location) is not None
    except UserError:  # an unreachable bucket: the bundle states that the data are missing
        return False


def _read_json(url: str) -> Record | None:
    if not _exists(url):
        return None
    try:
        value = json.loads(storage.read_text(url))
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("settings"), dict) else None


# ------------------------------------------------------------------------------------------------------ training data
def write_training_data(facts: RunFacts, folders: Sequence[DataFolder], bundle: Path, redactor: Redactor) -> None:
    """Write data/: data.json, and for each folder its dataset.json, manifest.jsonl, tokenizer and included shards."""
    if facts.data is not None:
        _write_json(bundle / layout.DATA / "data.json", redactor.value(facts.data))
    for folder in folders:
        target = bundle / folder.place
        if folder.record is not None:
            _write_json(target / DATASET_NAME, redactor.value(folder.record))
        if folder.has_manifest:
            storage.copy(storage.join(folder.location, MANIFEST_NAME), target / MANIFEST_NAME)
        for file in _files_in(storage.join(folder.location, _TOKENIZER)):
            storage.copy(file, target / _TOKENIZER / file.rpartition("/")[2])
        for shard in _shards(folder) if folder.included else ():
            storage.copy(shard, target / shard.rpartition("/")[2])


def _shards(folder: DataFolder) -> Iterator[str]:
    """Yield the shards of a folder that the run was trained on."""
    stems = {str(row["shard"]) for row in folder.source.get("shards", [])}
    for file in storage.list_files(folder.location):
        if file.endswith(".tar") and file.rpartition("/")[2].removesuffix(".tar") in stems:
            yield file


def _files_in(folder: str) -> list[str]:
    try:
        return storage.list_files(folder) if _exists(folder + "/") else []
    except UserError:
        return []


# ---------------------------------------------------------------------------------------------------- evaluation data
def write_evaluation_data(facts: RunFacts, bundle: Path, redactor: Redactor) -> list[str]:
    """Write evaluation/data/: the task files and the validation shards; return what could not be copied, with reasons.

    Task files are in tasks/, with the YAML files that name them; validation shards are in validation/{number:02}/.
    """
    problems = _copy_tasks(facts, bundle / layout.EVALUATION_DATA / "tasks")
    for number, pattern in enumerate(facts.setting("val_data") or [], start=1):
        target = bundle / layout.EVALUATION_DATA / "validation" / f"{number:02}"
        try:
            _copy_validation_set(pattern, target, redactor)
        except UserError as error:
            shutil.rmtree(target, ignore_errors=True)
            problems.append(f"validation set {pattern}: {error}")
    return problems


def _copy_validation_set(pattern: str, target: Path, redactor: Redactor) -> None:
    from open_lm.data.sources import find_validation_source

    source = find_validation_source(pattern)
    for shard in source.shards:
        if shard.startswith("pipe:"):
            raise ConfigError(f"{shard.split()[0]}: the output of a command is not copied")
        storage.copy(shard, target / shard.rpartition("/")[2])
    for folder in dict.fromkeys(shard.rpartition("/")[0] or "." for shard in source.shards):
        if _exists(storage.join(folder, MANIFEST_NAME)):
            storage.copy(storage.join(folder, MANIFEST_NAME), target / MANIFEST_NAME)
        if (record := _read_json(storage.join(folder, DATASET_NAME))) is not None:
            _write_json(target / DATASET_NAME, redactor.value(record))


def _copy_tasks(facts: RunFacts, target: Path) -> list[str]:
    """Copy the YAML files and the data of the run's tasks, and of the tasks of its evaluation results."""
    from open_lm.evaluate.icl.tasks import read_settings

    files, problems = facts.setting("icl_yaml") or [], []
    if not files:
        return []
    try:
        folder = facts.setting("icl_data_dir")
        settings = read_settings(files, folder, yaml_flag="--icl-yaml", data_flag="--icl-data-dir")
    except UserError as error:
        return [f"tasks of {', '.join(files)}: {error}"]
    for file in files:
        storage.copy(file, target / Path(file).name)
    for task in settings.tasks:
        if task.is_hub:
            problems.append(f"task {task.label}: its data are on the hub, {task.data}")
        else:
            storage.copy(task.data, target / Path(task.data).name)
    return problems


def _write_json(path: Path, value: Any) -> None:
    storage.write_text(path, to_json(value, indent=2, ensure_ascii=False) + "\n")
