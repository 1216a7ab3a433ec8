"""From --train-data, --dataset-manifest, their weights and factors to the sources of a plan; all problems at once."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from tarfile import BLOCKSIZE
from typing import Any, TypeVar

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.manifest import MANIFEST_NAME
from open_lm.data.mixture import parse_fraction
from open_lm.data.order import Source
from open_lm.data.provenance import read_dataset
from open_lm.data.shard_format import ManifestEntry, expand_shards, read_manifest, shard_entries, shard_folder
from open_lm.errors import ConfigError, DataError, StorageError, UserError, join_problems

logger = logging.getLogger(__name__)
SYNTHETIC = "synthetic:"
_SYNTHETIC_SEQUENCES = 1 << 20
_MAX_LISTED = 20
_LISTABLE = ("s3://", "s3a://", "gs://", "az://", "abfs://")
T = TypeVar("T")

Part = list[tuple[str, ManifestEntry | None]]  # shards, each with what a manifest says of it


def find_sources(data: DataConfig) -> tuple[Source, ...]:
    """The sources of the training data, in the order of the flag's values.

    DataError (StorageError for an unreachable store) with every missing shard, every one that is visibly not whole
    (unless --ignore-parse-errors) and every unreadable manifest; ConfigError for weights or factors that do not fit
    the sources.
    """
    if data.dataset_type == "synthetic":
        return (Source("synthetic data", (SYNTHETIC,), (_SYNTHETIC_SEQUENCES,)),)
    names = _as_list(data.train_data) or _as_list(data.dataset_manifest)
    if not names:
        raise ConfigError(
            "there is no training data: give --train-data, --dataset-manifest or --dataset-type synthetic"
        )
    weights = mix_weights(data.train_data_mix_weights, len(names))
    whole = not data.ignore_parse_errors
    if data.train_data:
        sources = collect(names, lambda pattern: _read_pattern(pattern, whole))
    else:
        sources = collect(names, lambda url: [read_manifest_part(url, whole)])
    factors = _factors(data.train_data_upsampling_factors, [len(parts) for parts in sources])
    if factors and all(len(set(group)) == 1 for group in factors):
        weights = [weight * group[0] for weight, group in zip(weights, factors, strict=True)]
    joined = (
        _join_parts(name, parts, weights[number], factors[number] if factors else None)
        for number, (name, parts) in enumerate(zip(names, sources, strict=True))
    )
    return _with_datasets(replace(source, data_key=data.data_key) for source in joined)


def find_validation_source(pattern: str, whole: bool = True) -> Source:
    """One validation set: the shards of a pattern (or of a manifest.jsonl) in their order. Errors as `find_sources`."""
    manifest = pattern.endswith(".jsonl")
    parts = [read_manifest_part(pattern, whole)] if manifest else _read_pattern(pattern, whole)
    return _with_datasets([_join_parts(pattern, parts, Fraction(1), None)])[0]


def collect(items: Iterable[str], read: Callable[[str], T]) -> list[T]:
    """`read` of every item; what fails is reported together."""
    results: list[T] = []
    errors: list[UserError] = []
    for item in items:
        try:
            results.append(read(item))
        except UserError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kind = StorageError if all(isinstance(error, StorageError) for error in errors) else DataError
        raise kind(join_problems([str(error) for error in errors], "The data cannot be used"))
    return results


# --- shards and sizes ------------------------------------------------------------------------------------------------
def _read_pattern(pattern: str, whole: bool) -> list[Part]:
    """One part for each pattern between `::`."""
    urls = collect(pattern.split("::"), expand_shards)
    empty = [part for part, found in zip(pattern.split("::"), urls, strict=True) if not found]
    if empty:
        raise DataError(join_problems(empty, "No shard found for the pattern"))
    entries = [shard_entries(part) or {} for part in urls]
    parts = [[(url, table.get(url)) for url in part] for part, table in zip(urls, entries, strict=True)]
    _check_files(dict(shard for part in parts for shard in part), whole)
    return parts


def read_manifest_part(url: str, whole: bool = True) -> Part:
    """The shards that a manifest names, which lie beside it."""
    if not storage.is_remote(url) and os.path.isdir(storage.local_path(url)):
        raise DataError(f"{url} is a folder; expected its manifest: {storage.join(url, MANIFEST_NAME)}")
    entries = read_manifest(url)
    folder = url[: url.rfind("/") + 1]
    bad = [entry.shard for entry in entries if entry.shard.startswith(("/", "pipe:")) or "://" in entry.shard]
    if bad:
        raise DataError(f"{url}: names shards outside its folder ({', '.join(bad[:5])}); expected names beside it")
    part: Part = [(f"{folder}{entry.shard}.tar", entry) for entry in entries]
    try:
        _check_files(dict(part), whole)
    except DataError as error:
        raise DataError(f"{url} does not fit what is there; copy it again or make it anew. {error}") from error
    return part


def _check_files(shards: Mapping[str, ManifestEntry | None], whole: bool) -> None:
    """List the shards' folders once, where they can be listed, and report all shards that they lack.

    With `whole` also those whose size tells that they are no whole tar, before a run has begun.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for url in shards:
        if url.startswith(_LISTABLE) or not (url.startswith("pipe:") or storage.is_remote(url)):
            folders[shard_folder(url)].append(url)
    missing: list[str] = []
    broken: list[str] = []
    for folder, wanted in folders.items():
        try:
            present = {info.url.rpartition("/")[2]: info.size for info in storage.list_infos(folder)}
        except StorageError:
            # Objects may be readable where listing is not allowed; an unreachable store fails here again, and says so.
            missing += [] if storage.exists(wanted[0]) else [wanted[0]]
            continue
        for url in wanted:
            size = present.get(url.rpartition("/")[2])
            if size is None:
                missing.append(url)
            elif whole and (problem := _size_problem(size, shards[url])):
                broken.append(f"{url}: {problem}")
    if missing:
        raise DataError(_listing(missing, "Shards do not exist"))
    if broken:
        raise DataError(_listing(broken, "Shards are not whole; make or copy them again"))


def _size_problem(num_bytes: int, entry: ManifestEntry | None) -> str:
    expected = entry.num_bytes if entry else None
    if num_bytes == 0:
        return "the file is empty"
    if expected is not None and num_bytes != expected:
        return f"has {num_bytes} bytes, its manifest says {expected}"
    if num_bytes % BLOCKSIZE:
        return f"its {num_bytes} bytes are no whole tar blocks of {BLOCKSIZE}: cut short, compressed, or no tar at all"
    return ""


def _listing(urls: Sequence[str], heading: str) -> str:
    hidden = len(urls) - _MAX_LISTED
    return join_problems([*urls[:_MAX_LISTED], *([f"and {hidden} more"] if hidden > 0 else [])], heading)


def _join_parts(name: str, parts: Sequence[Part], weight: Fraction, factors: Sequence[Fraction] | None) -> Source:
    shards, entries = zip(*(shard for part in parts for shard in part), strict=True)
    return Source(
        name,
        shards,
        sizes=tuple(entry and entry.num_sequences for entry in entries),
        weight=weight,
        repeats=tuple(f for part, f in zip(parts, factors, strict=True) for _ in part) if factors else (),
        num_bytes=tuple(entry and entry.num_bytes for entry in entries),
        sha256=tuple(entry.sha256 if entry else "" for entry in entries),
    )


def _with_datasets(sources: Iterable[Source]) -> tuple[Source, ...]:
    """The sources with what the dataset.json of their folders say, each read once."""
    read = cache(_dataset_of)
    found = []
    for source in sources:
        folders = dict.fromkeys(shard_folder(url) for url in source.shards if not url.startswith("pipe:"))
        datasets = tuple(dataset for dataset in map(read, folders) if dataset is not None)
        found.append(replace(source, datasets=datasets))
    return tuple(found)


def _dataset_of(folder: str) -> dict[str, Any] | None:
    """As read_dataset; a store that does not hand the file out is no reason not to train on the shards."""
    try:
        return read_dataset(folder)
    except StorageError as error:
        logger.warning(f"how the data of {folder} were made is not known: {error}")
        return None


# --- shares ----------------------------------------------------------------------------------------------------------
def mix_weights(values: Sequence[float] | None, count: int) -> list[Fraction]:
    """One weight for each of `count` sources, equal by default; they need not add up to 1."""
    if values is None:
        return [Fraction(1)] * count
    if len(values) != count:
        raise ConfigError(f"--train-data-mix-weights has {len(values)} values for {count} sources: give one for each")
    try:
        weights = [parse_fraction(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"--train-data-mix-weights {list(values)}: expected numbers ({error})") from error
    if min(weights) < 0 or sum(weights) == 0:
        raise ConfigError(f"--train-data-mix-weights {list(values)}: expected shares of 0 or more, one of them above 0")
    return weights


def _factors(text: str | None, part_counts: Sequence[int]) -> list[list[Fraction]] | None:
    """The factor of each part of each source, from one factor a source or one a part."""
    if text is None:
        return None
    flag = f"--train-data-upsampling-factors {text}"
    try:
        values = [parse_fraction(value) for value in str(text).split("::")]
    except ValueError as error:
        raise ConfigError(f"{flag}: expected numbers joined by '::', such as 1::2::0.5 ({error})") from error
    if min(values) <= 0:
        raise ConfigError(f"{flag}: expected factors above 0; leave a source out instead")
    if len(values) == len(part_counts):
        return [[value] * count for value, count in zip(values, part_counts, strict=True)]
    if len(values) == sum(part_counts):
        rest = iter(values)
        return [[next(rest) for _ in range(count)] for count in part_counts]
    raise ConfigError(f"{flag}: {len(values)} factors for {len(part_counts)} sources: give one for each")


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    if not value:
        return []
    return [value] if isinstance(value, str) else list(value)
