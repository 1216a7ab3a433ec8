"""File helpers under the names that existing programs import; the code is in open_lm.storage and open_lm.checkpoint."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, DataError, join_problems


class ShardsExhausted(DataError, IndexError):
    """A pass over the data with too few remaining shards for the requested interval."""


class PassTooSmall(DataError, ValueError):
    """A full pass over the data with too few shards for the requested interval."""


def pt_load(file_path: str, map_location: Any = None) -> Any:
    """Load a local or remote (s3://, …) file of torch.save. Loads only tensors and plain values and executes no code.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    from open_lm.checkpoint.files import read_file

    return read_file(file_path, map_location)


def check_exists(file_path: str) -> bool:
    """Return whether a local or remote file exists."""
    return storage.info(file_path) is not None


def get_metadata_file(path: str, shard_shuffle_seed: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a manifest.jsonl as dicts, in file order or shuffled with a seed."""
    entries, problems = [], []
    for number, line in enumerate(storage.read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not (isinstance(entry["shard"], str) and isinstance(_num_sequences(entry), int)):
                raise ValueError('expected "shard": a string, "num_sequences": an integer')
            entries.append(entry)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"line {number}: {f'no {error}' if isinstance(error, KeyError) else error}")
    if problems:
        raise DataError(join_problems(problems, f"{path} is not a valid manifest"))
    if shard_shuffle_seed is not None:
        import numpy as np

        np.random.default_rng(shard_shuffle_seed).shuffle(entries)
    return entries


def get_string_for_epoch(  # noqa: PLR0917 (existing callers pass these by position)
    num_samples: int,
    starting_points: Sequence[int],
    paths: Sequence[str],
    weights: Sequence[float] | None,
    num_workers_per_gpu: int,
    world_size: int,
    multi_epoch: bool = False,
    shard_shuffle_seed: int | None = None,
) -> tuple[list[str], list[int], list[int]]:
    """Select the shards of one checkpoint interval of `num_samples` sequences.

    Every source contributes the same number of shards, a multiple of the number of all data-loading workers. The
    trainer itself selects sequences, not shards (see open_lm/data/order.py); this function is for programs that
    select shards.

    Args:
        num_samples: sequences of the interval.
        starting_points: the first unused shard of each source; with `multi_epoch` it counts across passes.
        paths: the manifest of each source.
        weights: the weight of each source; None for equal weights.
        num_workers_per_gpu: data-loading workers of each rank.
        world_size: number of ranks.
        multi_epoch: start a new pass, with its own order, when too few shards remain.
        shard_shuffle_seed: seed of the shard order; None for file order.

    Returns:
        For each source the pattern of its shards, the number of their sequences, and the next starting point.

    Raises:
        ShardsExhausted: (an IndexError) too few shards remain.
        PassTooSmall: (a ValueError) with `multi_epoch`, a full pass has too few shards.
    """
    source_weights = list(weights) if weights is not None else [1.0] * len(paths)
    if len(source_weights) != len(paths) or len(starting_points) != len(paths):
        raise ConfigError(
            f"found {len(source_weights)} weights and {len(starting_points)} starting points for {len(paths)} "
            "manifests; expected one of each for every manifest"
        )
    needed = [math.ceil(weight * num_samples / sum(source_weights)) for weight in source_weights]
    workers = max(1, num_workers_per_gpu) * world_size
    if not multi_epoch:
        return _interval(paths, starting_points, needed, workers, shard_shuffle_seed)
    totals = [len(get_metadata_file(path)) for path in paths]
    passes = {start // total for start, total in zip(starting_points, totals, strict=True)}
    if len(passes) != 1:
        raise ConfigError(f"the starting points {list(starting_points)} are in different passes over their sources")
    pass_index = passes.pop()
    starts = [start % total for start, total in zip(starting_points, totals, strict=True)]
    for attempt in range(2):  # try the rest of this pass, then a full pass
        seed = None if shard_shuffle_seed is None else shard_shuffle_seed + pass_index
        try:
            patterns, counts, next_starts = _interval(paths, starts, needed, workers, seed)
            return patterns, counts, [n + pass_index * total for n, total in zip(next_starts, totals, strict=True)]
        except ShardsExhausted as error:
            if attempt == 1:
                raise PassTooSmall(f"a full pass has too few shards: {error}") from error
            pass_index, starts = pass_index + 1, [0] * len(paths)
    raise AssertionError("unreachable")


def _interval(
    paths: Sequence[str], starts: Sequence[int], needed: Sequence[int], workers: int, seed: int | None
) -> tuple[list[str], list[int], list[int]]:
    manifests = [get_metadata_file(path, seed) for path in paths]
    num_shards = workers  # shards of each source
    for manifest, start, num_needed in zip(manifests, starts, needed, strict=True):
        num_sequences, count = 0, 0
        for entry in manifest[start:]:
            if num_sequences >= num_needed:
                break
            num_sequences += _num_sequences(entry)
            count += 1
        num_shards = max(num_shards, count)
        if num_sequences < num_needed:
            num_shards = len(manifest) + 1
    remaining = min(len(manifest) - start for manifest, start in zip(manifests, starts, strict=True))
    if num_shards > remaining:
        raise ShardsExhausted(
            f"{' and '.join(paths)}: {remaining} shards remain, too few for {sum(needed)} sequences on {workers} "
            "workers; use more data, fewer workers, or a smaller --train-num-samples"
        )
    num_shards -= num_shards % workers
    selected = [manifest[start : start + num_shards] for manifest, start in zip(manifests, starts, strict=True)]
    counts = [sum(map(_num_sequences, entries)) for entries in selected]
    if any(count < num_needed for count, num_needed in zip(counts, needed, strict=True)):
        logging.warning(
            f"{num_shards} shards, a multiple of {workers} workers, contain only {sum(counts)} of {sum(needed)} "
            "sequences"
        )
    patterns = [_pattern(path, entries) for path, entries in zip(paths, selected, strict=True)]
    return patterns, counts, [start + num_shards for start in starts]


def _num_sequences(entry: dict[str, Any]) -> int:
    return entry["num_sequences"] if "num_sequences" in entry else entry["num_chunks"]


def _pattern(manifest: str, entries: list[dict[str, Any]]) -> str:
    shards = [entry["shard"] for entry in entries]
    folder, slash, _ = manifest.rpartition("/")
    return folder + slash + (shards[0] if len(shards) == 1 else "{" + ",".join(shards) + "}") + ".tar"
