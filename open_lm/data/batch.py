"""A rank's batches as worker processes prepare them: plan -> rows -> inputs and targets.

Worker w of W prepares batches w, w + W, … of the rank; torch's DataLoader hands them out in order, so that the number
of workers changes nothing. A user's mistake that a worker finds travels as a message and is raised in the main process.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from open_lm import errors
from open_lm.config import DataConfig
from open_lm.data.masking import IGNORE_INDEX, mask_targets
from open_lm.data.plan import Order, Plan, Samples, SizeOf
from open_lm.data.shard_format import PAD_ID
from open_lm.data.stream import Notice, Reader, StreamSpec, make_reader
from open_lm.errors import DataError, UserError

_PREFETCHED_BATCHES = 4  # of each worker
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch.

    inputs, targets (B, T) int64; masked targets are IGNORE_INDEX, and so is every target of a filler row. `filled` (B,)
    bool tells the rows that hold data, `num_samples` how many. `per_source` counts those rows by source. `skipped` rows
    are filler in place of sequences that were too short or (where tolerated) broken.
    """

    inputs: Tensor
    targets: Tensor
    filled: Tensor
    num_samples: int
    per_source: tuple[int, ...]
    skipped: int

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return replace(
            self,
            inputs=self.inputs.pin_memory(),
            targets=self.targets.pin_memory(),
            filled=self.filled.pin_memory(),
        )


@dataclass(frozen=True)
class TargetMask:
    """The --target-mask-left, --target-mask-individual and --squash-mask-left of a run."""

    left: int | None = None
    individual: int | None = None
    squash: bool = False
    padding: bool = True  # PAD_ID, which fills up the last sequence of a dataset, is no target

    @classmethod
    def of(cls, data: DataConfig) -> TargetMask:
        return cls(data.target_mask_left, data.target_mask_individual, data.squash_mask_left)


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


def make_batch(job: Job, reader: Reader, samples: Samples) -> Batch:
    """The rank's part of a global batch `samples` (at most global_batch_size of them)."""
    own = samples.rows(job.rank * job.batch_size, (job.rank + 1) * job.batch_size)
    rows, filled = reader.read(own)
    absent = job.batch_size - len(rows)
    if absent:
        rows = np.concatenate([rows, np.zeros((absent, rows.shape[1]), np.int64)])
        filled = np.concatenate([filled, np.zeros(absent, bool)])
    tokens, valid = torch.from_numpy(rows), torch.from_numpy(filled)
    is_padding = tokens == PAD_ID
    tokens = tokens.masked_fill(is_padding, job.stream.vocab_size + PAD_ID)  # as an input it counts from the end
    targets = tokens[:, 1:].masked_fill(is_padding[:, 1:] & job.mask.padding, IGNORE_INDEX)
    inputs, targets = mask_targets(
        tokens[:, :-1],
        targets,
        mask_left=job.mask.left,
        mask_individual=job.mask.individual,
        squash=job.mask.squash,
    )
    targets = targets.masked_fill(~valid[:, None], IGNORE_INDEX)
    per_source = np.bincount(own.source[filled[: len(own.source)]], minlength=len(job.stream.sources))
    num_samples = int(filled.sum())
    skipped = len(own.source) - num_samples
    return Batch(inputs.contiguous(), targets, valid, num_samples, tuple(per_source.tolist()), skipped)


class _Stream(IterableDataset[Item]):
    """A rank's batches in order; of these the ones that this worker prepares."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Iterator[Item]:
        job = self.job
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = make_reader(job.stream)
        try:
            plan = Plan(job.stream.sources, job.seed, job.order, size_of=reader.size_of, state=job.state)
            first = plan.position
            for number in count():
                left = job.global_batch_size
                if job.limit is not None:
                    left = min(left, job.limit - (plan.position - first))
                samples = plan.take(left, partial=job.ends)
                if not len(samples.source):
                    return
                if number % workers == own:
                    reader.prefetch(plan.upcoming())
                    batch = make_batch(job, reader, samples)
                    notices, reader.notices = tuple(reader.notices), []
                    yield Item(batch, plan.state(), notices)
        except UserError as error:
            yield Item(None, {}, tuple(reader.notices), (type(error).__name__, str(error)))


def _leave_interrupts_to_the_main_process(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def items(job: Job, workers: int, told: set[str]) -> Iterator[Item]:
    """The items of a job in order, prepared by `workers` processes (0: by this one).

    Notices that are not in `told` are logged. UserError: what a worker has found, as it found it.
    """
    loader: DataLoader[Item] = DataLoader(
        _Stream(job),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCHED_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_interrupts_to_the_main_process,
        generator=torch.Generator(),  # one of its own, so that the number of workers leaves the global one alone
    )
    for item in loader:
        _tell(item.notices, told, job.rank)
        if item.failure:
            name, message = item.failure
            raise getattr(errors, name, DataError)(message)
        yield item


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
