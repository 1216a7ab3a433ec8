"""The batches of a run and where they end: loaders for training and validation, made from the flags.

    loader = build_train_loader(config.data, seq_len=…, vocab_size=…, batch_size=…, rank=…, world_size=…, seed=…)
    for batch, state in loader.batches(num_steps): …

`state` is the position after the batch; handing it to `build_train_loader` continues with the very next sample, on any
number of ranks and workers. How a batch is made stands in batch.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from open_lm.config.sections import DataConfig, ValidationConfig
from open_lm.data.batch import Batch, Item, Job, TargetMask, items, size_of_shards
from open_lm.data.fetch import FetchFolder, FetchSettings
from open_lm.data.mixture import most_samples
from open_lm.data.order import Order, Plan, Source, check_enough, epoch_end_step, epoch_sequences, leftover
from open_lm.data.shard_format import MEMBER_KINDS
from open_lm.data.sources import collect, find_sources, find_validation_source
from open_lm.data.stream import StreamSpec, needs_folder
from open_lm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
__all__ = ["Batch", "TrainLoader", "ValLoader", "build_train_loader", "build_val_loaders"]


# --- training --------------------------------------------------------------------------------------------------------
class TrainLoader:
    """The batches of a rank, without end unless passes are limited and the data runs out.

    `sources` is what the batches are mixed from, `state` the position after the last batch handed out. With
    `allow_changed` a state of other data is taken, as `continuation.continued` says, with a warning.
    """

    def __init__(self, job: Job, workers: int, folder: FetchFolder | None, allow_changed: bool = False) -> None:
        self._job, self._workers, self._folder, self._allow_changed = job, workers, folder, allow_changed
        self._iterator: Iterator[Item] | None = None
        self._told: set[str] = set()
        self.sources: tuple[Source, ...] = job.stream.sources
        self.state = self._plan(job.state).state()

    def _plan(self, state: dict[str, Any] | None) -> Plan:
        job = self._job
        size_of = size_of_shards(job)
        plan = Plan(self.sources, job.seed, job.order, size_of=size_of, state=state, allow_changed=self._allow_changed)
        if plan.notice and job.rank == 0:
            logger.warning(plan.notice)
        return plan

    @property
    def tokens_available(self) -> list[int | None]:
        """Tokens of one pass over each source; None where shards have to be read to know."""
        sequences = [source.num_sequences for source in self.sources]
        return [None if number is None else number * self._job.stream.seq_len for number in sequences]

    def batches(self, num_batches: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """The next `num_batches` batches, each with the state after it (JSON-able).

        Called again, it goes on where it stopped. DataError, StorageError: as found in the data.
        """
        for _ in range(num_batches):
            if self._iterator is None:
                self._iterator = items(replace(self._job, state=self.state), self._workers, self._told)
            try:
                item = next(self._iterator)
            except BaseException:
                self.close()
                raise
            assert item.batch is not None
            self._announce_passes(item.state)
            self.state = item.state
            yield item.batch, item.state

    def _announce_passes(self, state: dict[str, Any]) -> None:
        """Say when a source is read again from its beginning."""
        for source, before, after in zip(self.sources, self.state["sources"], state["sources"], strict=True):
            if after["pass"] > before["pass"] and self._job.rank == 0:
                logger.info(f"pass {after['pass'] + 1} over {source.name} begins")

    def reaches(self, state: dict[str, Any], num_batches: int) -> bool:
        """Whether the data hold `num_batches` after `state`, as far as their sizes are known; of passes without end,
        always."""
        if self._job.order.max_passes is None:
            return True
        taken = sum(source["samples"] for source in state["sources"])
        count = taken + num_batches * self._job.global_batch_size
        needed = most_samples([source.weight for source in self.sources], count)
        sizes = [source.num_sequences for source in self.sources]
        return all(size is None or number <= size for size, number in zip(sizes, needed, strict=True))

    def rewind(self, state: dict[str, Any], skip_batches: int = 0) -> None:
        """Go to `skip_batches` global batches after `state`."""
        self.close()
        plan = self._plan(state)
        plan.take(skip_batches * self._job.global_batch_size)
        self.state = plan.state()

    def close(self) -> None:
        """Stop the workers; `batches` would start new ones from the state."""
        self._iterator = None


def build_train_loader(
    data: DataConfig,
    *,
    seq_len: int,
    vocab_size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    state: dict[str, Any] | None = None,
) -> TrainLoader:
    """The training batches of one rank.

    `batch_size` is the rank's rows of one optimizer step, all accumulated micro-batches included. `state` is what
    `batches` gave after the last step that is kept; its seed then holds, not `seed`. ConfigError, DataError or
    StorageError up front: missing shards, weights that do not fit, too little data for the run in one pass, a state of
    other data (without --allow-changed-data).
    """
    data = DataConfig.from_object(data)
    key = _checked_key(data.data_key, "--data-key")
    sources = find_sources(data)
    passes = 1 if data.dataset_manifest and not data.multiple_data_passes else None
    steps = _steps_of_run(data, seq_len, batch_size * world_size)
    if passes == 1 and steps is not None:
        check_enough(sources, steps * batch_size * world_size, seq_len)
    if steps is not None and rank == 0:
        _tell_leftovers(data, sources, passes == 1, seq_len=seq_len, global_batch_size=batch_size * world_size)
    folder = _fetch_folder(sources)
    job = Job(
        stream=_stream(data, sources, key, seq_len=seq_len, vocab_size=vocab_size, folder=folder),
        order=Order(
            resampled=data.dataset_resampled,
            shuffle_samples=not data.disable_buffer,
            max_passes=passes,
        ),
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        mask=TargetMask.of(data),
        state=state,
    )
    return TrainLoader(job, data.workers, folder, data.allow_changed_data)


def _steps_of_run(data: DataConfig, seq_len: int, global_batch_size: int) -> int | None:
    """Optimizer steps of all epochs; ConfigError where there is not even one."""
    if data.train_num_samples is None:
        return None
    steps = epoch_end_step(
        data.epochs, epoch_tokens=data.train_num_samples, seq_len=seq_len, global_batch_size=global_batch_size
    )
    if steps == 0:
        raise ConfigError(
            f"--train-num-samples {data.train_num_samples} tokens in {data.epochs} epochs are "
            f"{data.epochs * epoch_sequences(data.train_num_samples, seq_len)} sequences of {seq_len}, less than one "
            f"global batch of {global_batch_size}: give more tokens or a smaller batch"
        )
    return steps


def _tell_leftovers(
    data: DataConfig, sources: Sequence[Source], one_pass: bool, *, seq_len: int, global_batch_size: int
) -> None:
    """Say what the run will not train on: promised sequences that fill no last batch, and what is left of one pass."""
    assert data.train_num_samples is not None
    run = {"epoch_tokens": data.train_num_samples, "seq_len": seq_len, "global_batch_size": global_batch_size}
    promised = leftover(data.epochs, **run)
    if promised.sequences or promised.tokens:
        logger.info(
            f"of the promised tokens, {promised.sequences} sequences do not fill a last global batch of "
            f"{global_batch_size}, and {promised.tokens} tokens no sequence of {seq_len}: they are not trained on"
        )
    if not one_pass:
        return
    trained = epoch_end_step(data.epochs, **run) * global_batch_size
    for source, count in zip(sources, most_samples([source.weight for source in sources], trained), strict=True):
        if source.num_sequences is not None and source.num_sequences > count:
            left = source.num_sequences - count
            logger.info(f"{source.name}: {left} of its {source.num_sequences} sequences are left over after this run")


def _checked_key(key: str, flag: str) -> str:
    if key not in MEMBER_KINDS:
        raise ConfigError(f"{flag} {key}: expected one of {', '.join(MEMBER_KINDS)}")
    return key


def _stream(
    data: DataConfig,
    sources: tuple[Source, ...],
    key: str,
    *,
    seq_len: int,
    vocab_size: int,
    folder: FetchFolder | None,
) -> StreamSpec:
    return StreamSpec(
        sources=sources,
        seq_len=seq_len,
        vocab_size=vocab_size,
        data_keys=(key,) * len(sources),
        tolerated_share=data.data_tolerate_error_p if data.ignore_parse_errors else None,
        fetch=FetchSettings.of(data, folder.name if folder else None),
    )


def _fetch_folder(sources: Sequence[Source]) -> FetchFolder | None:
    return FetchFolder() if needs_folder(sources) else None


# --- validation ------------------------------------------------------------------------------------------------------
class ValLoader:
    """One validation set: every iteration gives all its sequences once, in file order.

    The last batch is filled up with filler rows, so that all ranks have the same number of batches of the same shape.
    `val_data` names the set as results do; `num_sequences` is None where shards have to be read to know.
    """

    def __init__(self, job: Job, workers: int, folder: FetchFolder | None) -> None:
        self._job, self._workers, self._folder = job, workers, folder
        self.sources = job.stream.sources
        self.val_data = [job.stream.sources[0].name]
        self.data_key = job.stream.data_keys[0]
        self.batch_size = job.batch_size
        known = job.stream.sources[0].num_sequences
        self._told: set[str] = set()
        self.num_sequences = known if known is None or job.limit is None else min(known, job.limit)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches. DataError for a set without a usable sequence, or as found in the data."""
        batches = 0
        for item in items(self._job, self._workers, self._told):
            assert item.batch is not None
            batches += 1
            yield item.batch
        if not batches:
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
    """One loader for each value of --val-data, in their order; `batch_size` is the rank's rows of a batch.

    --val-data-key is one for all or one for each (default: --data-key); masks and the tolerance of broken data are
    those of training. Problems of all sets are reported together.
    """
    validation, data = ValidationConfig.from_object(validation), DataConfig.from_object(data)
    patterns = validation.val_data or []
    keys = validation.val_data_key or [data.data_key]
    if len(keys) not in (1, len(patterns)):
        raise ConfigError(
            f"--val-data-key has {len(keys)} values for {len(patterns)} of --val-data: give one for each or one for all"
        )
    keys = [_checked_key(key, "--val-data-key") for key in keys] * (len(patterns) if len(keys) == 1 else 1)
    limit = None if validation.val_num_samples is None else max(1, validation.val_num_samples // seq_len)
    sources = collect(patterns, lambda pattern: find_validation_source(pattern, whole=not data.ignore_parse_errors))
    loaders = []
    for source, key in zip(sources, keys, strict=True):
        folder = _fetch_folder([source])
        job = Job(
            stream=_stream(data, (source,), key, seq_len=seq_len, vocab_size=vocab_size, folder=folder),
            order=Order(shuffle_shards=False, shuffle_samples=False, max_passes=1),
            seed=0,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            mask=TargetMask.of(data),
            ends=True,
            limit=limit,
        )
        loaders.append(ValLoader(job, data.workers, folder))
    return loaders
