"""File helpers under the names that existing programs import; storage.py and checkpoint/files.py do the work."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, DataError, join_problems


class ShardsExhausted(DataError, IndexError):
    """A pass over the data has too few shards left for the interval that was asked for."""


class PassTooSmall(DataError, ValueError):
    """Not even a whole pass over the data has enough shards for the interval that was asked for."""


def pt_load(file_path: str, map_location: Any = None) -> Any:
    """What torch.save wrote to a local or remote (s3://, …) file: tensors and plain values only, nothing is executed.

    CheckpointError where the file is missing or broken.
    """
    from open_lm.checkpoint.files import read_file

    return read_file(file_path, map_location)


def check_exists(file_path: str) -> bool:
    """Whether a local or remote file is there."""
    return storage.info(file_path) is not None


def get_metadata_file(path: str, shard_shuffle_seed: int | None = None) -> list[dict[str, Any]]:
    """The lines of a manifest.jsonl as dicts, in its order or in the order that a seed gives them."""
    entries, problems = [], []
    for number, line in enumerate(storage.read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not (isinstance(entry["shard"], str) and isinstance(_num_sequences(entry), int)):
                raise ValueError('expected "shard": text, "num_sequences": a number')
            entries.append(entry)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"line {number}: {f'no {error}' if isinstance(error, KeyError) else error}")
    if problems:
        raise DataError(join_problems(problems, f"{path} is not a manifest"))
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
    """The whole shards that hold one checkpoint interval of `num_samples` sequences.

    paths: a manifest for each source. starting_points: the first unused shard of each; with `multi_epoch` it counts on
    over passes, and each pass has an order of its own. Every source gives the same number of shards, a multiple of all
    ranks' workers. Returns, for each source, a pattern of its shards, their number of sequences, and the next start.
    Raises ShardsExhausted (an IndexError) where too few shards are left, PassTooSmall (a ValueError) with multi_epoch.

    The trainer itself does not go by whole shards (see open_lm/data/plan.py); this is for programs that do.
    """
    shares = list(weights) if weights is not None else [1.0] * len(paths)
    if len(shares) != len(paths) or len(starting_points) != len(paths):
        raise ConfigError(
            f"found {len(shares)} weights and {len(starting_points)} starting points for {len(paths)} manifests; "
            "expected one of each for every manifest"
        )
    needed = [math.ceil(share * num_samples / sum(shares)) for share in shares]
    workers = max(1, num_workers_per_gpu) * world_size
    if not multi_epoch:
        return _interval(paths, starting_points, needed, workers, shard_shuffle_seed)
    totals = [len(get_metadata_file(path)) for path in paths]
    passes = {start // total for start, total in zip(starting_points, totals, strict=True)}
    if len(passes) != 1:
        raise ConfigError(f"the starting points {list(starting_points)} lie in different passes over their sources")
    number = passes.pop()
    starts = [start % total for start, total in zip(starting_points, totals, strict=True)]
    for attempt in range(2):  # what is left of this pass, then a whole one
        seed = None if shard_shuffle_seed is None else shard_shuffle_seed + number
        try:
            patterns, counts, following = _interval(paths, starts, needed, workers, seed)
            return patterns, counts, [n + number * total for n, total in zip(following, totals, strict=True)]
        except ShardsExhausted as error:
            if attempt == 1:
                raise PassTooSmall(f"even a whole pass does not suffice: {error}") from error
            number, starts = number + 1, [0] * len(paths)
    raise AssertionError("unreachable")


def _interval(
    paths: Sequence[str], starts: Sequence[int], needed: Sequence[int], workers: int, seed: int | None
) -> tuple[list[str], list[int], list[int]]:
    manifests = [get_metadata_file(path, seed) for path in paths]
    taken = workers  # shards of each source
    for manifest, start, wanted in zip(manifests, starts, needed, strict=True):
        found, count = 0, 0
        for entry in manifest[start:]:
            if found >= wanted:
                break
            found += _num_sequences(entry)
            count += 1
        taken = max(taken, count)
        if found < wanted:
            taken = len(manifest) + 1
    left = min(len(manifest) - start for manifest, start in zip(manifests, starts, strict=True))
    if taken > left:
        raise ShardsExhausted(
            f"{' and '.join(paths)}: {left} shards are left, too few for {sum(needed)} sequences on {workers} workers; "
            "use more data, fewer workers, or a smaller --train-num-samples"
        )
    taken -= taken % workers
    chosen = [manifest[start : start + taken] for manifest, start in zip(manifests, starts, strict=True)]
    counts = [sum(map(_num_sequences, entries)) for entries in chosen]
    if any(count < wanted for count, wanted in zip(counts, needed, strict=True)):
        logging.warning(
            f"{taken} shards, a multiple of {workers} workers, hold {sum(counts)} of {sum(needed)} sequences"
        )
    patterns = [_pattern(path, entries) for path, entries in zip(paths, chosen, strict=True)]
    return patterns, counts, [start + taken for start in starts]


def _num_sequences(entry: dict[str, Any]) -> int:
    return entry["num_sequences"] if "num_sequences" in entry else entry["num_chunks"]


def _pattern(manifest: str, entries: list[dict[str, Any]]) -> str:
    shards = [entry["shard"] for entry in entries]
    folder, slash, _ = manifest.rpartition("/")
    return folder + slash + (shards[0] if len(shards) == 1 else "{" + ",".join(shards) + "}") + ".tar"
