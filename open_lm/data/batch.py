"""A rank's batches as worker processes prepare them: plan -> rows -> batch, the stages of a webdataset pipeline.

Worker w of W prepares batches w, w + W, … of the rank; torch's DataLoader hands them out in order, so that the number
of workers changes nothing. A user's mistake that a worker finds travels as a message and is raised in the main process.

webdataset composes the stages and splits them among workers. Its tar iteration and shuffle buffers have no part: they
read a shard from front to back, which neither gives a place in the order that a few integers can name nor lets a worker
take only its own samples, and they take a Python object for each member, where rows are gathered here from the mapped
file at once. Nor have its handlers, which go on without the sample: here a row that cannot be used stays a row.
torchdata's StatefulDataLoader keeps a state for each worker, which as many workers have to take back; the position in
the plan that comes with each batch fits any number of them, and costs nothing beside.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from open_lm import errors
from open_lm.config.sections import DataConfig
from open_lm.data.masking import IGNORE_INDEX, mask_targets
from open_lm.data.order import Order, Plan, Samples, SizeOf
from open_lm.data.shard_format import PAD_ID
from open_lm.data.stream import Notice, Reader, StreamSpec, make_reader
from open_lm.errors import DataError, UserError

_PREFETCHED_BATCHES = 4  # of each worker
_PARENT_IS_LOOKED_FOR_SECONDS = 2  # by each worker
_VISITS_AHEAD = 16  # that may be fetched before they begin
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetMask:
    """The --target-mask-left, --target-mask-individual and --squash-mask-left of a run."""

    left: int | None = None
    individual: int | None = None
    squash: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> TargetMask:
        return cls(data.target_mask_left, data.target_mask_individual, data.squash_mask_left)


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch, in the width they are stored in; what is trained on is made where they lie.

    rows (B, T + 1) of `stream.row_dtype`: ids, PAD_ID only where that is signed. `filled` (B,) bool tells the rows that
    hold data, `num_samples` how many. `per_source` counts those rows by source. `skipped` rows are filler in place of
    sequences that were too short or (where tolerated) broken.
    """

    rows: Tensor
    filled: Tensor
    num_samples: int
    per_source: tuple[int, ...]
    skipped: int
    vocab_size: int
    mask: TargetMask

    def __reduce__(self) -> tuple[Any, ...]:
        """Batches travel from a worker as plain bytes through its pipe. torch would pass a descriptor of shared memory
        for each tensor, which takes longer than so few bytes do and fails where /dev/shm is as small as in a container.
        """
        others = (getattr(self, field.name) for field in fields(self)[2:])
        return _from_arrays, (self.rows.numpy(), self.filled.numpy(), *others)

    @cached_property
    def tokens(self) -> Tensor:
        """All ids (B, T + 1) int64; a pad counts from the vocabulary's end, as a reader that knows no pads takes it."""
        tokens = self.rows.to(torch.int64)
        return tokens.masked_fill(tokens == PAD_ID, self.vocab_size + PAD_ID) if self._may_be_padded else tokens

    @property
    def inputs(self) -> Tensor:
        """(B, T) int64."""
        return self._split[0]

    @property
    def targets(self) -> Tensor:
        """(B, T) int64; masked ones, pads and all of a filler row are IGNORE_INDEX."""
        return self._split[1]

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        targets = self.tokens[:, 1:]
        if self._may_be_padded:
            targets = targets.masked_fill(self.rows[:, 1:] == PAD_ID, IGNORE_INDEX)
        inputs, targets = mask_targets(
            self.tokens[:, :-1],
            targets,
            mask_left=self.mask.left,
            mask_individual=self.mask.individual,
            squash=self.mask.squash,
        )
        if self.num_samples < len(self.rows):
            targets = targets.masked_fill(~self.filled[:, None], IGNORE_INDEX)
        return inputs.contiguous(), targets.contiguous()

    @property
    def _may_be_padded(self) -> bool:
        return self.rows.dtype.is_signed

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; from page-locked memory the copy goes on while the caller does."""
        rows, filled = (tensor.to(device, non_blocking=True) for tensor in (self.rows, self.filled))
        return replace(self, rows=rows, filled=filled)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return replace(self, rows=self.rows.pin_memory(), filled=self.filled.pin_memory())


def _from_arrays(rows: np.ndarray, filled: np.ndarray, *others: Any) -> Batch:
    return Batch(torch.from_numpy(rows), torch.from_numpy(filled), *others)


@dataclass(frozen=True)
class Item:
    """What a worker sends: a batch and the position after it, or the user's mistake that ends the stream."""

    batch: Batch | None
    state: dict[str, Any]
    notices: tuple[Notice, ...]
    failure: tuple[str, str] | None = None

    def pin_memory(self) -> Item:
        return replace(self, batch=self.batch.pin_memory() if self.batch else None)


@dataclass(frozen=True)
class Job:
    """All that a worker needs to prepare one rank's batches; plain values."""

    stream: StreamSpec
    order: Order
    seed: int
    batch_size: int  # of the rank
    rank: int
    world_size: int
    mask: TargetMask
    ends: bool = False  # one pass, whose last batch may be filled up; else running out of data is an error
    limit: int | None = None  # sequences after which the pass ends early
    state: dict[str, Any] | None = None

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size


class _Planned(NamedTuple):
    """A global batch before anything of it is read."""

    samples: Samples
    state: dict[str, Any]  # the position after it
    upcoming: list[tuple[int, int]]  # shards to fetch ahead


class Stages:
    """The stages of a job's pipeline in one process; what they share is made with the first batch."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @cached_property
    def _reader(self) -> Reader:
        return make_reader(self.job.stream)

    def plan(self) -> Iterator[_Planned]:
        """The global batches in order. Each worker counts through all, which costs little, and reads its own."""
        job = self.job
        plan = Plan(job.stream.sources, job.seed, job.order, size_of=self._reader.size_of, state=job.state)
        first = plan.position
        while True:
            left = job.global_batch_size
            if job.limit is not None:
                left = min(left, job.limit - (plan.position - first))
            samples = plan.take(left, partial=job.ends)
            if not len(samples.source):
                return
            yield _Planned(samples, plan.state(), plan.upcoming(_VISITS_AHEAD))

    def read(self, planned: Iterable[_Planned]) -> Iterator[Item]:
        """The rank's part of each global batch."""
        for samples, state, upcoming in planned:
            own = samples.rows(self.job.rank * self.job.batch_size, (self.job.rank + 1) * self.job.batch_size)
            self._reader.prefetch(own, upcoming)
            batch = self._batch(own)
            notices, self._reader.notices = tuple(self._reader.notices), []
            yield Item(batch, state, notices)

    def _batch(self, own: Samples) -> Batch:
        """The rank's rows of a global batch (at most batch_size of them), filled up with filler."""
        job = self.job
        rows, filled = self._reader.read(own)
        num_samples = int(filled.sum())
        per_source = np.bincount(own.source[filled], minlength=len(job.stream.sources))
        absent = job.batch_size - len(rows)
        if absent:
            rows = np.pad(rows, ((0, absent), (0, 0)))
            filled = np.pad(filled, (0, absent))
        return Batch(
            torch.from_numpy(rows),
            torch.from_numpy(filled),
            num_samples,
            tuple(per_source.tolist()),
            skipped=len(own.source) - num_samples,
            vocab_size=job.stream.vocab_size,
            mask=job.mask,
        )

    def carry_failure(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, and a user's mistake as the last of them."""
        try:
            yield from items
        except UserError as error:
            yield Item(None, {}, tuple(self._reader.notices), (type(error).__name__, str(error)))


def pipeline(job: Job) -> Any:
    """A rank's batches as a webdataset pipeline, an IterableDataset of `Item`."""
    from webdataset import DataPipeline, split_by_worker

    stages = Stages(job)
    return DataPipeline(stages.plan, split_by_worker, stages.read, stages.carry_failure)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started in here never see interrupts and the signals that ask a run to save and stop, which a scheduler
    may send to every process of the job: they are the main process's to answer, and it does when this ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_parent(_worker: int) -> None:
    """In a worker, whose signals are held back: a SIGTERM of the main process itself still ends it, and so does the
    main process's death, after which nobody would take the batches that the worker waits to hand over."""
    main = multiprocessing.parent_process()
    assert main is not None
    parent = main.pid

    def wait_for_the_parent() -> None:
        while os.getppid() == parent:
            told = signal.sigtimedwait({signal.SIGTERM}, _PARENT_IS_LOOKED_FOR_SECONDS)
            if told is not None and told.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=wait_for_the_parent, daemon=True).start()


def items(job: Job, workers: int, told: set[str]) -> Iterator[Item]:
    """The items of a job in order, prepared by `workers` processes (0: by this one).

    Notices that are not in `told` are logged. UserError: what a worker has found, as it found it; DataError for a
    worker that was killed.
    """
    loader: DataLoader[Item] = DataLoader(
        pipeline(job),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCHED_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_end_with_the_parent,
        generator=torch.Generator(),  # one of its own, so that the number of workers leaves the global one alone
    )
    for item in _from_workers(loader):
        _tell(item.notices, told, job.rank)
        if item.failure:
            name, message = item.failure
            raise getattr(errors, name, DataError)(message)
        yield item


def _from_workers(loader: DataLoader[Item]) -> Iterator[Item]:
    """What the loader gives; DataError for a worker that died, when its batch is waited for.

    torch would raise from a signal handler, in the middle of whatever the main process is doing just then; its loader
    looks after its workers every few seconds as well, and that is soon enough.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    with _signals_held_back():
        iterator = iter(loader)
    if in_main_thread and loader.num_workers:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    death = ""
    while not death:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            death = str(error)
    del iterator  # ends the other workers; an error that came from its frames would keep it
    raise DataError(
        f"{death}: a process that prepares batches was ended from outside; if memory ran out (the kernel's log names "
        "the processes it kills for that), give fewer --workers or smaller shards"
    )


def size_of_shards(job: Job) -> SizeOf:
    """Sizes of shards that no manifest tells, by a reader made when the first is asked for."""
    readers: list[Reader] = []

    def size_of(source: int, shard: int) -> int:
        if not readers:
            readers.append(make_reader(job.stream))
        return readers[0].size_of(source, shard)

    return size_of


def _tell(notices: Sequence[Notice], told: set[str], rank: int) -> None:
    """Log what was not `told` before: several workers find the same, and so does every reading of a set."""
    for text, same_on_all_ranks in notices:
        if text not in told and (rank == 0 or not same_on_all_ranks):
            logger.warning(text)
        told.add(text)
