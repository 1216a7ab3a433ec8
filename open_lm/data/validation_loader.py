"""Loaders of validation sets: each set is read once, in file order."""

from __future__ import annotations

from collections.abc import Iterator

from open_lm.config.sections import DataConfig, ValidationConfig
from open_lm.data.fetch import FetchFolder
from open_lm.data.loader import Batch, BatchSpec, TargetMask, load_batches
from open_lm.data.order import OrderSettings
from open_lm.data.sources import check_data_key, find_validation_source, read_all
from open_lm.data.stream import StreamSpec
from open_lm.errors import ConfigError, DataError


class ValLoader:
    """One validation set; every iteration yields all its sequences once, in file order.

    Filler sequences complete the last batch, so that all ranks have the same number of batches of the same shape.
    `val_data` is the name of the set in results. `num_sequences` and `num_batches` are None if shards must be read to
    know.
    """

    def __init__(self, spec: BatchSpec, workers: int, folder: FetchFolder | None) -> None:
        self._spec, self._workers, self._folder = spec, workers, folder
        self._logged: set[str] = set()
        self.sources = spec.stream.sources
        self.val_data = [spec.stream.sources[0].name]
        self.data_key = spec.stream.data_key
        self.batch_size = spec.batch_size
        known, limit = spec.stream.sources[0].num_sequences, spec.max_sequences
        self.num_sequences = known if known is None or limit is None else min(known, limit)
        total_batch = spec.batch_size * spec.world_size
        self.num_batches = None if self.num_sequences is None else -(-self.num_sequences // total_batch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches. DataError for a set without a usable sequence, or from reading the data."""
        is_empty = True
        for batch, _ in load_batches(self._spec, self._workers, self._logged):
            is_empty = False
            yield batch
        if is_empty:
            raise DataError(f"--val-data {self.val_data[0]}: its shards hold no sequence")


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
        loaders.append(ValLoader(spec, data.workers, folder))
    return loaders
