"""What lies at the output and in the work folder before a run: nothing, something to go on with, or a conflict."""

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
from open_lm.datapreprocess.job import Layout, PreprocessJob, input_records, work_folder_name
from open_lm.datapreprocess.units import UnitReport, UnitTask, load_report
from open_lm.datapreprocess.writer import DATASET, MANIFEST, read_dataset, read_record
from open_lm.errors import ConfigError

_logger = logging.getLogger(__name__)
_PLAN = "plan.json"
UNREADABLE = "unreadable"  # the kind of a file that storage could not read
_BESIDE = (MANIFEST, DATASET)  # the shards
_FALLBACK = "reference-tokenizer"
_SHARDS_OF = "shards-of"  # the file that tells what the shards were written from
_REPORT = re.compile(r"unit-(\d+)-([0-9a-f]+)-(\d+)\.json")
_REJECTS = re.compile(r"unit-(\d+)-([0-9a-f]+)-(\d+)\.rejects")


def finished_dataset(job: PreprocessJob, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an output that is there already, None where it is still to be made.

    ConfigError where what is there was made from other inputs or with other settings.
    """
    record = read_dataset(job.layout)
    if record is None:
        return None
    changes = differences(record.get("settings", {}), settings)
    changes += changed_inputs(record.get("inputs", []), input_records(job.inputs))
    if changes:
        raise ConfigError(
            f"{job.layout.root} holds a finished data set made otherwise: {'; '.join(changes)}. "
            "Choose another output folder, or remove this one to make it again"
        )
    shards, there = record["counts"]["shards"], len(_shards_in(job.layout, settings["folders"]))
    if there < shards:
        raise ConfigError(
            f"{job.layout.root} holds a finished data set of {shards} shards, of which only {there} are there; restore "
            "the others, or remove the folder to make it again"
        )
    return record


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of two runs, in words; a tokenizer is its fingerprint, wherever it lies."""
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted({*old, *new} - {"tokenizer"})
        if old.get(name) != new.get(name)
    ]


def changed_inputs(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between the inputs of two runs, in words; only what both records know is compared."""
    before, now = ({item["url"]: item for item in items} for items in (old, new))
    changed = {
        url
        for url in now.keys() & before.keys()
        if any(before[url][key] != now[url][key] for key in before[url].keys() & now[url].keys())
    }
    changes = []
    for word, urls in (("new", now.keys() - before.keys()), ("gone", before.keys() - now.keys()), ("changed", changed)):
        if urls:
            shown = ", ".join(sorted(urls)[:3]) + (f" and {len(urls) - 3} more" if len(urls) > 3 else "")
            changes.append(f"{word} input: {shown}")
    return changes


def work_folder(job: PreprocessJob) -> str:
    """Where intermediate files go: as asked for, else in a local output, else among this machine's temporary files."""
    if job.work_dir:
        return storage.join(job.work_dir, work_folder_name(job.layout.root))
    if storage.is_remote(job.layout.root):
        return os.path.join(tempfile.gettempdir(), f"{work_folder_name(job.layout.root)}-{getpass.getuser()}")
    return storage.join(job.layout.root, ".work")


def open_work(job: PreprocessJob, settings: dict[str, Any]) -> str:
    """The work folder, ready: with what an interrupted run of the same job left, or empty.

    Inputs may have changed since: the units of work that they touch are done again. Other settings are a ConfigError,
    unless the job says to start again; so are shards of unknown origin at the output.
    """
    work = work_folder(job)
    path = storage.join(work, _PLAN)
    inputs = [vars(item) for item in job.inputs]
    if storage.exists(path):
        old = read_record(path)
        changes = differences(old["settings"], settings)
        if changes and not job.restart:
            raise ConfigError(
                f"{work} holds unfinished work with other settings: {'; '.join(changes)}. Use the settings of then to "
                "finish it, choose another output, or give --restart to throw it away"
            )
        touched = changed_inputs(old["inputs"], inputs)
        if changes:
            _logger.warning("starting again, the unfinished work is thrown away (%s)", "; ".join(changes))
        elif touched:
            _logger.warning("the inputs are not those of the unfinished work, what they touch is done again: %s",
                            "; ".join(touched))  # fmt: skip
        else:
            _logger.info("going on with unfinished work in %s", work)
        if changes or touched:
            _remove_shards(job, work, old["settings"])
        _remove_torn(job.layout, old["settings"])
        if changes:
            remove_work(work)
    else:
        _refuse_foreign_shards(job, settings["folders"])
        remove_work(work)  # without a plan nothing tells what it belongs to: a removal that was interrupted
    storage.makedirs(work)
    storage.write_bytes(path, orjson.dumps({"settings": settings, "inputs": inputs}))
    return work


def _shards_in(layout: Layout, folders: Iterable[str]) -> list[str]:
    places = [layout.folder(name) for name in folders]
    return [url for place in places for url in storage.list_files(place) if url.endswith(".tar")]


def _remove_shards(job: PreprocessJob, work: str, settings: Mapping[str, Any]) -> None:
    """Shards of a run that is not gone on with, what lies beside them, and their records."""
    beside = [storage.join(job.layout.folder(folder), name) for folder in settings["folders"] for name in _BESIDE]
    for url in [*_shards_in(job.layout, settings["folders"]), *beside]:
        storage.remove(url)
    for url in storage.list_files(work):
        if url.rpartition("/")[2].startswith("shard-"):
            storage.remove(url)


def remove_stale_shards(
    job: PreprocessJob, work: str, settings: Mapping[str, Any], reports: Iterable[UnitReport]
) -> None:
    """Remove the shards of an earlier start if its units came to something else: a file is readable again, say."""
    facts = [(r.index, r.number, r.documents, r.characters, r.tokens, r.tail, r.digests) for r in reports]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest().encode()
    path = storage.join(work, _SHARDS_OF)
    if storage.exists(path):
        if storage.read_bytes(path) == digest:
            return
        _logger.warning("the units came to something else than at an earlier start: its shards are written again")
        _remove_shards(job, work, settings)
    storage.write_bytes(path, digest)


def _remove_torn(layout: Layout, settings: Mapping[str, Any]) -> None:
    """What a run that was killed had begun to write in a local output."""
    for folder in {layout.root, *map(layout.folder, settings["folders"])}:
        if not storage.is_remote(folder) and os.path.isdir(folder):
            for name in filter(storage.is_temporary, os.listdir(folder)):
                storage.remove(storage.join(folder, name))


def _refuse_foreign_shards(job: PreprocessJob, folders: Iterable[str]) -> None:
    shards = _shards_in(job.layout, folders)
    if shards:
        raise ConfigError(
            f"{shards[0]}{f' and {len(shards) - 1} more shards' if len(shards) > 1 else ''}: already there, but "
            "nothing tells how they were made (no dataset.json, no unfinished work). Choose another output folder, "
            "or remove them"
        )


def record_fallback(work: str) -> None:
    """Throw away what was encoded with the fast tokenizer, and keep for later starts that it is not to be used."""
    for url in storage.list_files(work):
        if url.rpartition("/")[2].startswith("unit-"):
            storage.remove(url)
    storage.write_bytes(storage.join(work, _FALLBACK), b"")


def has_fallen_back(work: str) -> bool:
    """Whether an earlier start of the same run found that the fast tokenizer is not to be used."""
    return storage.exists(storage.join(work, _FALLBACK))


def load_reports(tasks: Iterable[UnitTask], work: str) -> dict[tuple[int, int], UnitReport]:
    """What earlier starts finished, by unit and stretch; a listing of the folder tells which files there are."""
    wanted = {(task.unit.index, task.digest) for task in tasks}
    reports: dict[tuple[int, int], UnitReport] = {}
    for url in storage.list_files(work):
        match = _REPORT.fullmatch(url.rpartition("/")[2])
        if match and (int(match[1]), match[2]) in wanted:
            report = load_report(url)
            if any(broken.kind == UNREADABLE for broken in report.broken):  # it may be readable by now
                storage.remove(f"{url.removesuffix('.json')}.rejects")
            else:
                reports[int(match[1]), int(match[3])] = report
    return reports


def finished_bytes(work: str) -> int:
    """About how much of the input earlier starts have encoded."""
    urls = [url for url in storage.list_files(work) if _REPORT.fullmatch(url.rpartition("/")[2])]
    return sum(load_report(url).num_bytes for url in urls)


def collect_rejects(
    tasks: Iterable[UnitTask], work: str, target: str, line_bases: Mapping[tuple[str, int], int]
) -> None:
    """Join what the units rejected in one file, in the order of the input; no file where there is nothing.

    Lines of a file that was cut are counted from the beginning of the file, where `line_bases` (url, start) knows it;
    elsewhere `start` tells from where.
    """
    wanted = {(task.unit.index, task.digest) for task in tasks}
    found = [(match, url) for url in storage.list_files(work) if (match := _REJECTS.fullmatch(url.rpartition("/")[2]))]
    urls = sorted(url for match, url in found if (int(match[1]), match[2]) in wanted)
    if not urls:
        storage.remove(target)  # of an earlier start, with inputs that were mended since
        return
    with storage.atomic_write(target, "wb") as file:
        for url in urls:
            for line in storage.read_bytes(url).splitlines():
                record = orjson.loads(line)
                base = 0 if record["start"] == 0 else line_bases.get((record["url"], record["start"]))
                if base is not None:
                    record["line"] += base if record["line"] else 0
                    del record["start"]
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def remove_work(work: str) -> None:
    """Remove a work folder and all that is in it."""
    if not storage.is_remote(work):
        shutil.rmtree(storage.local_path(work), ignore_errors=True)
        return
    for url in storage.list_files(work):
        storage.remove(url)


def remove_unstarted_work(work: str) -> None:
    """Remove the work folder of a run that failed before anything was finished: there is nothing to go on with."""
    records = [url for url in storage.list_files(work) if url.endswith(".json")]
    if all(url.rpartition("/")[2] == _PLAN for url in records):
        remove_work(work)
