"""Hugging Face data sets as inputs: folders made by `save_to_disk`, and data sets named on the hub.

Both resolve to files, which the readers of this package read like any other file; the `datasets` library only lists
them. A slice such as `train[:10%]` resolves to complete files, and to row ranges of its first and last file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import orjson

from open_lm import storage
from open_lm.datapreprocess.readers.pieces import count_rows, stores_row_count
from open_lm.datapreprocess.readers.registry import formats, is_supported
from open_lm.errors import ConfigError, DataError, StorageError, missing_package
from open_lm.storage import FileInfo
from open_lm.system.names import exists, is_glob

HUB_PREFIX = "hf-dataset://"
_QUERY_KEYS = ("split", "config", "revision")
_LISTING_THREADS = 16
_ABSOLUTE_SLICE = re.compile(r"\w+\[(\d+)?:(\d+)\]")


def expand_folder(url: str) -> list[FileInfo] | None:
    """Return the files of a Hugging Face data set, or None if `url` does not name one.

        FOLDER, FOLDER?split=NAME        made by `save_to_disk`; all splits of a DatasetDict, or the named one
        hf-dataset://NAME?split=SPLIT&config=CONFIG&revision=REVISION
                                         as `load_dataset` finds it: on the hub, or a local folder of data files

    SPLIT may be a slice in the syntax of `datasets` (`train[:10%]`, `train[1000:2000]`, `train+test`), with the same
    rounding. A slice needs the row counts of the files before its end; counting JSON lines reads the files once.
    """
    path, query = _split_query(url)
    if url.startswith(HUB_PREFIX):
        files, counts = _hub_files(url, path.removeprefix(HUB_PREFIX), query)
    elif not query and is_glob(url):
        return None
    elif saved := _saved_files(path):
        files, counts = saved, {}
    else:
        return None
    split_spec = query.get("split")
    names = list(files) if split_spec is None else split_spec.split("+")
    if all(name in files for name in names):
        return [info for name in names for info in files[name]]
    return _slice(url, str(split_spec), files, counts)


def _split_query(url: str) -> tuple[str, dict[str, str]]:
    path, mark, text = url.partition("?")
    pairs = [part.partition("=") for part in text.split("&")] if "=" in text else []
    query = {key: value for key, _, value in pairs}
    if not mark or (not url.startswith(HUB_PREFIX) and ("split" not in query or exists(url))):
        return url, {}
    supported = _QUERY_KEYS if url.startswith(HUB_PREFIX) else ("split",)
    unknown = sorted(set(query) - set(supported))
    if unknown:
        raise ConfigError(f"{url}: unknown option {', '.join(unknown)}; supported here: {', '.join(supported)}")
    return path, query


# --- save_to_disk ------------------------------------------------------------------------------------------------


def _saved_files(folder: str) -> dict[str, list[FileInfo]]:
    """Return the files of each split of a saved folder, in order; empty if the folder is not a saved data set."""
    splits = _read_json(storage.join(folder, "dataset_dict.json"))
    if splits is not None:
        names = splits.get("splits") or []
        saved_splits = {name: _saved_split(storage.join(folder, name)) for name in names}
        missing = [name for name, saved in saved_splits.items() if saved is None]
        if missing or not saved_splits:
            raise DataError(f"{folder}: state.json is missing in {', '.join(missing) or 'every split'}; save it again")
        return {name: saved[1] for name, saved in saved_splits.items() if saved}
    saved = _saved_split(folder)
    return {saved[0]: saved[1]} if saved else {}


def _saved_split(folder: str) -> tuple[str, list[FileInfo]] | None:
    """Return the name and the files of one saved split."""
    state = _read_json(storage.join(folder, "state.json"))
    if state is None or "_data_files" not in state:
        return None
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: saved with an index of rows; call flatten_indices() and save it again")
    infos = [storage.info(storage.join(folder, entry["filename"])) for entry in state["_data_files"]]
    if None in infos:
        missing = state["_data_files"][infos.index(None)]["filename"]
        raise DataError(f"{folder}: state.json lists {missing}, which does not exist; copy or save it again")
    return state.get("_split") or "train", [info for info in infos if info]


def _read_json(url: str) -> dict[str, Any] | None:
    if storage.info(url) is None:
        return None
    try:
        value = orjson.loads(storage.read_bytes(url))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{url}: invalid JSON ({error}); save or copy the data set again") from error
    return value if isinstance(value, dict) else None


# --- load_dataset ------------------------------------------------------------------------------------------------


def _hub_files(url: str, name: str, query: dict[str, str]) -> tuple[dict[str, list[FileInfo]], dict[str, int]]:
    """Return the files of each split, and the row counts of the splits that the data set records."""
    datasets = _import_datasets(url)
    try:
        builder = datasets.load_dataset_builder(name, query.get("config"), revision=query.get("revision"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{url}: cannot be found ({error}); check the name, the config and the network") from error
    data_files = builder.config.data_files
    kind = type(builder).__module__.rpartition(".")[2]
    builders = sorted({item.hub_builder for item in formats().values() if item.hub_builder})
    if not data_files or kind not in builders or getattr(builder.config, "field", None):
        raise ConfigError(
            f"{url}: uses the builder {kind!r}; expected plain files of the builders {', '.join(builders)}; "
            "load it with datasets.load_dataset, store it with save_to_disk, and use that folder as input"
        )
    unsupported = [file for files in data_files.values() for file in files if not is_supported(file)]
    if unsupported:
        raise ConfigError(f"{url}: no reader for {len(unsupported)} of its files; the first is {unsupported[0]}")
    counts = {str(split): int(info.num_examples) for split, info in (builder.info.splits or {}).items()}
    return {str(split): _infos(files) for split, files in data_files.items()}, counts


def _import_datasets(url: str) -> Any:
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        raise ConfigError(f"{url}: {missing_package('datasets') or error}") from error
    return datasets


def _infos(urls: Sequence[str]) -> list[FileInfo]:
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        infos = list(pool.map(storage.info, urls))
    if None in infos:
        raise StorageError(f"{urls[infos.index(None)]}: no such file")
    return [info for info in infos if info]


# --- slices ------------------------------------------------------------------------------------------------------


class _RowCounts:
    """The row counts of some files, each computed on first use."""

    def __init__(self, files: Sequence[FileInfo]) -> None:
        self._files, self._counts = files, [-1] * len(files)

    def __iter__(self) -> Iterator[int]:
        for number, info in enumerate(self._files):
            if self._counts[number] < 0:
                self._counts[number] = count_rows(info.url)
            yield self._counts[number]

    def total(self) -> int:
        expensive = [info.url for info in self._files if storage.is_remote(info.url) and not stores_row_count(info.url)]
        if expensive:
            raise ValueError(
                "it needs the number of rows, which the data set does not record; counting them would read "
                f"{len(expensive)} remote files, the first is {expensive[0]}; use absolute rows, as in train[:100000]"
            )
        return sum(self)

    def up_to(self, limit: int) -> int:
        """Return the rows of the first files that hold at least `limit`, or of all files."""
        num_rows = 0
        for count in self:
            num_rows += count
            if num_rows >= limit:
                break
        return num_rows


def _slice(url: str, spec: str, files: dict[str, list[FileInfo]], counts: dict[str, int]) -> list[FileInfo]:
    """Return the files of a slice; `FILE?rows=FIRST:LAST` for files that it contains in part."""
    datasets = _import_datasets(url)
    try:
        instruction = datasets.ReadInstruction.from_spec(spec)
        names = sorted({part.strip().partition("[")[0].partition("(")[0] for part in spec.split("+")})
        unknown = [name for name in names if name not in files]
        if unknown:
            raise ValueError(f"no split {', '.join(unknown)}; the splits are {', '.join(files)}")
        rows = {name: _RowCounts(files[name]) for name in names}
        absolute = _ABSOLUTE_SLICE.fullmatch(spec)
        limit = max(int(edge) for edge in absolute.groups(default="0")) if absolute else None
        totals = {
            name: counts.get(name) or (rows[name].total() if limit is None else rows[name].up_to(limit))
            for name in names
        }
        parts = instruction.to_absolute(totals)
        selected = [
            info
            for part in parts
            for info in _select_rows(files[part.splitname], rows[part.splitname], part.from_, part.to)
        ]
        if not selected:
            raise ValueError(f"it has no rows (found {', '.join(f'{n} in {name}' for name, n in totals.items())})")
        return selected
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{url}: split {spec!r} cannot be used: {error}") from error


def _select_rows(files: Sequence[FileInfo], rows: _RowCounts, start: int, end: int) -> Iterator[FileInfo]:
    """Yield the files, or parts of files, that hold the rows [start, end)."""
    offset = 0
    for info, num_rows in zip(files, rows, strict=False):
        first, last = max(start - offset, 0), min(end - offset, num_rows)
        if last - first == num_rows:
            yield info
        elif first < last:
            yield replace(info, url=f"{info.url}?rows={first}:{last}", size=info.size * (last - first) // num_rows)
        offset += num_rows
        if offset >= end:
            return
    raise ValueError(f"its files hold {offset} rows, but the data set records at least {end}")
