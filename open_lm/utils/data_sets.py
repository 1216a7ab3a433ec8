"""Find data sets: folders of shards with their manifests, and the dataset.json that several folders may share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from open_lm import storage
from open_lm.data.manifest import DATASET_NAME, MANIFEST_NAME, REJECTS_NAME
from open_lm.data.shard_format import ManifestEntry, expand_shards, read_manifest, shard_folder, shard_stem
from open_lm.errors import DataError, UserError, join_problems
from open_lm.system.names import is_pattern

if TYPE_CHECKING:
    from open_lm.tokenizer import Tokenizer


@dataclass
class Folder:
    """A folder of shards.

    Attributes:
        url: the folder.
        shards: size in bytes by URL of the shard; -1 if unknown.
        partial: whether only some of its shards were selected.
        entries: manifest lines by shard stem; None without a usable manifest.
        fault: why the existing manifest cannot be used.
        has_rejects: whether the folder contains rejects.jsonl.
    """

    url: str
    shards: dict[str, int] = field(default_factory=dict)
    partial: bool = False
    entries: dict[str, ManifestEntry] | None = None
    fault: str = ""
    has_rejects: bool = False

    def entry(self, shard: str) -> ManifestEntry | None:
        """Return the manifest line of a shard, given its URL."""
        return (self.entries or {}).get(shard_stem(shard))

    @property
    def missing(self) -> list[str]:
        """The stems of shards that the manifest lists but the folder lacks."""
        stems = {shard_stem(url) for url in self.shards}
        return [] if self.partial else [stem for stem in self.entries or {} if stem not in stems]

    @property
    def unlisted(self) -> list[str]:
        """The URLs of shards that the manifest does not list; empty without a manifest."""
        return [] if self.entries is None else [url for url in self.shards if self.entry(url) is None]


@dataclass
class DataSet:
    """The folders that one run of the preprocessor wrote, and its dataset.json.

    Attributes:
        root: the common folder.
        record: the content of dataset.json.
        folders: the folders of shards.
        complete: whether all of its shards were selected.
    """

    root: str
    record: dict[str, Any]
    folders: list[Folder]
    complete: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The record's settings; empty if it has none."""
        return as_dict(self.record.get("settings"))

    @property
    def single_source(self) -> str | None:
        """The name of the only source of the data set; None if it has several or unnamed ones."""
        names = list(as_dict(self.record.get("sources")))
        return names[0] if len(names) == 1 else None


def as_dict(value: Any) -> dict[str, Any]:
    """Return `value` if it is a dict, else an empty dict."""
    return value if isinstance(value, dict) else {}


def find_folders(arguments: Sequence[str]) -> list[Folder]:
    """Return the folders of shards for folders (searched recursively), manifests and shard patterns, sorted by URL.

    Raises:
        DataError: lists all arguments without a shard.
    """
    folders: dict[str, Folder] = {}
    problems: list[str] = []
    for argument in arguments:
        try:
            for folder in _find(argument):
                known = folders.setdefault(folder.url, folder)
                known.shards |= folder.shards
                known.partial &= folder.partial
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise DataError(join_problems(problems, "No data set found"))
    for folder in folders.values():
        folder.shards = dict(sorted(folder.shards.items()))
    return [folders[url] for url in sorted(folders)]


def _find(argument: str) -> list[Folder]:
    if argument.endswith(".jsonl"):
        if storage.info(argument) is None:
            raise DataError(f"{argument}: no such manifest")
        return folders_in(shard_folder(argument), recursive=False)
    is_folder = os.path.isdir(storage.local_path(argument))
    if is_folder or not (is_pattern(argument) or "::" in argument or argument.endswith(".tar")):
        folders = folders_in(argument, recursive=True)
        if not folders:
            raise DataError(f"{argument}: neither .tar files nor a {MANIFEST_NAME} in this folder or below; "
                            "pass a folder of shards or a pattern such as FOLDER/*.tar")  # fmt: skip
        return folders
    selected: dict[str, list[str]] = {}
    for url in expand_shards(argument):
        selected.setdefault(shard_folder(url), []).append(url)
    folders = []
    for url, shards in selected.items():
        folder = next(iter(folders_in(url, recursive=False)), Folder(url))
        if missing := [shard for shard in shards if shard not in folder.shards]:
            raise DataError(join_problems([f"{shard}: no such shard" for shard in missing]))
        folder.partial = len(set(shards)) < len(folder.shards)
        folder.shards = {shard: folder.shards[shard] for shard in shards}
        folders.append(folder)
    return folders


def folders_in(root: str, recursive: bool) -> list[Folder]:
    """Return the folders with shards or a manifest: `root` and, if `recursive`, all folders below it."""
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
    """Return the data sets that folders belong to, and the problems of unreadable dataset.json files.

    A preprocessing run writes the same dataset.json into each of its folders, or one into their parent folder.
    """
    data_sets: dict[tuple[str, bytes], DataSet] = {}
    problems: list[str] = []
    files: dict[str, bytes | None] = {}
    records: dict[bytes, dict[str, Any]] = {}
    for folder in folders:
        folder_url = _absolute(folder.url)
        for parent in (folder_url, shard_folder(folder_url)):
            url = storage.join(parent, DATASET_NAME)
            if url not in files:
                files[url] = _read_record(url, records, problems)
            data = files[url]
            if data is None:
                continue
            root = _root(folder_url, _folder_names(records[data]))
            if parent in (folder_url, root):
                data_sets.setdefault((root, data), DataSet(root, records[data], [], True)).folders.append(folder)
                break
    for data_set in data_sets.values():
        data_set.complete = _is_complete(data_set)
    return list(data_sets.values()), problems


def copied_tokenizer(data_sets: Sequence[DataSet]) -> Tokenizer | None:
    """Return the copy of the tokenizer next to the shards; None if there is none, or the data sets have several."""
    from open_lm.data.tokenizer_copies import find_copies

    fingerprints = {data_set.settings.get("tokenizer_fingerprint") for data_set in data_sets}
    if len(fingerprints) != 1:
        return None
    folders = [folder.url for data_set in data_sets for folder in data_set.folders]
    return next(iter(find_copies(folders, map(str, fingerprints)).values()), None)


def _read_record(url: str, records: dict[bytes, dict[str, Any]], problems: list[str]) -> bytes | None:
    """Return the bytes of a dataset.json and add its content to `records`; None if it is missing or unreadable."""
    if storage.info(url) is None:
        return None
    data = storage.read_bytes(url)
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        problems.append(f"{url}: not JSON ({error}); delete it and rerun the preprocessor to recreate it")
        return None
    if not isinstance(record, dict):
        problems.append(f"{url}: expected an object, found {type(record).__name__}")
        return None
    records[data] = record
    return data


def _absolute(url: str) -> str:
    return url if storage.is_remote(url) else os.path.abspath(storage.local_path(url))


def _folder_names(record: dict[str, Any]) -> list[str]:
    """Return the folders of a data set relative to its root; "" is the root itself."""
    names = as_dict(record.get("settings")).get("folders")
    return [str(name).strip("/") for name in names] if isinstance(names, list) and names else [""]


def _root(folder: str, names: Sequence[str]) -> str:
    """Return the folder that contains `folder` under one of `names`."""
    name = max((name for name in names if name and folder.endswith(f"/{name}")), key=len, default="")
    return folder[: -len(name) - 1] if name else folder


def _is_complete(data_set: DataSet) -> bool:
    """Return whether all shards of a data set were selected."""
    selected = {_absolute(folder.url) for folder in data_set.folders}
    recorded = {storage.join(data_set.root, name) if name else data_set.root for name in _folder_names(data_set.record)}
    return (
        not any(folder.partial for folder in data_set.folders)
        and selected <= recorded
        and not any(url.endswith(".tar") for folder in recorded - selected for url in storage.list_files(folder))
    )
