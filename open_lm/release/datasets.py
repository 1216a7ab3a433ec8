"""The data of a run in a bundle: records of the training data, instructions that rebuild them, and evaluation data."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.data.manifest import DATASET_NAME, MANIFEST_NAME
from open_lm.errors import ConfigError, DataError, UserError
from open_lm.release import layout
from open_lm.release.privacy import Redactor
from open_lm.release.run_facts import RunFacts
from open_lm.release.weights import sha256_of
from open_lm.storage.strict_json import to_json
from open_lm.system.names import split_joined

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
    if facts.setting("train_text"):
        return _text_folders(facts, include_shards)
    for source in (facts.data or {}).get("sources", []):
        for location in _locations(str(source["name"])):
            record = _read_json(storage.join(location, DATASET_NAME))
            has_manifest = _exists(storage.join(location, MANIFEST_NAME))
            included = include_shards and _exists(location + "/")
            folders.append(DataFolder(len(folders) + 1, source, location, record, has_manifest, included))
    return folders


def _text_folders(facts: RunFacts, include_shards: bool) -> list[DataFolder]:
    """Return the indexes of --train-text. They have no shards; their manifests name raw files and are not published."""
    from open_lm.data.text_folder import INDEX_FOLDER  # only then: they import the readers
    from open_lm.data.text_index import text_folder

    if include_shards:
        raise ConfigError(
            "--include-data: the run tokenized its raw text itself (--train-text), so there are no shards to include; "
            "leave the flag out, or train on shards that open-lm preprocess writes"
        )
    index = facts.setting("text_index") or str(facts.folder / INDEX_FOLDER)
    locations = [text_folder(index, name).path for name in facts.setting("train_text")]
    sources = (facts.data or {}).get("sources", [])
    return [
        DataFolder(number, source, location, _read_json(storage.join(location, DATASET_NAME)), False, False)
        for number, (source, location) in enumerate(zip(sources, locations, strict=False), start=1)
    ]


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
def write_evaluation_data(
    facts: RunFacts, results: Sequence[Path], bundle: Path, redactor: Redactor, copy: Callable[[str, Path], Any]
) -> list[str]:
    """Write evaluation/data/: the task files and the validation shards; return what could not be copied, with reasons.

    Task files are in tasks/, with the YAML files that name them, and tasks.json lists the file of each task. Validation
    shards are in validation/{number:02}/.

    Args:
        results: files of separate evaluations, in checkpoints/evals/.
        copy: copies a settings file.
    """
    target = bundle / layout.EVALUATION_DATA
    problems = _TaskFiles(target / "tasks", copy).write(facts, results)
    for number, pattern in enumerate(facts.setting("val_data") or [], start=1):
        folder = target / "validation" / f"{number:02}"
        try:
            _copy_validation_set(pattern, folder, redactor)
        except UserError as error:
            shutil.rmtree(folder, ignore_errors=True)
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


class _TaskFiles:
    """Copies the data of tasks into one folder: equal files once, and different files of one name under two names."""

    def __init__(self, folder: Path, copy: Callable[[str, Path], Any]) -> None:
        self._folder, self._copy = folder, copy
        self._index: list[dict[str, str]] = []

    def write(self, facts: RunFacts, results: Sequence[Path]) -> list[str]:
        """Copy the tasks of the run and of separate evaluations; return what could not be copied."""
        problems = self._add_run(facts)
        for result in results:
            problems += self._add_evaluation(result)
        if self._index:
            _write_json(self._folder / "tasks.json", self._index)
        return problems

    def _add_run(self, facts: RunFacts) -> list[str]:
        from open_lm.evaluate.icl.tasks import read_settings

        files = facts.setting("icl_yaml") or []
        if not files:
            return []
        try:
            folder = facts.setting("icl_data_dir")
            settings = read_settings(files, folder, yaml_flag="--icl-yaml", data_flag="--icl-data-dir")
        except UserError as error:
            return [f"tasks of {', '.join(files)}: {error}"]
        self._add_settings(files)
        problems = [self._add("the run", task.label, task.data, None) for task in settings.tasks]
        return list(filter(None, problems))

    def _add_evaluation(self, result: Path) -> list[str]:
        name = f"evals/{result.name}"
        try:
            content = json.loads(storage.read_text(result))
        except ValueError as error:
            raise DataError(f"{result}: not JSON ({error}); restore the file, or remove it") from error
        records = content.get("task_data") if isinstance(content, dict) else None
        if not isinstance(records, list):
            return [
                f"the data of {name}, which does not record them: those of lm-eval are on the hub; evaluate the "
                "checkpoint again if the results are of an earlier version"
            ]
        self._add_settings([file for file in content.get("eval_yaml") or () if _exists(file)])
        problems = [self._add(name, item["task"], item["data"], item["sha256"]) for item in records]
        return list(filter(None, problems))

    def _add_settings(self, files: Sequence[str]) -> None:
        for file in files:
            target = self._folder / Path(file).name
            if not target.exists():
                self._copy(file, target)

    def _add(self, origin: str, label: str, location: str, expected: str | None) -> str | None:
        """Copy the data of a task; return the reason if that is not possible."""
        if location.startswith("hf://"):
            return f"task {label} of {origin}: its data are on the hub, {location}"
        try:
            content = storage.read_bytes(location)
        except UserError as error:
            return f"task {label} of {origin}: {error}"
        sha256 = hashlib.sha256(content).hexdigest()
        if expected not in (None, sha256):
            return f"task {label} of {origin}: {location} is not the file that was evaluated; its SHA-256 differs"
        target = self._folder / Path(location).name
        if target.exists() and sha256_of(target) != sha256:
            target = target.with_name(f"{sha256[:12]}_{target.name}")
        if not target.exists():
            storage.write_bytes(target, content)
        self._index.append({"task": label, "evaluation": origin, "file": target.name, "sha256": sha256})
        return None


def _write_json(path: Path, value: Any) -> None:
    storage.write_text(path, to_json(value, indent=2, ensure_ascii=False) + "\n")
