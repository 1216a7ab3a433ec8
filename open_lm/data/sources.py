"""Build the sources from --train-data or --dataset-manifest, weights and factors; report all problems together."""

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
from open_lm.data.manifest import MANIFEST_NAME, join_limited
from open_lm.data.mixture import parse_fraction
from open_lm.data.order import Source
from open_lm.data.provenance import read_dataset
from open_lm.data.shard_format import (
    MEMBER_KINDS,
    ManifestEntry,
    expand_shards,
    read_manifest,
    shard_entries,
    shard_folder,
)
from open_lm.errors import ConfigError, DataError, StorageError, UserError, join_problems
from open_lm.system.names import split_joined

logger = logging.getLogger(__name__)
SYNTHETIC_URL = "synthetic:"
_SYNTHETIC_SEQUENCES = 1 << 20
_LISTABLE_SCHEMES = ("s3://", "s3a://", "gs://", "az://", "abfs://")
T = TypeVar("T")

ShardGroup = list[tuple[str, ManifestEntry | None]]  # shards, each with its manifest entry


def find_sources(data: DataConfig) -> tuple[Source, ...]:
    """Return the sources of the training data, in the order of the flag's values.

    DataError (StorageError for an unreachable store) that lists every missing shard, every shard whose size shows that
    it is incomplete (unless --ignore-parse-errors) and every unreadable manifest. ConfigError for weights or factors
    that do not fit the sources.
    """
    if data.dataset_type == "synthetic":
        return (Source("synthetic data", (SYNTHETIC_URL,), (_SYNTHETIC_SEQUENCES,)),)
    names = _as_list(data.train_data) or _as_list(data.dataset_manifest) or _as_list(data.train_text)
    if not names:
        raise ConfigError(
            "there is no training data; use --train-data, --dataset-manifest, --train-text or --dataset-type synthetic"
        )
    weights = mix_weights(data.train_data_mix_weights, len(names))
    check_sizes = not data.ignore_parse_errors
    if data.train_data:
        sources = read_all(names, lambda pattern: _read_pattern(pattern, check_sizes))
    elif data.train_text:
        sources = read_all(names, lambda name: [_read_index(name, data.text_index)])
    else:
        sources = read_all(names, lambda url: [read_manifest_group(url, check_sizes)])
    factors = _upsampling_factors(data.train_data_upsampling_factors, [len(groups) for groups in sources])
    if factors and all(len(set(values)) == 1 for values in factors):
        weights = [weight * values[0] for weight, values in zip(weights, factors, strict=True)]
    joined = (
        _join_groups(name, groups, weights[number], factors[number] if factors else None)
        for number, (name, groups) in enumerate(zip(names, sources, strict=True))
    )
    return _with_datasets(replace(source, data_key=data.data_key) for source in joined)


def find_validation_source(pattern: str, check_sizes: bool = True) -> Source:
    """Return one validation set: the shards of a pattern or of a manifest.jsonl. Errors as in `find_sources`."""
    is_manifest = pattern.endswith(".jsonl")
    groups = [read_manifest_group(pattern, check_sizes)] if is_manifest else _read_pattern(pattern, check_sizes)
    return _with_datasets([_join_groups(pattern, groups, Fraction(1), None)])[0]


def check_data_key(key: str, flag: str) -> None:
    """Raise ConfigError if `key` is not a member kind."""
    if key not in MEMBER_KINDS:
        raise ConfigError(f"{flag}: found {key}, expected one of {', '.join(MEMBER_KINDS)}")


def read_all(items: Iterable[str], read: Callable[[str], T]) -> list[T]:
    """Apply `read` to every item, and report all failures together."""
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
def _read_pattern(pattern: str, check_sizes: bool) -> list[ShardGroup]:
    """Return one group of shards for each pattern between `::`."""
    parts = split_joined(pattern)
    urls = read_all(parts, expand_shards)
    entries = [shard_entries(part) or {} for part in urls]
    groups = [[(url, table.get(url)) for url in part] for part, table in zip(urls, entries, strict=True)]
    _check_files(dict(shard for group in groups for shard in group), check_sizes)
    return groups


def read_manifest_group(url: str, check_sizes: bool = True) -> ShardGroup:
    """Return the shards of a manifest, which are in its folder."""
    if not storage.is_remote(url) and os.path.isdir(storage.local_path(url)):
        raise DataError(f"{url}: found a folder, expected its manifest {storage.join(url, MANIFEST_NAME)}")
    entries = read_manifest(url)
    folder = url[: url.rfind("/") + 1]
    bad = [entry.shard for entry in entries if entry.shard.startswith(("/", "pipe:")) or "://" in entry.shard]
    if bad:
        raise DataError(f"{url}: lists shards outside its folder ({', '.join(bad[:5])}); expected file names only")
    group: ShardGroup = [(f"{folder}{entry.shard}.tar", entry) for entry in entries]
    try:
        _check_files(dict(group), check_sizes)
    except DataError as error:
        raise DataError(f"{url}: does not match its folder; copy it again or recreate it. {error}") from error
    return group


def _read_index(name: str, index: str | None) -> ShardGroup:
    """Return the shards of a text, whose index training/raw_text.py has made."""
    from open_lm.data.text_index import text_folder  # only then: it imports the readers and the tokenizer

    folder = text_folder(index, name) if index is not None else None
    if folder is None or not folder.is_finished:
        raise DataError(f"--train-text {name}: there is no finished text index; open-lm train makes it at its start")
    return folder.shards()


def _check_files(shards: Mapping[str, ManifestEntry | None], check_sizes: bool) -> None:
    """List each folder of shards once, if its storage can be listed, and report all missing shards.

    With `check_sizes`, also report shards whose size shows that they are incomplete, before the run starts.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for url in shards:
        if url.startswith(_LISTABLE_SCHEMES) or not (url.startswith("pipe:") or storage.is_remote(url)):
            folders[shard_folder(url)].append(url)
    missing: list[str] = []
    broken: list[str] = []
    for folder, expected in folders.items():
        try:
            present = {info.url.rpartition("/")[2]: info.size for info in storage.list_infos(folder)}
        except StorageError:
            # Objects may be readable although listing is not allowed. An unreachable store raises here again.
            missing += [] if storage.exists(expected[0]) else [expected[0]]
            continue
        for url in expected:
            size = present.get(url.rpartition("/")[2])
            if size is None:
                missing.append(url)
            elif check_sizes and (problem := _size_problem(size, shards[url])):
                broken.append(f"{url}: {problem}")
    if missing:
        raise DataError(join_limited(missing, "Shards do not exist"))
    if broken:
        raise DataError(join_limited(broken, "Shards are incomplete; create or copy them again"))


def _size_problem(num_bytes: int, entry: ManifestEntry | None) -> str:
    expected = entry.num_bytes if entry else None
    if num_bytes == 0:
        return "the file is empty"
    if expected is not None and num_bytes != expected:
        return f"has {num_bytes} bytes, but its manifest lists {expected}"
    if num_bytes % BLOCKSIZE:
        return f"its {num_bytes} bytes are not a multiple of {BLOCKSIZE}, as a tar has: cut short, compressed or no tar"
    return ""


def _join_groups(
    name: str, groups: Sequence[ShardGroup], weight: Fraction, factors: Sequence[Fraction] | None
) -> Source:
    shards, entries = zip(*(shard for group in groups for shard in group), strict=True)
    return Source(
        name,
        shards,
        sizes=tuple(entry and entry.num_sequences for entry in entries),
        weight=weight,
        repeats=tuple(f for group, f in zip(groups, factors, strict=True) for _ in group) if factors else (),
        num_bytes=tuple(entry and entry.num_bytes for entry in entries),
        sha256=tuple(entry.sha256 if entry else "" for entry in entries),
        block_sums=tuple(entry and entry.block_sums for entry in entries),
    )


def _with_datasets(sources: Iterable[Source]) -> tuple[Source, ...]:
    """Add the dataset.json of their folders to the sources; read each file once."""
    read = cache(_dataset_of)
    results = []
    for source in sources:
        folders = dict.fromkeys(shard_folder(url) for url in source.shards if not url.startswith("pipe:"))
        datasets = tuple(dataset for dataset in map(read, folders) if dataset is not None)
        results.append(replace(source, datasets=datasets))
    return tuple(results)


def _dataset_of(folder: str) -> dict[str, Any] | None:
    """Read the dataset.json of a folder; only warn if it cannot be read, since the shards may still be readable."""
    try:
        return read_dataset(folder)
    except StorageError as error:
        logger.warning(f"{folder}: cannot read dataset.json, so the origin of the data is unknown: {error}")
        return None


# --- weights and factors ---------------------------------------------------------------------------------------------
def mix_weights(values: Sequence[float] | None, count: int) -> list[Fraction]:
    """Return one weight for each of `count` sources, equal by default; the sum need not be 1."""
    if values is None:
        return [Fraction(1)] * count
    if len(values) != count:
        raise ConfigError(f"--train-data-mix-weights: found {len(values)} values for {count} sources; use one for each")
    try:
        weights = [parse_fraction(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"--train-data-mix-weights {list(values)}: expected numbers ({error})") from error
    if min(weights) < 0 or sum(weights) == 0:
        raise ConfigError(f"--train-data-mix-weights {list(values)}: expected 0 or more, and at least one above 0")
    return weights


def _upsampling_factors(text: str | None, group_counts: Sequence[int]) -> list[list[Fraction]] | None:
    """Return the factor of each group of each source, from one factor per source or one per group."""
    if text is None:
        return None
    flag = f"--train-data-upsampling-factors {text}"
    try:
        values = [parse_fraction(value) for value in str(text).split("::")]
    except ValueError as error:
        raise ConfigError(f"{flag}: expected numbers joined by '::', such as 1::2::0.5 ({error})") from error
    if min(values) <= 0:
        raise ConfigError(f"{flag}: expected factors above 0; to exclude a source, remove it from the flags")
    if len(values) == len(group_counts):
        return [[value] * count for value, count in zip(values, group_counts, strict=True)]
    if len(values) == sum(group_counts):
        remaining = iter(values)
        return [[next(remaining) for _ in range(count)] for count in group_counts]
    raise ConfigError(f"{flag}: found {len(values)} factors for {len(group_counts)} sources; use one for each")


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    if not value:
        return []
    return [value] if isinstance(value, str) else list(value)
