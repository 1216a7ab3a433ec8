"""Process one unit of work: read its documents, encode them, cut the ids into sequences, spill the sequences.

This module does not depend on Ray; the engine calls it from Ray tasks.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.shard_format import PAD_ID
from open_lm.datapreprocess.inputs import Unit
from open_lm.datapreprocess.pack import DocumentPacker, cut
from open_lm.datapreprocess.readers import (
    BadDocument,
    Block,
    BrokenFile,
    Chunk,
    ChunkReader,
    Document,
    FileChunks,
    Piece,
    PieceReader,
    ReadOptions,
)
from open_lm.datapreprocess.sampling import selection_mask
from open_lm.datapreprocess.shuffle import OrderedRunWriter, Run, ShuffledRunWriter, run_url
from open_lm.datapreprocess.tasks import raise_if_abandoned
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.system.names import escape, escaped, printable, unescaped

MAX_SHOWN = 20
_STREAM_BITS = 20  # a streamed unit has fewer than 2^20 chunks
_COMPARED_CHARS_PER_FILE, _COMPARED_CHARS_PER_UNIT = 2 << 10, 64 << 10  # encoded by both tokenizers
_BATCH_CHARS = 512 << 10  # small documents, also of different files, are encoded in one batch


@dataclass(frozen=True)
class UnitTask:
    """A unit of work and all settings that a worker needs.

    work: folder for runs and reports.
    length: ids in a sequence.
    factor: sampling factor of the unit's source.
    source: number of the unit's source.
    buckets: number of buckets of the shuffle.
    run_bytes, chunk_bytes: approximate size of a run, and of the text in a chunk of a streamed unit.
    encoder: name of the encoder.
    number: number of the chunk of a streamed unit, otherwise 0.
    """

    unit: Unit
    work: str
    options: ReadOptions
    length: int
    seed: int
    shuffle: bool
    split_documents: bool
    factor: float
    source: int
    buckets: int
    run_bytes: int
    chunk_bytes: int
    encoder: str
    number: int = 0

    @property
    def stream(self) -> int:
        """The number of this task's random stream, from which the keys of its sequences are derived."""
        return (self.unit.index << _STREAM_BITS) + self.number

    @property
    def digest(self) -> str:
        """A hash of everything that determines the unit's files, except for the settings of the run."""
        cut_at = self.chunk_bytes if self.unit.streamed else None
        return hashlib.sha256(repr((self.unit.digest, self.buckets, self.encoder, cut_at)).encode()).hexdigest()[:12]

    def path(self, suffix: str = "") -> str:
        """Return the path of a file of this task in the work folder; without a suffix, the prefix of its runs."""
        return storage.join(self.work, f"unit-{self.unit.index:06d}-{self.digest}-{self.number:06d}{suffix}")


@dataclass
class BrokenInput:
    """An input file that could not be read to its end; `lost_bytes` are the input bytes that were not read."""

    url: str
    kind: str
    detail: str
    lost_bytes: int


@dataclass
class UnitReport:
    """The result of a unit, or of a chunk of a streamed unit.

    documents, characters, tokens, pads: totals of the sampled documents; tokens include end-of-text ids.
    seen: documents read, sampled or not.
    lenient: how many of them come from JSON that only Python's parser accepts.
    special: sampled documents that contain the text of a special token.
    counts: further numbers of the documents read, by name.
    runs: sequences (shuffled) or ids (in order) in each run.
    tail: base64 of the ids that do not fill a sequence.
    lines, digests: number of lines and SHA-256 of each piece.
    num_bytes: input bytes that this report accounts for.
    last: whether this report completes the unit.
    mismatch: how the fast tokenizer differs from the reference; if not empty, the unit must be discarded.
    """

    index: int
    number: int = 0
    documents: int = 0
    seen: int = 0
    characters: int = 0
    tokens: int = 0
    pads: int = 0
    runs: list[int] = field(default_factory=list)
    tail: str = ""
    lines: list[int] = field(default_factory=list)
    digests: list[str | None] = field(default_factory=list)
    bad: dict[str, int] = field(default_factory=dict)
    bad_shown: list[BadDocument] = field(default_factory=list)
    broken: list[BrokenInput] = field(default_factory=list)
    num_bytes: int = 0
    last: bool = True
    mismatch: str = ""
    lenient: int = 0
    special: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def runs_of(self, task: UnitTask) -> list[Run]:
        """Return the spilled runs of this report; `task` is the task of its unit."""
        prefix = replace(task, number=self.number).path()
        return [Run(run_url(prefix, number), count, task.source) for number, count in enumerate(self.runs)]

    def tail_ids(self, dtype: np.dtype[Any]) -> np.ndarray:
        """Return the ids of the tail."""
        return np.frombuffer(base64.b64decode(self.tail), dtype)


def load_report(path: str) -> UnitReport:
    """Read a report that `_save` wrote."""
    record: dict[str, Any] = unescaped(orjson.loads(storage.read_bytes(path)))
    record["bad_shown"] = [BadDocument(**bad) for bad in record["bad_shown"]]
    record["broken"] = [BrokenInput(**broken) for broken in record["broken"]]
    return UnitReport(**record)


def run_unit(task: UnitTask, encoder: DocumentEncoder) -> UnitReport:
    """Process a unit of work and write its runs, its rejects and last its report to the work folder."""
    processor = _UnitProcessor(task, encoder)
    for piece in task.unit.pieces:
        reader = PieceReader(piece, task.options)
        processor.read(piece, reader)
        processor.finish_piece(reader)
    return processor.finish(last=True, num_bytes=task.unit.num_bytes)


def feed_unit(task: UnitTask, done: frozenset[int]) -> Iterator[tuple[Chunk, int] | UnitReport]:
    """Yield the chunks of a streamed unit whose numbers are not in `done`, each with its number of input bytes.

    The last item is the report that completes the unit.
    """
    piece = task.unit.pieces[0]
    report = UnitReport(task.unit.index)
    chunks = FileChunks(piece, task.chunk_bytes, task.options)
    bytes_before = 0
    try:
        for chunk in chunks:
            report.number = chunk.number + 1
            if chunk.number not in done:
                yield chunk, chunks.bytes_read - bytes_before
            bytes_before = chunks.bytes_read
    except BrokenFile as error:
        report.broken.append(BrokenInput(piece.url, error.kind, str(error), max(0, piece.num_bytes - bytes_before)))
    report.num_bytes = max(0, piece.num_bytes - bytes_before)
    report.digests.append(chunks.digest)
    yield report


def run_chunk(task: UnitTask, encoder: DocumentEncoder, item: tuple[Chunk, int] | UnitReport) -> UnitReport:
    """Process an item of `feed_unit`: encode a chunk as `run_unit` does for a unit, or save the last report."""
    if isinstance(item, UnitReport):
        last_task = replace(task, number=item.number)
        if item.broken:
            storage.write_bytes(last_task.path(".rejects"), b"".join(map(_reject_line, item.broken)))
        _save(last_task, item)
        return item
    chunk, num_bytes = item
    processor = _UnitProcessor(replace(task, number=chunk.number), encoder)
    piece = task.unit.pieces[0]
    processor.read(piece, ChunkReader(chunk, piece.url, task.options))
    return processor.finish(last=False, num_bytes=num_bytes)


def _reject_line(item: BadDocument | BrokenInput) -> bytes:
    """Return a line of the rejects file; the lost bytes of a broken file are only in the report."""
    record = asdict(item) if isinstance(item, BadDocument) else asdict(BadDocument(item.kind, item.url, 0, item.detail))
    record |= {"url": escape(item.url), "detail": printable(item.detail)}
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _save(task: UnitTask, report: UnitReport) -> None:
    storage.write_bytes(task.path(".json"), orjson.dumps(escaped(asdict(report))))


class _UnitProcessor:
    """The state of a unit, or of a chunk of a streamed unit, during processing."""

    def __init__(self, task: UnitTask, encoder: DocumentEncoder) -> None:
        self._task, self._encoder = task, encoder
        self._report = UnitReport(task.unit.index, task.number)
        self._sequences = _SequenceSink(task, encoder)
        self._rejects: list[bytes] = []
        self._batch: list[Document] = []  # sampled documents that are not encoded yet
        self._batch_chars = 0
        self._to_compare: list[str] = []
        self._chars_left_to_compare = _COMPARED_CHARS_PER_UNIT

    def read(self, piece: Piece, reader: PieceReader | ChunkReader) -> None:
        """Process the documents of a piece, and record bad documents and a broken file."""
        first, bytes_read = piece.start == 0, 0
        try:
            for block in reader:
                raise_if_abandoned()
                bytes_read = block.bytes_read
                self._encoder.reject_unusable(block, piece)
                self._record_bad(block)
                if first and block.documents:
                    self._select_for_comparison(block.documents)
                    first = False
                self._sample(block.documents)
        except BrokenFile as error:
            if not self._task.unit.copy:
                broken = BrokenInput(piece.url, error.kind, str(error), max(0, piece.num_bytes - bytes_read))
                self._report.broken.append(broken)
                self._rejects.append(_reject_line(broken))

    def finish_piece(self, reader: PieceReader) -> None:
        """Record the number of lines and the digest of a piece after it was read."""
        self._report.lines.append(reader.lines)
        self._report.digests.append(reader.digest)

    def _select_for_comparison(self, documents: list[Document]) -> None:
        """Select the first documents of a file to be encoded by both tokenizers; a difference discards the unit."""
        chars_left = min(_COMPARED_CHARS_PER_FILE, self._chars_left_to_compare)
        for document in documents:
            if chars_left <= 0:
                break
            if isinstance(document, str):
                self._to_compare.append(document[:chars_left])
                self._chars_left_to_compare -= min(chars_left, len(document))
                chars_left -= len(document)

    def _sample(self, documents: list[Document]) -> None:
        """Add the documents that the sampling factor selects to the batch, and encode the batch if it is full."""
        task, report = self._task, self._report
        sampled = documents
        if task.factor != 1.0:
            group = (task.unit.group << _STREAM_BITS) + task.number
            mask = selection_mask(task.seed, group, report.seen, len(documents), task.factor, task.unit.copy)
            sampled = [document for document, selected in zip(documents, mask.tolist(), strict=True) if selected]
        report.seen += len(documents)
        self._batch += sampled
        self._batch_chars += sum(map(len, sampled))
        if self._batch_chars >= _BATCH_CHARS:
            self._encode()

    def _encode(self) -> None:
        """Compare the tokenizers on the selected documents, then encode the batch."""
        batch, report = self._batch, self._report
        self._batch, self._batch_chars = [], 0
        if self._to_compare and not report.mismatch:
            report.mismatch = self._encoder.difference(self._to_compare) or ""
            self._to_compare = []
        if not batch or report.mismatch:
            return
        encoded = self._encoder.encode(batch)
        self._sequences.add(encoded.ids, encoded.ends)
        report.documents += len(batch)
        report.special += self._encoder.count_special(batch)
        report.characters += sum(len(document) for document in batch if isinstance(document, str))
        report.tokens += len(encoded.ids)

    def _record_bad(self, block: Block) -> None:
        if self._task.unit.copy:  # the first pass over the same documents recorded them
            return
        self._report.lenient += block.lenient
        for name, count in block.counts.items():
            self._report.counts[name] = self._report.counts.get(name, 0) + count
        for bad in block.bad:
            self._report.bad[bad.kind] = self._report.bad.get(bad.kind, 0) + 1
            if len(self._report.bad_shown) < MAX_SHOWN:
                self._report.bad_shown.append(bad)
            self._rejects.append(_reject_line(bad))

    def finish(self, *, last: bool, num_bytes: int) -> UnitReport:
        """Spill the remaining sequences, write the rejects and the report, and return the report."""
        self._encode()
        report = self._report
        report.last, report.num_bytes = last, num_bytes
        if report.mismatch:
            return report
        report.runs, tail, report.pads = self._sequences.finish()
        report.tail = base64.b64encode(tail.tobytes()).decode()
        if self._rejects:
            storage.write_bytes(self._task.path(".rejects"), b"".join(self._rejects))
        else:
            storage.remove(self._task.path(".rejects"))  # a killed run may have written it while the unit had rejects
        _save(self._task, report)
        return report


class _SequenceSink:
    """A sink that cuts ids into sequences and spills them as shuffled runs; the remaining ids are the tail.

    Without shuffling it spills the ids in input order and has no tail: the ids are cut into sequences after the runs of
    all units are concatenated.
    """

    def __init__(self, task: UnitTask, encoder: DocumentEncoder) -> None:
        self._length, self._shuffle = task.length, task.shuffle
        self._packer: DocumentPacker | None = None
        if task.split_documents:
            self._packer = DocumentPacker(task.length, encoder.dtype, keep_order=not task.shuffle)
        self._tail = np.zeros(0, encoder.dtype)
        self._pads = 0
        self._writer: ShuffledRunWriter | OrderedRunWriter
        if task.shuffle:
            self._writer = ShuffledRunWriter(
                task.path(),
                stream=task.stream,
                seed=task.seed,
                source=task.source,
                buckets=task.buckets,
                run_bytes=task.run_bytes,
            )
        else:
            self._writer = OrderedRunWriter(task.path(), source=task.source, run_bytes=task.run_bytes)

    def add(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Add the documents ids[ends[i - 1] : ends[i]]."""
        if self._packer is not None:
            self._add_packed(self._packer.add(ids, ends))
            return
        if self._shuffle:
            ids, self._tail = cut([self._tail, ids] if len(self._tail) else [ids], self._length)
        self._writer.add(ids)

    def _add_packed(self, sequences: np.ndarray) -> None:
        self._pads += int(np.count_nonzero(sequences == PAD_ID))
        self._writer.add(sequences)

    def finish(self) -> tuple[list[int], np.ndarray, int]:
        """Spill the remaining sequences or ids; return the sizes of the runs, the tail and the number of pads."""
        if self._packer is not None:
            self._add_packed(self._packer.finish())
        self._writer.flush()
        return [run.count for run in self._writer.runs], self._tail, self._pads
