"""Data sets of Hugging Face `datasets` as inputs: saved folders, and names on the hub.

Either stands for files, which the readers here read like any others; the library itself only says which files those
are. A slice such as `train[:10%]` takes whole files, and of the two at its ends the rows that belong to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import orjson

from open_lm import storage
from open_lm.datapreprocess.readers.formats import count_rows, is_counted, is_known
from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.storage import FileInfo

HUB_PREFIX = "hf-dataset://"
_QUERY_KEYS = ("split", "config", "revision")
_BUILDERS = ("json", "parquet", "arrow")
_LISTING_THREADS = 16
_ABSOLUTE = re.compile(r"\w+\[(\d+)?:(\d+)\]")


def expand_folder(url: str) -> list[FileInfo] | None:
    """The files that a data set of Hugging Face `datasets` stands for; None where `url` is no such data set.

        FOLDER, FOLDER?split=NAME        as `save_to_disk` made it; of a DatasetDict all splits, or the one named
        hf-dataset://NAME?split=SPLIT&config=CONFIG&revision=REVISION
                                         as `load_dataset` finds it: on the hub, or in a local folder of data files

    SPLIT may be a slice as `datasets` writes them (`train[:10%]`, `train[1000:2000]`, `train+test`), rounded as there.
    For a slice the rows of the files before its end are counted, which for JSON lines means reading them once.
    """
    path, query = _split_query(url)
    if url.startswith(HUB_PREFIX):
        files, counts = _hub_files(url, path.removeprefix(HUB_PREFIX), query)
    elif not query and re.search(r"[*?\[]", url):
        return None  # a pattern
    elif saved := _saved_files(path):
        files, counts = saved, {}
    else:
        return None
    wanted = query.get("split")
    names = list(files) if wanted is None else wanted.split("+")
    if all(name in files for name in names):
        return [info for name in names for info in files[name]]
    return _slice(url, str(wanted), files, counts)


def _split_query(url: str) -> tuple[str, dict[str, str]]:
    path, mark, text = url.partition("?")
    pairs = [part.partition("=") for part in text.split("&")] if "=" in text else []
    query = {key: value for key, _, value in pairs}
    if not mark or (not url.startswith(HUB_PREFIX) and "split" not in query):
        return url, {}
    unknown = sorted(set(query) - set(_QUERY_KEYS if url.startswith(HUB_PREFIX) else ("split",)))
    if unknown:
        raise ConfigError(f"{url}: no such option as {', '.join(unknown)}; known are {', '.join(_QUERY_KEYS)}")
    return path, query


# --- save_to_disk ------------------------------------------------------------------------------------------------


def _saved_files(folder: str) -> dict[str, list[FileInfo]]:
    """The files of each split of a saved folder, in order; nothing where it is none."""
    splits = _json_file(storage.join(folder, "dataset_dict.json"))
    if splits is not None:
        names = splits.get("splits") or []
        found = {name: _saved_split(storage.join(folder, name)) for name in names}
        missing = [name for name, saved in found.items() if saved is None]
        if missing or not found:
            raise DataError(f"{folder}: state.json is missing in {', '.join(missing) or 'every split'}; save it again")
        return {name: saved[1] for name, saved in found.items() if saved}
    saved = _saved_split(folder)
    return {saved[0]: saved[1]} if saved else {}


def _saved_split(folder: str) -> tuple[str, list[FileInfo]] | None:
    """Name and files of one saved split."""
    state = _json_file(storage.join(folder, "state.json"))
    if state is None or "_data_files" not in state:
        return None
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: saved with an index of rows; save flatten_indices() of it instead")
    infos = [storage.info(storage.join(folder, entry["filename"])) for entry in state["_data_files"]]
    if None in infos:
        missing = state["_data_files"][infos.index(None)]["filename"]
        raise DataError(f"{folder}: state.json names {missing}, which is not there; copy or save it again")
    return state.get("_split") or "train", [info for info in infos if info]


def _json_file(url: str) -> dict[str, Any] | None:
    if storage.info(url) is None:
        return None
    try:
        value = orjson.loads(storage.read_bytes(url))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{url}: invalid JSON ({error}); save or copy the data set again") from error
    return value if isinstance(value, dict) else None


# --- load_dataset ------------------------------------------------------------------------------------------------


def _hub_files(url: str, name: str, query: dict[str, str]) -> tuple[dict[str, list[FileInfo]], dict[str, int]]:
    """The files of each split, and the rows of the splits where the data set records them."""
    datasets = _library(url)
    try:
        builder = datasets.load_dataset_builder(name, query.get("config"), revision=query.get("revision"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{url}: cannot be found ({error}); check the name, the config and the network") from error
    data_files = builder.config.data_files
    kind = type(builder).__module__.rpartition(".")[2]
    if not data_files or kind not in _BUILDERS or getattr(builder.config, "field", None):
        raise ConfigError(
            f"{url}: is made by the builder {kind!r}; only plain {', '.join(_BUILDERS)} files are read from where "
            "they are; load it with datasets.load_dataset, save_to_disk, and give that folder"
        )
    unknown = [file for files in data_files.values() for file in files if not is_known(file)]
    if unknown:
        raise ConfigError(f"{url}: no reader for {len(unknown)} of its files, the first is {unknown[0]}")
    counts = {str(split): int(info.num_examples) for split, info in (builder.info.splits or {}).items()}
    return {str(split): _infos(files) for split, files in data_files.items()}, counts


def _library(url: str) -> Any:
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        raise ConfigError(f"{url}: needs the package datasets; install it with: pip install datasets") from error
    return datasets


def _infos(urls: Sequence[str]) -> list[FileInfo]:
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        found = list(pool.map(storage.info, urls))
    if None in found:
        raise StorageError(f"{urls[found.index(None)]}: no such file")
    return [info for info in found if info]


# --- slices ------------------------------------------------------------------------------------------------------


class _Rows:
    """The rows of each of some files, counted when asked for and once."""

    def __init__(self, files: Sequence[FileInfo]) -> None:
        self._files, self._counts = files, [-1] * len(files)

    def __iter__(self) -> Iterator[int]:
        for number, info in enumerate(self._files):
            if self._counts[number] < 0:
                self._counts[number] = count_rows(info.url)
            yield self._counts[number]

    def total(self) -> int:
        dear = [info.url for info in self._files if storage.is_remote(info.url) and not is_counted(info.url)]
        if dear:
            raise ValueError(
                f"it needs the number of rows, which the data set does not record and {len(dear)} remote files "
                f"(the first is {dear[0]}) would have to be read for; give absolute rows, as in train[:100000]"
            )
        return sum(self)

    def up_to(self, limit: int) -> int:
        """The rows of all files, or of the first files that hold at least `limit`."""
        found = 0
        for count in self:
            found += count
            if found >= limit:
                break
        return found


def _slice(url: str, wanted: str, files: dict[str, list[FileInfo]], counts: dict[str, int]) -> list[FileInfo]:
    """The files of a slice; of those at its ends `FILE?rows=FIRST:LAST`."""
    datasets = _library(url)
    try:
        instruction = datasets.ReadInstruction.from_spec(wanted)
        names = sorted({part.strip().partition("[")[0].partition("(")[0] for part in wanted.split("+")})
        unknown = [name for name in names if name not in files]
        if unknown:
            raise ValueError(f"no split {', '.join(unknown)}; it has {', '.join(files)}")
        rows = {name: _Rows(files[name]) for name in names}
        absolute = _ABSOLUTE.fullmatch(wanted)
        limit = max(int(edge) for edge in absolute.groups(default="0")) if absolute else None
        totals = {
            name: counts.get(name) or (rows[name].total() if limit is None else rows[name].up_to(limit))
            for name in names
        }
        parts = instruction.to_absolute(totals)
        cuts = [_cut(files[part.splitname], rows[part.splitname], part.from_, part.to) for part in parts]
        found = [info for cut in cuts for info in cut]
        if not found:
            raise ValueError(f"it holds no rows (found {', '.join(f'{n} in {name}' for name, n in totals.items())})")
        return found
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{url}: the split {wanted!r} cannot be taken: {error}") from error


def _cut(files: Sequence[FileInfo], rows: _Rows, start: int, end: int) -> Iterator[FileInfo]:
    """The files that hold the rows [start, end)."""
    begin = 0
    for info, num_rows in zip(files, rows, strict=False):
        first, last = max(start - begin, 0), min(end - begin, num_rows)
        if last - first == num_rows:
            yield info
        elif first < last:
            yield replace(info, url=f"{info.url}?rows={first}:{last}", size=info.size * (last - first) // num_rows)
        begin += num_rows
        if begin >= end:
            return
    raise ValueError(f"its files hold {begin} rows, the data set records more than {end - 1}")
