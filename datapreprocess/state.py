"""What lies at the output and in the work folder before a run: nothing, something to go on with, or a conflict."""

from __future__ import annotations

import getpass
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import orjson

from open_lm import storage
from open_lm.datapreprocess.job import Job, work_name
from open_lm.datapreprocess.writer import read_dataset
from open_lm.errors import ConfigError

_logger = logging.getLogger(__name__)
_PLAN = "plan.json"


def finished_dataset(job: Job, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an output that is there already, None where it is still to be made.

    ConfigError where what is there was made from other inputs or with other settings.
    """
    record = read_dataset(job.layout)
    if record is None:
        return None
    changes = differences(record.get("settings", {}), settings, record.get("inputs", []), job.input_records())
    if changes:
        raise ConfigError(
            f"{job.layout.folder(0)} holds a finished data set made otherwise: {'; '.join(changes)}. "
            "Choose another output folder, or remove this one to make it again"
        )
    return record


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], old_inputs: list[dict[str, Any]], new_inputs: list[dict[str, Any]]
) -> list[str]:
    """What differs between two runs, in words."""
    changes = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    before, now = ({item["url"]: item for item in items} for items in (old_inputs, new_inputs))
    for word, urls in (
        ("new", now.keys() - before.keys()),
        ("gone", before.keys() - now.keys()),
        ("changed", {url for url in now.keys() & before.keys() if now[url] != before[url]}),
    ):
        if urls:
            shown = ", ".join(sorted(urls)[:3]) + (f" and {len(urls) - 3} more" if len(urls) > 3 else "")
            changes.append(f"{word} input: {shown}")
    return changes


def work_folder(job: Job) -> str:
    """Where intermediate files go: as asked for, else in a local output, else among this machine's temporary files."""
    if job.work_dir:
        return storage.join(job.work_dir, work_name(job.layout.root))
    if storage.is_remote(job.layout.root):
        return os.path.join(tempfile.gettempdir(), f"{work_name(job.layout.root)}-{getpass.getuser()}")
    return storage.join(job.layout.root, ".work")


def open_work(job: Job, settings: dict[str, Any]) -> str:
    """The work folder, ready: with what an interrupted run of the same job left, or empty.

    Work for another job is named and thrown away. ConfigError where shards of unknown origin lie at the output.
    """
    work = work_folder(job)
    path = storage.join(work, _PLAN)
    inputs = [asdict(item) for item in job.inputs]
    if storage.exists(path):
        old = orjson.loads(storage.read_bytes(path))
        changes = differences(old["settings"], settings, old["inputs"], inputs)
        if not changes:
            _logger.info("going on with unfinished work in %s", work)
            return work
        _logger.warning("starting again: the unfinished work in %s is of another run (%s)", work, "; ".join(changes))
        _remove_shards(job, old["settings"]["folders"])
        remove_work(work)
    else:
        _refuse_foreign_shards(job)
    storage.makedirs(work)
    storage.write_bytes(path, orjson.dumps({"settings": settings, "inputs": inputs}))
    return work


def _shards_at(job: Job, folders: list[str]) -> list[str]:
    places = [storage.join(job.layout.root, name) if name else job.layout.root for name in folders]
    return [url for place in places for url in storage.list_files(place) if url.endswith(".tar")]


def _remove_shards(job: Job, folders: list[str]) -> None:
    for url in _shards_at(job, folders):
        storage.remove(url)


def _refuse_foreign_shards(job: Job) -> None:
    shards = _shards_at(job, list(job.layout.folders))
    if shards:
        raise ConfigError(
            f"{shards[0]}{f' and {len(shards) - 1} more shards' if len(shards) > 1 else ''}: already there, but "
            "nothing tells how they were made (no dataset.json, no unfinished work). Choose another output folder, "
            "or remove them"
        )


def remove_work(work: str) -> None:
    """Remove a work folder and all that is in it."""
    if not storage.is_remote(work):
        shutil.rmtree(storage.local_path(work), ignore_errors=True)
        return
    for url in storage.list_files(work):
        storage.remove(url)


def remove_idle_work(work: str) -> None:
    """Remove the work folder of a run that failed before anything was finished: there is nothing to go on with."""
    records = [url for url in storage.list_files(work) if url.endswith(".json")]
    if all(url.rpartition("/")[2] == _PLAN for url in records):
        remove_work(work)
