"""Plan the output from the unit reports: join the tails, order the runs, create the tasks of the writers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.datapreprocess.accounting import Output
from open_lm.datapreprocess.cluster import Shared
from open_lm.datapreprocess.inputs import Unit
from open_lm.datapreprocess.job import PreprocessJob
from open_lm.datapreprocess.pack import cut, pad, padded_dtype
from open_lm.datapreprocess.shuffle import MIXED, OrderedRuns, Run, Runs, ShuffledRuns, ShuffledRunWriter, random_keys
from open_lm.datapreprocess.units import UnitReport, UnitTask
from open_lm.datapreprocess.writer import ShardPlan, ShardTask, Tail, WrittenShard, group_shards, plan_shards
from open_lm.errors import DataError

_TAIL_STREAM = 1 << 60  # separates the keys of joined tails from those of units
_TASK_BYTES = 64 << 20
CountBuckets = Callable[[Sequence[Run], int], np.ndarray]


@dataclass(frozen=True)
class WritePlan:
    """The shards and tasks of one output; `source` is its only source, or "" for all sources."""

    source: str
    units: Sequence[Unit]
    reports: Sequence[UnitReport]
    shards: Sequence[ShardPlan]
    tasks: Sequence[ShardTask]
    tail: Tail

    def output(self, written: Sequence[WrittenShard]) -> Output:
        """Return the output after its shards are written."""
        return Output(self.source, self.units, self.reports, self.shards, written, self.tail)


@dataclass(frozen=True)
class Assembler:
    """A planner of the outputs of a run; its fields are the same for all outputs."""

    job: PreprocessJob
    work: str
    dtype: np.dtype[Any]
    buffer_bytes: int
    workers: int
    count_buckets: CountBuckets

    def plan(self, source: str, tasks: Sequence[UnitTask], reports: Sequence[UnitReport]) -> WritePlan:
        """Plan the output of these units, which are all units or those of one source; reports are in input order."""
        job = self.job
        by_index = {task.unit.index: task for task in tasks}
        spilled = [run for report in reports for run in report.runs_of(by_index[report.index])]
        runs, tail = self._shuffled(source, by_index, reports, spilled) if job.shuffle else self._ordered(spilled)
        padded = Tail(pad(tail.ids, job.length), tail.tokens_by_source) if len(tail.ids) and not job.drop_tail else None
        shards = plan_shards(job.layout, job.layout.folders_of(source), runs.num_sequences + (padded is not None))
        if not shards and not len(tail.ids):
            raise DataError(f"source {source} contains no documents; fix its files or remove the source")
        if not shards:
            raise DataError(
                f"{source + ': ' if source else ''}found {len(tail.ids)} tokens, too few for one sequence of "
                f"{job.length} ids, and --drop-tail drops them"
            )
        units = [task.unit for task in tasks]
        return WritePlan(source, units, reports, shards, self._tasks(shards, runs, padded), tail)

    def _tasks(self, shards: Sequence[ShardPlan], runs: Runs, padded: Tail | None) -> list[ShardTask]:
        """Group consecutive shards into tasks that are small enough for every worker to get some."""
        sequence_bytes = self.job.length * self.dtype.itemsize
        total_bytes = sum(shard.count for shard in shards) * sequence_bytes
        groups = group_shards(
            shards, sequence_bytes, min(max(_TASK_BYTES, self.buffer_bytes), total_bytes // (2 * self.workers))
        )
        shared = Shared(runs)
        sources = tuple(self.job.sources)
        return [
            ShardTask(
                shards=tuple(group),
                runs=shared,
                sources=sources,
                padded=padded if group is groups[-1] else None,
                kind=self.job.kind,
                dtype=self.dtype,
                has_flags=self.job.has_flags,
                work=self.work,
            )
            for group in groups
        ]

    @property
    def _run_dtype(self) -> np.dtype[Any]:
        return padded_dtype(self.dtype) if self.job.split_documents else self.dtype

    def _ordered(self, runs: Sequence[Run]) -> tuple[Runs, Tail]:
        ordered = OrderedRuns(tuple(runs), self.job.length, self._run_dtype, self.buffer_bytes)
        return ordered, Tail(*ordered.tail())

    def _shuffled(
        self, name: str, tasks: dict[int, UnitTask], reports: Sequence[UnitReport], runs: list[Run]
    ) -> tuple[Runs, Tail]:
        """Join the tails of the units within each source, then join the remainders of all sources."""
        buckets = next(iter(tasks.values())).buckets
        remainders: dict[int, np.ndarray] = {}
        for source in sorted({task.source for task in tasks.values()}):
            parts = [report.tail_ids(self.dtype) for report in reports if tasks[report.index].source == source]
            sequences, remainders[source] = cut([np.zeros(0, self.dtype), *parts], self.job.length)
            runs = runs + self._spill(name, source, source, sequences, buckets)
        sequences, tail = cut([np.zeros(0, self.dtype), *remainders.values()], self.job.length)
        token_sources = np.repeat(list(remainders), [len(ids) for ids in remainders.values()])
        stream = len(self.job.sources)
        runs = runs + self._spill(name, stream, MIXED, sequences, buckets)
        keys = random_keys(self.job.seed, _TAIL_STREAM + stream, 0, len(sequences)).tolist()
        sequence_sources = token_sources[: sequences.size].reshape(sequences.shape)
        mixed_tokens = {key: _count_by_source(row) for key, row in zip(keys, sequence_sources, strict=True)}
        counts = self.count_buckets(runs, buckets)
        shuffled = ShuffledRuns(tuple(runs), counts, self.job.length, self._run_dtype, mixed_tokens, self.buffer_bytes)
        return shuffled, Tail(tail, _count_by_source(token_sources[sequences.size :]))

    def _spill(self, name: str, stream: int, source: int, sequences: np.ndarray, buckets: int) -> list[Run]:
        """Spill the sequences made of joined tails, and return their runs."""
        writer = ShuffledRunWriter(
            storage.join(self.work, f"tails-{name or 'all'}-{stream:06d}"),
            stream=_TAIL_STREAM + stream,
            seed=self.job.seed,
            source=source,
            buckets=buckets,
            run_bytes=self.buffer_bytes,
        )
        writer.add(sequences)
        writer.flush()
        return writer.runs


def _count_by_source(token_sources: Iterable[int]) -> dict[int, int]:
    """Return the number of tokens of each source, given the source number of every token."""
    sources, counts = np.unique(np.asarray(token_sources, np.int64), return_counts=True)
    return dict(zip(sources.tolist(), counts.tolist(), strict=True))
