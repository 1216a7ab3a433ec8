"""Counts what a run has done, for the display."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from open_lm.datapreprocess.job import PreprocessJob
from open_lm.datapreprocess.progress import TOKENIZING, WRITING, Display, Snapshot, memory_in_use
from open_lm.datapreprocess.units import UnitReport, UnitTask
from open_lm.datapreprocess.writer import WrittenShard

_MEASURE_EVERY_S = 2.0


class Monitor:
    """Takes note of finished units and shards and shows how far the run has come."""

    def __init__(self, job: PreprocessJob, dtype: np.dtype[np.generic], workers: int) -> None:
        self._job, self._workers = job, workers
        self._unit_of_run_bytes = dtype.itemsize * (job.length if job.shuffle else 1)  # a run counts sequences, or ids
        self._display = Display()
        self._stage = TOKENIZING
        self._done_bytes = self._total_bytes = self._files_done = self._spilled_bytes = 0
        self._tokens: Counter[str] = Counter()
        self._pieces_left: Counter[str] = Counter()
        self._shards_done = self._shards = self._tokens_written = 0
        self._memory, self._measured = 0, 0.0
        self.problems = 0  # bad documents and broken files so far

    def begin_tokenizing(self, tasks: Sequence[UnitTask], done: Iterable[UnitReport]) -> None:
        """Start anew with these units, of which some are done."""
        self._tasks = {task.unit.index: task for task in tasks}
        self._pieces_left = Counter(piece.url for task in tasks for piece in task.unit.pieces)
        self._total_bytes = sum(task.unit.num_bytes for task in tasks)
        self._done_bytes = self._files_done = self._spilled_bytes = self.problems = 0
        self._tokens.clear()
        for report in done:
            self._count(report)
        self._show()

    def finished_unit(self, report: UnitReport) -> None:
        self._count(report)
        self._show()

    def _count(self, report: UnitReport) -> None:
        task = self._tasks[report.index]
        self._done_bytes += report.num_bytes
        self._tokens[task.unit.source] += report.tokens
        self._spilled_bytes += sum(report.runs) * self._unit_of_run_bytes
        self.problems += sum(report.bad.values()) + len(report.broken)
        for piece in task.unit.pieces if report.last else ():
            self._pieces_left[piece.url] -= 1
            self._files_done += not self._pieces_left[piece.url]

    def begin_writing(self, num_shards: int) -> None:
        self._stage, self._shards = WRITING, num_shards
        self._show()

    def finished_shard(self, shard: WrittenShard) -> None:
        self._shards_done += 1
        self._tokens_written += shard.info.num_tokens
        self._show()

    def tick(self) -> None:
        self._show()

    def end(self) -> None:
        """The stage is over."""
        self._show(final=True)

    def _memory_bytes(self) -> int:
        """Of all processes; looking through them takes milliseconds, so not at every unit."""
        if time.monotonic() - self._measured > _MEASURE_EVERY_S:
            self._memory, self._measured = memory_in_use(), time.monotonic()
        return self._memory

    def _show(self, final: bool = False) -> None:
        writing = self._stage == WRITING
        named = {name: tokens for name, tokens in self._tokens.items() if len(self._tokens) > 1}
        self._display.show(
            Snapshot(
                stage=self._stage,
                done_bytes=min(self._done_bytes, self._total_bytes),
                total_bytes=self._total_bytes,
                files_done=self._files_done,
                files=len(self._pieces_left),
                tokens=self._tokens_written if writing else self._tokens.total(),
                sources=named,
                spilled_bytes=self._spilled_bytes,
                memory_bytes=self._memory_bytes(),
                workers=self._workers,
                shards_done=self._shards_done,
                shards=self._shards,
                bad_documents=self.problems,
            ),
            final,
        )
