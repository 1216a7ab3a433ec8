"""Count the finished work of a run for the progress display."""

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
    """A counter of finished units and shards that shows the progress of the run."""

    def __init__(self, job: PreprocessJob, dtype: np.dtype[np.generic], workers: int) -> None:
        self._job, self._workers = job, workers
        self._bytes_per_item = dtype.itemsize * (job.length if job.shuffle else 1)  # a run counts sequences or ids
        self._display = Display()
        self._stage = TOKENIZING
        self._done_bytes = self._total_bytes = self._files_done = self._spilled_bytes = 0
        self._tokens: Counter[str] = Counter()
        self._remaining_pieces: Counter[str] = Counter()  # by file
        self._shards_done = self._shards = self._tokens_written = 0
        self._memory, self._measured = 0, 0.0
        self.problems = 0  # bad documents and broken files so far

    def start_tokenizing(self, tasks: Sequence[UnitTask], done: Iterable[UnitReport]) -> None:
        """Reset the counts for these units; `done` are the reports of earlier runs."""
        self._tasks = {task.unit.index: task for task in tasks}
        self._remaining_pieces = Counter(piece.url for task in tasks for piece in task.unit.pieces)
        self._total_bytes = sum(task.unit.num_bytes for task in tasks)
        self._done_bytes = self._files_done = self._spilled_bytes = self.problems = 0
        self._tokens.clear()
        for report in done:
            self._count(report)
        self._show()

    def finished_unit(self, report: UnitReport) -> None:
        """Count a finished unit or chunk."""
        self._count(report)
        self._show()

    def _count(self, report: UnitReport) -> None:
        task = self._tasks[report.index]
        self._done_bytes += report.num_bytes
        self._tokens[task.unit.source] += report.tokens
        self._spilled_bytes += sum(report.runs) * self._bytes_per_item
        self.problems += sum(report.bad.values()) + len(report.broken)
        for piece in task.unit.pieces if report.last else ():
            self._remaining_pieces[piece.url] -= 1
            self._files_done += not self._remaining_pieces[piece.url]

    def start_writing(self, num_shards: int) -> None:
        """Start the writing stage."""
        self._stage, self._shards = WRITING, num_shards
        self._show()

    def finished_shard(self, shard: WrittenShard) -> None:
        """Count a finished shard."""
        self._shards_done += 1
        self._tokens_written += shard.info.num_tokens
        self._show()

    def tick(self) -> None:
        """Update the display."""
        self._show()

    def finish_stage(self) -> None:
        """Show the final state of a stage."""
        self._show(final=True)

    def _memory_bytes(self) -> int:
        """Return the memory of all processes; a measurement takes milliseconds, so it is cached for a while."""
        if time.monotonic() - self._measured > _MEASURE_EVERY_S:
            self._memory, self._measured = memory_in_use(), time.monotonic()
        return self._memory

    def _show(self, final: bool = False) -> None:
        writing = self._stage == WRITING
        sources = self._tokens if len(self._tokens) > 1 else {}
        self._display.show(
            Snapshot(
                stage=self._stage,
                done_bytes=min(self._done_bytes, self._total_bytes),
                total_bytes=self._total_bytes,
                files_done=self._files_done,
                files=len(self._remaining_pieces),
                tokens=self._tokens_written if writing else self._tokens.total(),
                sources=dict(sources),
                spilled_bytes=self._spilled_bytes,
                memory_bytes=self._memory_bytes(),
                workers=self._workers,
                shards_done=self._shards_done,
                shards=self._shards,
                bad_documents=self.problems,
            ),
            final,
        )
