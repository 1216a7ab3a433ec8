"""The original OpenLM's data functions, for programs that call them with a flat `args` object.

`args` is any object with the flags' attributes. Attributes that the trainer adds are optional: seq_len and vocab_size
(else from --model), rank and world_size (else 0 and 1), per_gpu_batch_size and per_gpu_val_batch_size (else from
batch_size or the global batch sizes). As in the original, `train_num_samples` counts SEQUENCES here: the original's
trainer divided the flag's tokens by seq_len before it called these functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from open_lm.config.sections import DataConfig, ValidationConfig
from open_lm.data.batch import Batch
from open_lm.data.loader import TrainLoader, build_train_loader
from open_lm.data.validation_loader import ValLoader, build_val_loaders
from open_lm.errors import ConfigError


@dataclass
class DataInfo:
    """A data set in the form that the original returned.

    `dataloader` yields 1-tuples (ids (B, seq_len + 1) int64,), unmasked and without filler; its num_batches and
    num_samples count the full epoch, over all ranks. `loader` yields this package's batches, with masked targets.
    """

    dataloader: TokenBatches
    loader: TrainLoader | ValLoader
    sampler: None = None
    shared_epoch: None = None

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch of the training data."""
        self.dataloader.epoch = epoch

    def __getitem__(self, name: str) -> DataInfo:
        """Return itself for "val": the original wrapped each validation set in {"val": DataInfo}."""
        if name != "val":
            raise KeyError(name)
        return self


class TokenBatches:
    """An iterable of (ids (B, seq_len + 1) int64,); every iteration reads the same epoch again."""

    def __init__(self, num_batches: int, num_samples: int, epoch: int = 0) -> None:
        self.num_batches, self.num_samples, self.epoch = num_batches, num_samples, epoch

    def __len__(self) -> int:
        return self.num_batches

    def _batches(self) -> Iterator[Batch]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        for batch in self._batches():
            if batch.num_samples:
                yield (batch.tokens[batch.filled],)


class _TrainTokens(TokenBatches):
    def __init__(self, loader: TrainLoader, num_batches: int, num_samples: int, epoch: int) -> None:
        super().__init__(num_batches, num_samples, epoch)
        self._loader, self._start = loader, loader.state

    def _batches(self) -> Iterator[Batch]:
        self._loader.rewind(self._start, self.epoch * self.num_batches)
        return (batch for batch, _ in self._loader.batches(self.num_batches))


class _ValTokens(TokenBatches):
    def __init__(self, loader: ValLoader, num_samples: int) -> None:
        super().__init__(-(-num_samples // loader.batch_size), num_samples)
        self._loader = loader

    def _batches(self) -> Iterator[Batch]:
        return iter(self._loader)


def get_data(
    args: Any, epoch: int = 0, tokenizer: object = None, skip_train: bool = False, floor: bool = True
) -> dict[str, Any]:
    """Return {"train": DataInfo or None, "val_list": [DataInfo, …]} with the entries that `args` requests.

    `tokenizer` is not used. ConfigError, DataError or StorageError for unusable flags or shards.
    """
    data: dict[str, Any] = {}
    flags = DataConfig.from_object(args)
    if skip_train:
        data["train"] = None
    elif flags.train_data or flags.dataset_manifest or flags.train_text or flags.dataset_type == "synthetic":
        data["train"] = get_wds_dataset(args, is_train=True, epoch=epoch, floor=floor, data_key=flags.data_key)
    if getattr(args, "val_data", None):
        data["val_list"] = [_val_info(loader) for loader in _val_loaders(args)]
    return data


def get_wds_dataset(  # noqa: PLR0917 (existing callers pass these by position)
    args: Any,
    is_train: bool,
    epoch: int = 0,
    floor: bool = True,
    tokenizer: object = None,
    data_key: str | None = None,
    force_num_samples: Sequence[int] | None = None,
) -> DataInfo:
    """Return the training data of one epoch, or (is_train=False) the one validation set of `args.val_data`.

    An epoch has args.train_num_samples sequences, or the sum of `force_num_samples` (one number for each source, also
    used as the weights), rounded to full global batches: down with `floor`, else up. Errors as in get_data.
    """
    if not is_train:
        if len(getattr(args, "val_data", None) or []) != 1:
            raise ConfigError("get_wds_dataset supports one validation set only; give one --val-data, or call get_data")
        return _val_info(_val_loaders(args, data_key)[0])
    flags = replace(DataConfig.from_object(args), train_num_samples=None)
    if data_key is not None:
        flags = replace(flags, data_key=data_key)
    if force_num_samples is not None:
        flags = replace(flags, train_data_mix_weights=[float(number) for number in force_num_samples])
    world_size = int(getattr(args, "world_size", 1) or 1)
    options = _options(args, world_size) | {"batch_size": _batch_size(args, world_size)}
    options["seed"] = int(getattr(args, "seed", 0) or 0)
    loader = build_train_loader(flags, **options)
    sequences = _epoch_sequences(args, loader, force_num_samples)
    global_batch = options["batch_size"] * world_size
    num_batches = sequences // global_batch if floor else -(-sequences // global_batch)
    if num_batches == 0:
        raise ConfigError(f"an epoch of {sequences} sequences is less than one global batch of {global_batch}")
    return DataInfo(_TrainTokens(loader, num_batches, num_batches * global_batch, epoch), loader)


def _epoch_sequences(args: Any, loader: TrainLoader, forced: Sequence[int] | None) -> int:
    if forced is not None:
        return sum(forced)
    if getattr(args, "train_num_samples", None) is not None:
        return int(args.train_num_samples)
    known = [source.num_sequences for source in loader.sources]
    if None in known:
        raise ConfigError("the size of the training data is not known; use --train-num-samples, or create a manifest")
    return sum(number for number in known if number is not None)


def _val_loaders(args: Any, data_key: str | None = None) -> list[ValLoader]:
    validation, flags = ValidationConfig.from_object(args), DataConfig.from_object(args)
    if data_key is not None:
        validation = replace(validation, val_data_key=[data_key])
    world_size = int(getattr(args, "world_size", 1) or 1)
    options = _options(args, world_size) | {"batch_size": _val_batch_size(args, world_size)}
    return build_val_loaders(validation, flags, **options)


def _val_info(loader: ValLoader) -> DataInfo:
    return DataInfo(_ValTokens(loader, loader.num_sequences or 0), loader)


def _options(args: Any, world_size: int) -> dict[str, Any]:
    seq_len, vocab_size = getattr(args, "seq_len", None), getattr(args, "vocab_size", None)
    if seq_len is None or vocab_size is None:
        from open_lm.model.transformer import create_params

        params = create_params(args)
        seq_len, vocab_size = seq_len or params.seq_len, vocab_size or params.vocab_size
    return {
        "seq_len": int(seq_len),
        "vocab_size": int(vocab_size),
        "rank": int(getattr(args, "rank", 0) or 0),
        "world_size": world_size,
    }


def _batch_size(args: Any, world_size: int) -> int:
    """Return the sequences per rank from the first attribute of `args` that is set."""
    for name in ("per_gpu_batch_size", "batch_size"):
        if getattr(args, name, None):
            return int(getattr(args, name))
    total = int(getattr(args, "global_batch_size", None) or DataConfig.global_batch_size)
    if total % world_size:
        raise ConfigError(f"--global-batch-size: found {total}, not divisible by the world size {world_size}")
    return total // world_size


def _val_batch_size(args: Any, world_size: int) -> int:
    if getattr(args, "per_gpu_val_batch_size", None):
        return int(args.per_gpu_val_batch_size)
    total = getattr(args, "global_val_batch_size", None)
    if not total:
        return _batch_size(args, world_size)
    if int(total) % world_size:
        raise ConfigError(f"--global-val-batch-size: found {total}, not divisible by the world size {world_size}")
    return int(total) // world_size
