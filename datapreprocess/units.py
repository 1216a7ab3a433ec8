"""One unit of work: read its documents, encode, cut into sequences, spill. Plain Python; the engine runs it in Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.datapreprocess.job import Job, Unit
from open_lm.datapreprocess.pack import cut
from open_lm.datapreprocess.readers import BadDocument, Document, PieceReader
from open_lm.datapreprocess.sampling import takes
from open_lm.datapreprocess.shuffle import Run, RunWriter
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import DataError

MAX_SHOWN = 20
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 1024
Report = Callable[[int, int], None]  # input bytes read and tokens made so far by this unit


@dataclass(frozen=True)
class UnitTask:
    """What a worker needs to know; `work` is the folder for runs, tails and reports."""

    unit: Unit
    work: str
    length: int
    content_key: str
    seed: int
    shuffle: bool
    factor: float
    skip_bad_lines: bool
    run_bytes: int
    check_only: bool = False

    @staticmethod
    def of(job: Job, unit: Unit, work: str, run_bytes: int) -> UnitTask:
        factor = job.sampling.factor(unit.source) if job.sampling else 1.0
        return UnitTask(
            unit=unit,
            work=work,
            length=job.length,
            content_key=job.content_key,
            seed=job.seed,
            shuffle=job.shuffle,
            factor=factor,
            skip_bad_lines=job.skip_bad_lines,
            run_bytes=run_bytes,
        )

    def path(self, suffix: str) -> str:
        return storage.join(self.work, f"unit-{self.unit.index:06d}{suffix}")


@dataclass
class UnitReport:
    """What came of a unit: counts (tokens with their end-of-text ids), runs, length of the tail, bad documents.

    `failures` tells of each file that is broken beyond its lines.
    """

    index: int
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    run_counts: list[int] = field(default_factory=list)
    tail_tokens: int = 0
    lines: list[int] = field(default_factory=list)
    bad: dict[str, int] = field(default_factory=dict)
    bad_shown: list[BadDocument] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def runs(self, task: UnitTask) -> list[Run]:
        return [Run(task.path(f"-{number:04d}.run"), count) for number, count in enumerate(self.run_counts)]

    def unusable(self, task: UnitTask) -> bool:
        """Whether nothing of the unit is to be kept."""
        return task.check_only or bool(self.failures) or bool(self.bad and not task.skip_bad_lines)

    def note(self, bad: BadDocument) -> None:
        self.bad[bad.kind] = self.bad.get(bad.kind, 0) + 1
        if len(self.bad_shown) < MAX_SHOWN:
            self.bad_shown.append(bad)


def load_report(task: UnitTask) -> UnitReport | None:
    """The report of a unit that is done, None where it is not."""
    if not storage.exists(task.path(".json")):
        return None
    record: dict[str, Any] = orjson.loads(storage.read_bytes(task.path(".json")))
    record["bad_shown"] = [BadDocument(**bad) for bad in record["bad_shown"]]
    return UnitReport(**record)


def load_tail(task: UnitTask, dtype: np.dtype[Any]) -> np.ndarray:
    """The ids that a unit left over, (n,) of `dtype`, fewer than a sequence."""
    return np.frombuffer(storage.read_bytes(task.path(".tail")), dtype)


def run_unit(task: UnitTask, encoder: DocumentEncoder, report: Report | None = None) -> UnitReport:
    """Do a unit of work and leave runs, tail and, last, its report in the work folder.

    A broken file, or a bad document that is not to be skipped, ends the encoding: the rest is only looked through for
    more of them, and no report is left.
    """
    result = UnitReport(task.unit.index)
    writer = RunWriter(task.path("-{:04d}.run"), task.unit.index, task.seed if task.shuffle else None, task.run_bytes)
    tail = np.zeros(0, encoder.dtype)
    for batch, bytes_read in _batches(task, encoder.vocab_size, result):
        if result.unusable(task):
            continue
        ids = encoder.encode(batch)
        sequences, tail = cut([tail, ids], task.length)
        writer.add(sequences)
        result.documents += len(batch)
        result.characters += sum(len(document) for document in batch if isinstance(document, str))
        result.tokens += len(ids)
        if report:
            report(bytes_read, result.tokens)
    if result.unusable(task):
        return result
    writer.flush()
    result.run_counts = [run.count for run in writer.runs]
    result.tail_tokens = len(tail)
    storage.write_bytes(task.path(".tail"), tail.tobytes())
    storage.write_bytes(task.path(".json"), orjson.dumps(asdict(result)))
    return result


def _batches(task: UnitTask, vocab_size: int, result: UnitReport) -> Iterator[tuple[list[Document], int]]:
    """The documents to take, in batches of bounded size, each with the input bytes read so far."""
    batch: list[Document] = []
    characters = bytes_before = number = 0
    for piece in task.unit.pieces:
        reader = PieceReader(piece, task.content_key)
        for found in _usable(reader, vocab_size, task, result):
            number += 1
            if task.factor != 1.0 and not takes(task.seed, task.unit.group, number - 1, task.factor, task.unit.copy):
                continue
            batch.append(found)
            characters += len(found)
            if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                yield batch, bytes_before + reader.bytes_read
                batch, characters = [], 0
        result.lines.append(reader.lines)
        bytes_before += piece.end - piece.start
    if batch:
        yield batch, bytes_before


def _usable(reader: PieceReader, vocab_size: int, task: UnitTask, result: UnitReport) -> Iterator[Document]:
    """The documents of a piece; what is none, and what breaks the piece off, is noted in the report."""
    try:
        for item in reader:
            found = _check_ids(item, reader.piece.url, vocab_size) if isinstance(item, np.ndarray) else item
            if not isinstance(found, BadDocument):
                yield found
            elif not task.unit.copy:  # later passes over the same documents tell nothing new
                result.note(found)
    except DataError as error:
        result.failures.append(str(error))


def _check_ids(ids: np.ndarray, url: str, vocab_size: int) -> Document | BadDocument:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        return BadDocument(
            "id out of range", url, 0, f"ids from {ids.min()} to {ids.max()}, the vocabulary has {vocab_size}"
        )
    return ids
