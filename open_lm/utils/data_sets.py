"""Find data sets on disk: folders of shards with their manifests, and the dataset.json that several folders share."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from open_lm import storage
from open_lm.data.manifest import MANIFEST_NAME
from open_lm.data.shard_format import ManifestEntry, expand_shards, read_manifest, shard_folder, shard_stem
from open_lm.errors import DataError, UserError, join_problems

DATASET_NAME, REJECTS_NAME = "dataset.json", "rejects.jsonl"


@dataclass
class Folder:
    """A folder of shards: sizes in bytes by address (-1 unknown), and what its manifest says by shard stem.

    `part` says that only some of its shards were asked for.
    """

    url: str
    shards: dict[str, int] = field(default_factory=dict)
    part: bool = False
    entries: dict[str, ManifestEntry] | None = None
    fault: str = ""  # why the manifest that is there cannot be used
    has_rejects: bool = False

    def entry(self, shard: str) -> ManifestEntry | None:
        """The manifest's line of a shard, given by its address."""
        return (self.entries or {}).get(shard_stem(shard))

    @property
    def missing(self) -> list[str]:
        """Stems of shards that the manifest names and the folder lacks."""
        found = {shard_stem(url) for url in self.shards}
        return [] if self.part else [stem for stem in self.entries or {} if stem not in found]

    @property
    def unlisted(self) -> list[str]:
        """Addresses of shards that the manifest, if there is one, does not name."""
        return [] if self.entries is None else [url for url in self.shards if self.entry(url) is None]


@dataclass
class DataSet:
    """Folders that one run of the preprocessor made, and its record. `whole`: all of its shards were asked for."""

    root: str
    record: dict[str, Any]
    folders: list[Folder]
    whole: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The record's settings; empty where it has none."""
        return as_dict(self.record.get("settings"))

    @property
    def only_source(self) -> str | None:
        """The name of the one source that all tokens are of; None where there are several or none is named."""
        names = list(as_dict(self.record.get("sources")))
        return names[0] if len(names) == 1 else None


def as_dict(value: Any) -> dict[str, Any]:
    """A part of a record that should be an object; empty where it is not there or is something else."""
    return value if isinstance(value, dict) else {}


def find_folders(arguments: Sequence[str]) -> list[Folder]:
    """The folders of shards that folders (searched through), manifests and shard patterns stand for, sorted by address.

    DataError lists everything that names no shard.
    """
    folders: dict[str, Folder] = {}
    problems: list[str] = []
    for argument in arguments:
        try:
            for folder in _find(argument):
                known = folders.setdefault(folder.url, folder)
                known.shards |= folder.shards
                known.part &= folder.part
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise DataError(join_problems(problems, "There is no data set to look at"))
    for folder in folders.values():
        folder.shards = dict(sorted(folder.shards.items()))
    return [folders[url] for url in sorted(folders)]


def _find(argument: str) -> list[Folder]:
    if argument.endswith(".jsonl"):
        if storage.info(argument) is None:
            raise DataError(f"{argument}: no such manifest")
        return folders_in(shard_folder(argument), recursive=False)
    if not (re.search(r"[*?\[{]", argument) or "::" in argument or argument.endswith(".tar")):
        found = folders_in(argument, recursive=True)
        if not found:
            raise DataError(f"{argument}: neither .tar files nor a {MANIFEST_NAME} in this folder or below; "
                            "give a folder of shards or a pattern such as FOLDER/*.tar")  # fmt: skip
        return found
    wanted: dict[str, list[str]] = {}
    for url in expand_shards(argument):
        wanted.setdefault(shard_folder(url), []).append(url)
    folders = []
    for url, shards in wanted.items():
        folder = next(iter(folders_in(url, recursive=False)), Folder(url))
        if absent := [shard for shard in shards if shard not in folder.shards]:
            raise DataError(join_problems([f"{shard}: no such shard" for shard in absent]))
        folder.part = len(set(shards)) < len(folder.shards)
        folder.shards = {shard: folder.shards[shard] for shard in shards}
        folders.append(folder)
    return folders


def folders_in(root: str, recursive: bool) -> list[Folder]:
    """The folders with shards or a manifest: `root` itself and, where asked for, all below it."""
    folders: dict[str, Folder] = {}
    for info in storage.list_infos(root, recursive=recursive):
        url, name = shard_folder(info.url), info.url.rpartition("/")[2]
        if not name.endswith(".tar") and name not in (MANIFEST_NAME, REJECTS_NAME):
            continue
        folder = folders.setdefault(url, Folder(url))
        if name == MANIFEST_NAME:
            try:
                folder.entries = {entry.shard: entry for entry in read_manifest(info.url)}
            except DataError as error:
                folder.fault = str(error)
        elif name == REJECTS_NAME:
            folder.has_rejects = True
        else:
            folder.shards[info.url] = info.size
    return [folder for folder in folders.values() if folder.shards or folder.entries is not None or folder.fault]


def find_data_sets(folders: Sequence[Folder]) -> tuple[list[DataSet], list[str]]:
    """The data sets that folders belong to, and what is wrong with records that cannot be read.

    A run leaves the same dataset.json in each of its folders, or one above those that its settings name.
    """
    found: dict[tuple[str, bytes], DataSet] = {}
    problems: list[str] = []
    files: dict[str, bytes | None] = {}
    records: dict[bytes, dict[str, Any]] = {}
    for folder in folders:
        own = _absolute(folder.url)
        for place in (own, shard_folder(own)):
            url = storage.join(place, DATASET_NAME)
            if url not in files:
                files[url] = _read_record(url, records, problems)
            data = files[url]
            if data is None:
                continue
            root = _root(own, _names(records[data]))
            if place in (own, root):
                found.setdefault((root, data), DataSet(root, records[data], [], True)).folders.append(folder)
                break
    for data_set in found.values():
        data_set.whole = _is_whole(data_set)
    return list(found.values()), problems


def _read_record(url: str, records: dict[bytes, dict[str, Any]], problems: list[str]) -> bytes | None:
    """The bytes of a dataset.json, which `records` then explains; None where there is none or it cannot be read."""
    if storage.info(url) is None:
        return None
    data = storage.read_bytes(url)
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        problems.append(f"{url}: not JSON ({error}); the preprocessor writes it anew where it is removed")
        return None
    if not isinstance(record, dict):
        problems.append(f"{url}: expected an object, found {type(record).__name__}")
        return None
    records[data] = record
    return data


def _absolute(url: str) -> str:
    return url if storage.is_remote(url) else os.path.abspath(storage.local_path(url))


def _names(record: dict[str, Any]) -> list[str]:
    """The folders of a data set below its root; the root itself is ""."""
    names = as_dict(record.get("settings")).get("folders")
    return [str(name).strip("/") for name in names] if isinstance(names, list) and names else [""]


def _root(folder: str, names: Sequence[str]) -> str:
    """The folder that `folder` is one of `names` in."""
    name = max((name for name in names if name and folder.endswith(f"/{name}")), key=len, default="")
    return folder[: -len(name) - 1] if name else folder


def _is_whole(data_set: DataSet) -> bool:
    """Whether all shards of a data set were asked for."""
    shown = {_absolute(folder.url) for folder in data_set.folders}
    wanted = {storage.join(data_set.root, name) if name else data_set.root for name in _names(data_set.record)}
    return (
        not any(folder.part for folder in data_set.folders)
        and shown <= wanted
        and not any(url.endswith(".tar") for folder in wanted - shown for url in storage.list_files(folder))
    )
