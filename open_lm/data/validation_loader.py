"""Loaders of validation sets: each set is read once, in file order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from open_lm.config.sections import DataConfig, ValidationConfig
from open_lm.data.batch import Batch, TargetMask
from open_lm.data.fetch import FetchFolder
from open_lm.data.loader import BatchSpec, load_batches
from open_lm.data.order import OrderSettings
from open_lm.data.sources import check_data_key, find_validation_source, read_all
from open_lm.data.stream import StreamSpec
from open_lm.errors import ConfigError, DataError


class ValLoader:
    """One validation set; every iteration yields all its sequences once, in file order.

    Filler sequences complete the last batch, so that all ranks have the same number of batches of the same shape.

    Attributes:
        val_data: name of the set in results.
        total_sequences: sequences of the set; None if shards must be read to know.
        num_sequences: sequences that are read, which --val-num-samples and --val-max-batches limit; None if unknown.
        num_batches: batches that are read; None if unknown before the first complete iteration.
        max_batches: --val-max-batches.
        is_bounded: whether `max_batches` ends the iteration before the other limits do, as far as known.
    """

    def __init__(
        self, spec: BatchSpec, workers: int, folder: FetchFolder | None, max_batches: int | None = None
    ) -> None:
        self._spec, self._workers, self._folder = spec, workers, folder
        self._logged: set[str] = set()
        self._source_state: dict[str, Any] = {}  # the position in the set after the last batch
        self.max_batches = max_batches
        self.sources = spec.stream.sources
        self.val_data = [spec.stream.sources[0].name]
        self.data_key = spec.stream.data_key
        self.batch_size = spec.batch_size
        self.total_sequences = known = spec.stream.sources[0].num_sequences
        limits = [limit for limit in (known, spec.max_sequences) if limit is not None]
        bound = None if max_batches is None else max_batches * spec.global_batch_size
        self._bounds_first = bound is not None and all(bound < limit for limit in limits)
        self.is_bounded = self._bounds_first and known is not None
        if bound is not None:
            limits.append(bound)
            self._spec = replace(spec, max_sequences=min(bound, spec.max_sequences or bound))
        self.num_sequences = None if known is None else min(limits)
        self.num_batches = None if self.num_sequences is None else -(-self.num_sequences // spec.global_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches. DataError for a set without a usable sequence, or from reading the data."""
        count = 0
        for batch, state in load_batches(self._spec, self._workers, self._logged):
            count += 1
            self._source_state = state["sources"][0]
            if self.num_sequences is None:
                self.is_bounded = self._bounds_first and count == self.max_batches
            yield batch
        if not count:
            raise DataError(f"--val-data {self.val_data[0]}: its shards hold no sequence")
        self.num_batches = count

    def estimate_batches(self) -> int | None:
        """Estimate `num_batches` from the mean size of the shards read so far, None before the first is complete."""
        state = self._source_state
        queue = state.get("queue", [])  # [visit, offset] of the shards that are being read
        visits = state.get("next_visit", 0) - len(queue)
        if self.num_batches is not None or visits <= 0:
            return self.num_batches
        done = state["samples"] - sum(offset for _, offset in queue)
        sequences = round(done / visits * len(self.sources[0].shards))
        if self._spec.max_sequences is not None:
            sequences = min(sequences, self._spec.max_sequences)
        return -(-sequences // self._spec.global_batch_size)


def build_val_loaders(
    validation: ValidationConfig,
    data: DataConfig,
    *,
    seq_len: int,
    vocab_size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[ValLoader]:
    """Build one loader for each value of --val-data, in their order; `batch_size` is the rank's.

    --val-data-key has one value for all sets or one for each (default: --data-key). Target masks and the tolerance of
    broken data are those of training. The problems of all sets are reported together.
    """
    validation, data = ValidationConfig.from_object(validation), DataConfig.from_object(data)
    patterns = validation.val_data or []
    keys = validation.val_data_key or [data.data_key]
    if len(keys) not in (1, len(patterns)):
        raise ConfigError(
            f"--val-data-key: found {len(keys)} values for {len(patterns)} values of --val-data; use one for each or "
            "one for all"
        )
    for key in keys:
        check_data_key(key, "--val-data-key")
    limit = None if validation.val_num_samples is None else max(1, validation.val_num_samples // seq_len)
    check_sizes = not data.ignore_parse_errors
    sources = read_all(patterns, lambda pattern: find_validation_source(pattern, check_sizes))
    loaders = []
    for source, key in zip(sources, keys * (len(patterns) if len(keys) == 1 else 1), strict=True):
        folder = FetchFolder.if_needed([source])
        spec = BatchSpec(
            stream=StreamSpec.from_config(data, (source,), key, folder, seq_len=seq_len, vocab_size=vocab_size),
            order=OrderSettings(shuffle_shards=False, shuffle_samples=False, max_passes=1),
            seed=0,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            mask=TargetMask.from_config(data),
            pad_last_batch=True,
            max_sequences=limit,
        )
        loaders.append(ValLoader(spec, data.workers, folder, validation.val_max_batches))
    return loaders
