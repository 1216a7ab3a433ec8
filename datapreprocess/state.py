"""Check the output and work folders before a run: empty, finished, resumable or in conflict with the job."""

from __future__ import annotations

import getpass
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from open_lm import storage
from open_lm.data.shard_format import DATASET_NAME, MANIFEST_NAME
from open_lm.datapreprocess.job import SPECIAL_TOKENS, Layout, PreprocessJob, input_records, work_folder_name
from open_lm.datapreprocess.readers.base import UNREADABLE
from open_lm.datapreprocess.units import UnitReport, UnitTask, load_report
from open_lm.datapreprocess.writer import read_dataset, read_record, write_record
from open_lm.errors import ConfigError
from open_lm.system.names import unescape
from open_lm.tokenizer import COPY_FOLDER, FILE_NAMES

_logger = logging.getLogger(__name__)
PLAN_NAME = "plan.json"
_METADATA_FILES = (MANIFEST_NAME, DATASET_NAME, *(f"{COPY_FOLDER}/{name}" for name in FILE_NAMES))
_FALLBACK_MARKER = "reference-tokenizer"
_SHARD_ORIGIN = "shards-of"  # file with a digest of the reports from which the shards were written
_FORMER_SPECIAL_TOKENS = "ids"  # of records without this setting, and of tokenizers that find no special tokens
_UNIT_FILE = re.compile(r"unit-(\d+)-([0-9a-f]+)-(\d+)\.(json|rejects)")


def finished_dataset(job: PreprocessJob, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the dataset.json of a finished output, or None if the output is not finished.

    Raise ConfigError if the output was created from other inputs or with other settings, or if shards are missing.
    """
    record = read_dataset(job.layout)
    if record is None:
        return None
    changes = differences(record.get("settings", {}), settings)
    changes += changed_inputs(record.get("inputs", []), input_records(job.inputs))
    if changes:
        raise ConfigError(
            f"{job.layout.root}: contains a finished data set with other settings or inputs: {'; '.join(changes)}. "
            "Choose another output folder, or remove this one to recreate the data set"
        )
    expected, existing = record["counts"]["shards"], len(_shards_in(job.layout, settings["folders"]))
    if existing < expected:
        raise ConfigError(
            f"{job.layout.root}: contains a finished data set of {expected} shards, but only {existing} of them exist; "
            "restore the others, or remove the folder to recreate the data set"
        )
    return record


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe the differences between the settings of two runs; tokenizers are compared by fingerprint, not path."""
    before, now = old.get("version"), new.get("version")
    old, new = ({SPECIAL_TOKENS: _FORMER_SPECIAL_TOKENS, **settings} for settings in (old, new))
    special = (
        f"{SPECIAL_TOKENS} was {old[SPECIAL_TOKENS]!r}, is now {new[SPECIAL_TOKENS]!r} "
        "(--allow-special-tokens-in-text selects 'ids')"
    )
    versions = f"it was started by version {before} of the preprocessor; this is version {now} and writes other shards"
    return (
        [versions] * (before != now)
        + [special] * (old[SPECIAL_TOKENS] != new[SPECIAL_TOKENS])
        + [
            f"{name} was {old.get(name)!r}, is now {new.get(name)!r}"
            for name in sorted({*old, *new} - {"tokenizer", "version", SPECIAL_TOKENS})
            if old.get(name) != new.get(name)
        ]
    )


def changed_inputs(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the differences between the inputs of two runs; only fields that both records have are compared."""
    before, now = ({item["url"]: item for item in items} for items in (old, new))
    changed = {
        url
        for url in now.keys() & before.keys()
        if any(before[url][key] != now[url][key] for key in before[url].keys() & now[url].keys())
    }
    changes = []
    added, removed = now.keys() - before.keys(), before.keys() - now.keys()
    for word, urls in (("new", added), ("removed", removed), ("changed", changed)):
        if urls:
            shown = ", ".join(sorted(urls)[:3]) + (f" and {len(urls) - 3} more" if len(urls) > 3 else "")
            changes.append(f"{word} input: {shown}")
    return changes


def work_folder(job: PreprocessJob) -> str:
    """Return the folder for intermediate files: in --work-dir, or in a local output, or in the temporary folder."""
    if job.work_dir:
        return storage.join(job.work_dir, work_folder_name(job.layout.root))
    if storage.is_remote(job.layout.root):
        return os.path.join(tempfile.gettempdir(), f"{work_folder_name(job.layout.root)}-{getpass.getuser()}")
    return storage.join(job.layout.root, ".work")


def open_work(job: PreprocessJob, settings: dict[str, Any]) -> str:
    """Prepare the work folder and return it: empty, or with the work of an interrupted run of the same job.

    If inputs have changed since then, their units are processed again. Raise ConfigError if the settings have changed
    and the job has no --restart, or if the output contains shards of unknown origin.
    """
    work = work_folder(job)
    path = storage.join(work, PLAN_NAME)
    inputs = [vars(item) for item in job.inputs]
    if storage.exists(path):
        old = read_record(path)
        changes = differences(old["settings"], settings)
        if changes and not job.restart:
            raise ConfigError(
                f"{work}: contains unfinished work with other settings: {'; '.join(changes)}. Use the previous "
                "settings and version to finish it, choose another output folder, or pass --restart to discard it"
            )
        input_changes = changed_inputs(old["inputs"], inputs)
        if changes:
            _logger.warning("restarting, discarding the unfinished work with other settings: %s", "; ".join(changes))
        elif input_changes:
            _logger.warning("the inputs have changed since the unfinished work; processing the affected units again: "
                            "%s", "; ".join(input_changes))  # fmt: skip
        else:
            _logger.info("resuming unfinished work in %s", work)
        if changes or input_changes:
            _remove_shards(job, work, old["settings"])
        _remove_temporary_files(job.layout, old["settings"])
        if changes:
            remove_work(work)
    else:
        _require_no_shards(job, settings["folders"])
        remove_work(work)  # a folder without a plan remains from an interrupted removal
    storage.makedirs(work)
    write_record(path, {"settings": settings, "inputs": inputs})
    return work


def _shards_in(layout: Layout, folders: Iterable[str]) -> list[str]:
    urls = [layout.folder(name) for name in folders]
    return [shard for url in urls for shard in storage.list_files(url) if shard.endswith(".tar")]


def _remove_shards(job: PreprocessJob, work: str, settings: Mapping[str, Any]) -> None:
    """Remove the shards of an earlier run, their metadata files and their records in the work folder."""
    metadata = [
        storage.join(job.layout.folder(folder), name) for folder in settings["folders"] for name in _METADATA_FILES
    ]
    for url in [*_shards_in(job.layout, settings["folders"]), *metadata]:
        storage.remove(url)
    _remove_files(work, "shard-")


def _remove_files(work: str, prefix: str) -> None:
    """Remove the files of the work folder whose names start with `prefix`."""
    for url in storage.list_files(work):
        if url.rpartition("/")[2].startswith(prefix):
            storage.remove(url)


def remove_stale_shards(
    job: PreprocessJob, work: str, settings: Mapping[str, Any], reports: Iterable[UnitReport]
) -> None:
    """Remove the shards of an earlier run if the reports have changed since, e.g. because a file became readable."""
    facts = [(r.index, r.number, r.documents, r.characters, r.tokens, r.tail, r.digests) for r in reports]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest().encode()
    path = storage.join(work, _SHARD_ORIGIN)
    if storage.exists(path):
        if storage.read_bytes(path) == digest:
            return
        _logger.warning("the units have other results than in the earlier run; writing all shards again")
        _remove_shards(job, work, settings)
    storage.write_bytes(path, digest)


def _remove_temporary_files(layout: Layout, settings: Mapping[str, Any]) -> None:
    """Remove the partially written files of a killed run from a local output."""
    folders = {layout.root, *map(layout.folder, settings["folders"])}
    for folder in [*folders, *(storage.join(folder, COPY_FOLDER) for folder in folders)]:
        if not storage.is_remote(folder) and os.path.isdir(folder):
            for name in filter(storage.is_temporary, os.listdir(folder)):
                storage.remove(storage.join(folder, name))


def _require_no_shards(job: PreprocessJob, folders: Iterable[str]) -> None:
    """Raise ConfigError if the output contains shards, since their origin is unknown."""
    shards = _shards_in(job.layout, folders)
    if shards:
        raise ConfigError(
            f"{shards[0]}{f' and {len(shards) - 1} more shards' if len(shards) > 1 else ''}: already in the output "
            "folder, but of unknown origin (found no dataset.json and no unfinished work). Choose another output "
            "folder, or remove them"
        )


def record_fallback(work: str) -> None:
    """Discard all units encoded with the fast tokenizer, and record that later runs must not use it."""
    _remove_files(work, "unit-")
    storage.write_bytes(storage.join(work, _FALLBACK_MARKER), b"")


def has_fallen_back(work: str) -> bool:
    """Return whether an earlier run of the same job found that the fast tokenizer differs from the reference."""
    return storage.exists(storage.join(work, _FALLBACK_MARKER))


def _unit_files(work: str, kind: str, tasks: Iterable[UnitTask] | None = None) -> list[tuple[int, int, str]]:
    """Return (unit, chunk, url) of the "json" or "rejects" files of these tasks, or of all, in input order.

    A single listing of the folder finds them all.
    """
    current = None if tasks is None else {(task.unit.index, task.digest) for task in tasks}
    files = []
    for url in storage.list_files(work):
        match = _UNIT_FILE.fullmatch(url.rpartition("/")[2])
        if match and match[4] == kind and (current is None or (int(match[1]), match[2]) in current):
            files.append((int(match[1]), int(match[3]), url))
    return sorted(files)


def load_reports(tasks: Iterable[UnitTask], work: str) -> dict[tuple[int, int], UnitReport]:
    """Return the reports of earlier runs by (unit, chunk)."""
    reports: dict[tuple[int, int], UnitReport] = {}
    for index, number, url in _unit_files(work, "json", tasks):
        report = load_report(url)
        if any(broken.kind == UNREADABLE for broken in report.broken):  # the file may have become readable
            storage.remove(f"{url.removesuffix('.json')}.rejects")
        else:
            reports[index, number] = report
    return reports


def finished_bytes(work: str) -> int:
    """Return the approximate number of input bytes that earlier runs have encoded."""
    return sum(load_report(url).num_bytes for _, _, url in _unit_files(work, "json"))


def collect_rejects(
    tasks: Iterable[UnitTask], work: str, target: str, line_bases: Mapping[tuple[str, int], int]
) -> None:
    """Concatenate the rejects of all units in input order into the file `target`; without rejects, remove the file.

    Line numbers are counted from the start of the file if `line_bases` has an entry for (url, start) of the piece.
    Otherwise they are counted from the start of the piece, and the record keeps its `start`.
    """
    files = _unit_files(work, "rejects", tasks)
    if not files:
        storage.remove(target)  # an earlier run may have written it before the inputs were fixed
        return
    with storage.atomic_write(target, "wb") as file:
        for _, _, url in files:
            for line in storage.read_lines(url):
                record = orjson.loads(line)
                base = 0 if record["start"] == 0 else line_bases.get((unescape(record["url"]), record["start"]))
                if base is not None:
                    record["line"] += base if record["line"] else 0
                    del record["start"]
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def remove_work(work: str) -> None:
    """Remove a work folder and its content."""
    if not storage.is_remote(work):
        shutil.rmtree(storage.local_path(work), ignore_errors=True)
        return
    for url in storage.list_files(work):
        storage.remove(url)


def remove_unstarted_work(work: str) -> None:
    """Remove the work folder of a run that failed before it finished a unit, since there is nothing to resume."""
    records = [url for url in storage.list_files(work) if url.endswith(".json")]
    if all(url.rpartition("/")[2] == PLAN_NAME for url in records):
        remove_work(work)
