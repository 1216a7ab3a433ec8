"""The training batches of one rank: samples -> token ids -> batches, with a position that can be saved and restored.

    loader = build_train_loader(config.data, seq_len=…, vocab_size=…, batch_size=…, rank=…, world_size=…, seed=…)
    for batch, state in loader.batches(num_steps): …

Batch path: training/trainer.py iterates over `TrainLoader.batches`. Next: order.py chooses the samples of each global
batch, stream.py reads them. The loaders of validation sets are in validation_loader.py.

Worker w of W prepares the rank's batches w, w + W, … and torch's DataLoader returns them in order, so the number of
workers does not change the batches. `state` is the position after the batch: resuming from it continues with the next
sequence, on any number of ranks and workers. A user error in a worker is raised in the main process.

webdataset composes the stages. Its tar reading and shuffle buffers are not used: they
read a shard from front to back, so a few integers could not name a position in the order, a worker could not read only
its own samples, and every member would cost a Python object (here, ids are gathered from the mapped file at once). Its
error handlers drop samples; here an unusable sequence keeps its place in the batch. torchdata's StatefulDataLoader
keeps a state for each worker, which only the same number of workers can restore.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from open_lm import errors
from open_lm.config.sections import DataConfig
from open_lm.data.batch import Batch, TargetMask
from open_lm.data.epochs import check_enough_data, check_run_length
from open_lm.data.fetch import FetchFolder
from open_lm.data.order import (
    DataOrder,
    FormerOrder,
    OrderSettings,
    Piece,
    Samples,
    Source,
    choose_lanes,
    make_order,
    rows_of_rank,
)
from open_lm.data.sources import check_data_key, find_sources
from open_lm.data.stream import Notice, Reader, StreamSpec, lazy_size_of, make_reader
from open_lm.data.teacher_cache import CacheSpec, TargetReader, open_caches
from open_lm.data.workers import exit_with_parent, iterate_workers
from open_lm.errors import DataError, UserError

_PREFETCHED_BATCHES = 4  # by each worker
_PIECES_AHEAD = 16  # of shards, which may be fetched before they are read
_ROWS_SKIPPED = 1 << 20  # at a time
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerResult:
    """A message of a worker: a batch and the position after it, or the user error that ends the data."""

    batch: Batch | None
    state: dict[str, Any]
    notices: tuple[Notice, ...]
    failure: tuple[str, str] | None = None  # class name and message

    def pin_memory(self) -> WorkerResult:
        return replace(self, batch=self.batch.pin_memory() if self.batch else None)


@dataclass(frozen=True)
class BatchSpec:
    """The settings with which a worker prepares one rank's batches, as plain values that can be sent to it."""

    stream: StreamSpec
    order: OrderSettings
    seed: int
    batch_size: int  # of the rank
    rank: int
    world_size: int
    mask: TargetMask
    pad_last_batch: bool = False  # end after one pass and fill up the last batch; else running out of data is an error
    max_sequences: int | None = None  # end the pass after this many sequences
    state: dict[str, Any] | None = None
    cache: CacheSpec | None = None  # of a teacher's distributions

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size


class _LocalBatch(NamedTuple):
    """The rank's samples of a global batch, not yet read."""

    samples: Samples
    state: dict[str, Any]  # the position after it
    upcoming: list[Piece]  # to fetch ahead


class BatchPipeline:
    """The stages that prepare batches in one process; they share a reader, which is created with the first batch."""

    def __init__(self, spec: BatchSpec) -> None:
        self.spec = spec

    @cached_property
    def _reader(self) -> Reader:
        return make_reader(self.spec.stream)

    @cached_property
    def _targets(self) -> TargetReader | None:
        cache = self.spec.cache
        return None if cache is None else TargetReader(cache, self.spec.stream.sources)

    def local_batches(self) -> Iterator[_LocalBatch]:
        """Yield the batches of this worker. It advances through all global batches, and looks up its own samples."""
        spec, info = self.spec, get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        order = make_order(spec.stream.sources, spec.seed, spec.order, size_of=self._reader.size_of, state=spec.state)
        rows = rows_of_rank(order.lanes, spec.global_batch_size, spec.rank, spec.world_size)
        first, ahead = order.position, list[Piece]()
        self._reader.prefetch(order.entered() + order.upcoming(order.lanes))
        for number in itertools.count():
            count, before = spec.global_batch_size, order.position
            if spec.max_sequences is not None:
                count = min(count, spec.max_sequences - (before - first))
            is_own = number % num_workers == worker
            samples = order.take(count, rows[rows < count] if is_own else rows[:0], partial=spec.pad_last_batch)
            if order.position == before:
                return
            if is_own:
                before_ahead = ahead
                ahead = order.entered() + order.upcoming(_PIECES_AHEAD) if self._reader.needs_prefetch else []
                yield _LocalBatch(samples, order.state(), ahead if ahead != before_ahead else [])

    def read(self, batches: Iterable[_LocalBatch]) -> Iterator[WorkerResult]:
        """Read the samples of each batch."""
        for samples, state, upcoming in batches:
            self._reader.prefetch(upcoming)
            batch = self._batch(samples)
            notices, self._reader.notices = tuple(self._reader.notices), []
            yield WorkerResult(batch, state, notices)

    def _batch(self, samples: Samples) -> Batch:
        """Read the rank's samples (at most batch_size), and add filler sequences up to batch_size."""
        spec = self.spec
        ids, filled = self._reader.read(samples)
        teacher = None if self._targets is None else self._targets.read(samples, ids, filled)
        num_samples = int(filled.sum())
        per_source = np.bincount(samples.source[filled], minlength=len(spec.stream.sources))
        missing = spec.batch_size - len(ids)
        if missing:
            ids = np.pad(ids, ((0, missing), (0, 0)))
            filled = np.pad(filled, (0, missing))
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(filled),
            num_samples,
            tuple(per_source.tolist()),
            skipped=len(samples.source) - num_samples,
            vocab_size=spec.stream.vocab_size,
            mask=spec.mask,
            teacher=teacher,
        )

    def catch_errors(self, results: Iterable[WorkerResult]) -> Iterator[WorkerResult]:
        """Yield the results; a user error becomes the last of them."""
        try:
            yield from results
        except UserError as error:
            yield WorkerResult(None, {}, tuple(self._reader.notices), (type(error).__name__, str(error)))


def build_pipeline(spec: BatchSpec) -> Any:
    """Return a rank's batches as a webdataset pipeline, an IterableDataset of `WorkerResult`."""
    from webdataset import DataPipeline

    stages = BatchPipeline(spec)
    return DataPipeline(stages.local_batches, stages.read, stages.catch_errors)


def load_batches(spec: BatchSpec, workers: int, logged: set[str]) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Yield (batch, state after it) in order, prepared by `workers` processes (0: by this one).

    Log the workers' notices that are not yet in `logged`. UserError: as a worker raised it; DataError for a worker that
    was killed.
    """
    loader: DataLoader[WorkerResult] = DataLoader(
        build_pipeline(spec),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCHED_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=exit_with_parent,
        generator=torch.Generator(),  # a separate one: the number of workers must not change the global random state
    )
    for result in iterate_workers(loader):
        for text, same_on_all_ranks in result.notices:
            # Several workers find the same problem, and so does every pass over a validation set.
            if text not in logged and (spec.rank == 0 or not same_on_all_ranks):
                logger.warning(text)
            logged.add(text)
        if result.failure:
            name, message = result.failure
            raise getattr(errors, name, DataError)(message)
        assert result.batch is not None
        yield result.batch, result.state


class TrainLoader:
    """The batches of one rank; they end only if the number of passes is limited and the data runs out.

    `sources` are the data sets of the mixture, `state` is the position after the last batch. With `allow_changed`, a
    state of other data is accepted with a warning (see `resume.resume_state`).
    """

    def __init__(self, spec: BatchSpec, workers: int, folder: FetchFolder | None, allow_changed: bool = False) -> None:
        self._spec, self._workers, self._folder, self._allow_changed = spec, workers, folder, allow_changed
        self._iterator: Iterator[tuple[Batch, dict[str, Any]]] | None = None
        self._logged: set[str] = set()
        self.sources: tuple[Source, ...] = spec.stream.sources
        self.cache = spec.cache
        self.state = self._order_from(spec.state).state()

    def _order_from(self, state: dict[str, Any] | None, allow_changed: bool = False) -> DataOrder | FormerOrder:
        spec = self._spec
        order = make_order(
            self.sources,
            spec.seed,
            spec.order,
            size_of=lazy_size_of(spec.stream),
            state=state,
            allow_changed=allow_changed or self._allow_changed,
        )
        if order.change_warning and spec.rank == 0:
            logger.warning(order.change_warning)
        return order

    @property
    def tokens_available(self) -> list[int | None]:
        """Tokens of one pass over each source; None if shards must be read to know."""
        sequences = [source.num_sequences for source in self.sources]
        return [None if number is None else number * self._spec.stream.seq_len for number in sequences]

    def batches(self, num_batches: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yield the next `num_batches` batches, each with the state after it (JSON-able).

        Another call continues after the last batch. DataError, StorageError: from reading the data.
        """
        for _ in range(num_batches):
            if self._iterator is None:
                self._iterator = load_batches(replace(self._spec, state=self.state), self._workers, self._logged)
            try:
                batch, state = next(self._iterator)
            except BaseException:
                self.close()
                raise
            self._log_new_passes(state)
            self.state = state
            yield batch, state

    def _log_new_passes(self, state: dict[str, Any]) -> None:
        for source, before, after in zip(self.sources, self.state["sources"], state["sources"], strict=True):
            if after["pass"] > before["pass"] and self._spec.rank == 0:
                logger.info(f"starting pass {after['pass'] + 1} over {source.name}")

    def check_has_batches(self, state: dict[str, Any], num_batches: int) -> None:
        """Raise DataError if the data lack `num_batches` batches after `state`; unknown sizes count as enough."""
        if self._spec.order.max_passes is not None:
            taken = sum(source["samples"] for source in state["sources"])
            count = taken + num_batches * self._spec.global_batch_size
            lanes = int(state.get("lanes", 1))
            check_enough_data(self.sources, count, self._spec.stream.seq_len, lanes)

    def rewind(self, state: dict[str, Any], skip_batches: int = 0, allow_changed: bool = False) -> bool:
        """Move to `skip_batches` global batches after `state`, even (on request) one of other data; return if it is."""
        self.close()
        order = self._order_from(state, allow_changed)
        skip = skip_batches * self._spec.global_batch_size
        for first in range(0, skip, _ROWS_SKIPPED):
            order.take(min(_ROWS_SKIPPED, skip - first), np.zeros(0, np.int64))
        self.state = order.state()
        return bool(order.change_warning)

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
    reads_whole_run: bool = True,
    caches: Sequence[str] = (),
) -> TrainLoader:
    """Build the loader of one rank's training batches.

    `batch_size` is the rank's number of sequences per optimizer step, over all accumulated micro-batches. `state` is
    the one that `batches` yielded with the last step to keep; its seed replaces `seed`. Raises ConfigError, DataError
    or StorageError at once for missing shards, weights that do not fit the sources, too little data for the run in one
    pass, or a state of other data (without --allow-changed-data). With `reads_whole_run` false, earlier steps may have
    read other data: `TrainLoader.check_has_batches` then checks the length. `caches` are the folders of
    --distill-cache; see `open_caches`.
    """
    data = DataConfig.from_object(data)
    check_data_key(data.data_key, "--data-key")
    sources = find_sources(data)
    one_pass = bool(data.dataset_manifest) and not data.multiple_data_passes
    global_batch_size = batch_size * world_size
    is_checked = one_pass and reads_whole_run
    lanes = choose_lanes(global_batch_size, sources, has_cache=data.cache_dir is not None)
    check_run_length(
        data,
        sources,
        one_pass=is_checked,
        seq_len=seq_len,
        global_batch_size=global_batch_size,
        lanes=lanes,
        log=rank == 0,
    )
    folder = FetchFolder.if_needed(sources)
    spec = BatchSpec(
        stream=StreamSpec.from_config(data, sources, data.data_key, folder, seq_len=seq_len, vocab_size=vocab_size),
        order=OrderSettings(
            resampled=data.dataset_resampled,
            shuffle_samples=not data.disable_buffer,
            max_passes=1 if one_pass else None,
            lanes=lanes,
        ),
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        mask=TargetMask.from_config(data),
        state=state,
        cache=open_caches(caches, sources) if caches else None,
    )
    return TrainLoader(spec, data.workers, folder, data.allow_changed_data)
