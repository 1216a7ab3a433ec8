"""One unit of work: read its documents, encode, cut into sequences, spill. Plain Python; the engine runs it in Ray."""

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
from open_lm.datapreprocess.shuffle import OrderedRunWriter, Run, ShuffledRunWriter
from open_lm.datapreprocess.tasks import raise_if_abandoned
from open_lm.datapreprocess.tokenization import DocumentEncoder

MAX_SHOWN = 20
_STREAM_BITS = 20  # a streamed unit has less than 2^20 stretches
_COMPARED_OF_FILE, _COMPARED_OF_UNIT = 2 << 10, 64 << 10  # characters compared between the two tokenizers
_ENCODED_AT_ONCE = 512 << 10  # characters; small documents, of many files too, go through the tokenizer together


@dataclass(frozen=True)
class UnitTask:
    """What a worker needs to know; `work` is the folder for runs and reports.

    number: of the stretch of a streamed unit, else 0. source: the number of the unit's source. encoder: its name.
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
        """What the keys of this task's sequences, and the draws of its documents' passes, are derived from."""
        return (self.unit.index << _STREAM_BITS) + self.number

    @property
    def digest(self) -> str:
        """Of all that the unit's files depend on beside the settings of the run."""
        cut_at = self.chunk_bytes if self.unit.streamed else None
        return hashlib.sha256(repr((self.unit.digest, self.buckets, self.encoder, cut_at)).encode()).hexdigest()[:12]

    def path(self, suffix: str) -> str:
        return storage.join(self.work, f"unit-{self.unit.index:06d}-{self.digest}-{self.number:06d}{suffix}")

    def run_name(self) -> str:
        return self.path("-{:04d}.run")


@dataclass
class Broken:
    """A file that is broken beyond its lines; `lost_bytes` of its input could not be read."""

    url: str
    kind: str
    detail: str
    lost_bytes: int


@dataclass
class UnitReport:
    """What came of a unit, or of a stretch of one.

    documents, characters, tokens (end-of-text ids included), pads: of what was taken. seen: documents read, taken or
    not. runs: sequences (shuffled) or ids in each run. tail: base64 of the ids that filled no sequence. lines, digests:
    of each piece. last: whether the unit is complete with this report; num_bytes: input bytes it accounts for.
    mismatch: where the fast tokenizer differs from the reference; then nothing of the unit counts.
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
    broken: list[Broken] = field(default_factory=list)
    num_bytes: int = 0
    last: bool = True
    mismatch: str = ""

    def runs_of(self, task: UnitTask) -> list[Run]:
        name = replace(task, number=self.number).run_name()
        return [Run(name.format(number), count, task.source) for number, count in enumerate(self.runs)]

    def tail_ids(self, dtype: np.dtype[Any]) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.tail), dtype)


def load_report(path: str) -> UnitReport:
    """A report that `_save` wrote."""
    record: dict[str, Any] = orjson.loads(storage.read_bytes(path))
    record["bad_shown"] = [BadDocument(**bad) for bad in record["bad_shown"]]
    record["broken"] = [Broken(**broken) for broken in record["broken"]]
    return UnitReport(**record)


def run_unit(task: UnitTask, encoder: DocumentEncoder) -> UnitReport:
    """Do a unit of work and leave runs, rejects and, last, its report in the work folder."""
    work = _Work(task, encoder)
    for piece in task.unit.pieces:
        reader = PieceReader(piece, task.options)
        work.read(piece, reader)
        work.note_piece(reader)
    return work.finish(last=True, num_bytes=task.unit.num_bytes)


def feed_unit(task: UnitTask, done: frozenset[int]) -> Iterator[tuple[Chunk, int] | UnitReport]:
    """The stretches of a streamed unit that are not among those `done`, each with the input bytes that it took.

    At the end comes the report that completes the unit.
    """
    piece = task.unit.pieces[0]
    report = UnitReport(task.unit.index)
    source = FileChunks(piece, task.chunk_bytes, task.options)
    bytes_before = 0
    try:
        for chunk in source:
            report.number = chunk.number + 1
            if chunk.number not in done:
                yield chunk, source.bytes_read - bytes_before
            bytes_before = source.bytes_read
    except BrokenFile as error:
        report.broken.append(Broken(piece.url, error.kind, str(error), max(0, piece.num_bytes - bytes_before)))
    report.num_bytes = max(0, piece.num_bytes - bytes_before)
    report.digests.append(source.digest)
    yield report


def run_chunk(task: UnitTask, encoder: DocumentEncoder, item: tuple[Chunk, int] | UnitReport) -> UnitReport:
    """`run_unit` for a stretch of a streamed unit; the report at its end is only saved."""
    if isinstance(item, UnitReport):
        end = replace(task, number=item.number)
        if item.broken:
            storage.write_bytes(end.path(".rejects"), b"".join(map(_reject, item.broken)))
        _save(end, item)
        return item
    chunk, num_bytes = item
    work = _Work(replace(task, number=chunk.number), encoder)
    piece = task.unit.pieces[0]
    work.read(piece, ChunkReader(chunk, piece.url, task.options))
    return work.finish(last=False, num_bytes=num_bytes)


def _reject(what: BadDocument | Broken) -> bytes:
    """A line of the rejects file; of a broken file the lost bytes are told in the report."""
    record = asdict(what) if isinstance(what, BadDocument) else asdict(BadDocument(what.kind, what.url, 0, what.detail))
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _save(task: UnitTask, report: UnitReport) -> None:
    storage.write_bytes(task.path(".json"), orjson.dumps(asdict(report)))


class _Work:
    """A unit, or a stretch of one, while it is done."""

    def __init__(self, task: UnitTask, encoder: DocumentEncoder) -> None:
        self._task, self._encoder = task, encoder
        self._report = UnitReport(task.unit.index, task.number)
        self._sequences = _sequence_maker(task, encoder)
        self._rejects: list[bytes] = []
        self._taken: list[Document] = []  # documents that wait to be encoded together
        self._taken_size = 0
        self._to_compare: list[str] = []
        self._room_to_compare = _COMPARED_OF_UNIT

    def read(self, piece: Piece, reader: PieceReader | ChunkReader) -> None:
        """Take the documents of a piece; what is none, and what breaks it off, is noted."""
        first, bytes_read = piece.start == 0, 0
        try:
            for block in reader:
                raise_if_abandoned()
                bytes_read = block.bytes_read
                self._set_apart_wrong_ids(block, piece.url)
                self._note_bad(block)
                if first and block.documents:
                    self._note_first(block.documents)
                    first = False
                self._take(block.documents)
        except BrokenFile as error:
            if not self._task.unit.copy:
                broken = Broken(piece.url, error.kind, str(error), max(0, piece.num_bytes - bytes_read))
                self._report.broken.append(broken)
                self._rejects.append(_reject(broken))

    def note_piece(self, reader: PieceReader) -> None:
        """Keep what is known of a piece once it is read."""
        self._report.lines.append(reader.lines)
        self._report.digests.append(reader.digest)

    def _note_first(self, documents: list[Document]) -> None:
        """The first documents of every file are encoded by both tokenizers; one difference discards the unit."""
        room = min(_COMPARED_OF_FILE, self._room_to_compare)
        for document in documents:
            if room <= 0:
                break
            if isinstance(document, str):
                self._to_compare.append(document[:room])
                self._room_to_compare -= min(room, len(document))
                room -= len(document)

    def _take(self, documents: list[Document]) -> None:
        task, report = self._task, self._report
        taken = documents
        if task.factor != 1.0:
            group = (task.unit.group << _STREAM_BITS) + task.number
            mask = selection_mask(task.seed, group, report.seen, len(documents), task.factor, task.unit.copy)
            taken = [document for document, takes in zip(documents, mask.tolist(), strict=True) if takes]
        report.seen += len(documents)
        self._taken += taken
        self._taken_size += sum(map(len, taken))
        if self._taken_size >= _ENCODED_AT_ONCE:
            self._encode()

    def _encode(self) -> None:
        """Encode what was taken since the last time, and compare the first documents of its files."""
        taken, report = self._taken, self._report
        self._taken, self._taken_size = [], 0
        if self._to_compare and not report.mismatch:
            report.mismatch = self._encoder.difference(self._to_compare) or ""
            self._to_compare = []
        if not taken or report.mismatch:
            return
        encoded = self._encoder.encode(taken)
        self._sequences.add(encoded.ids, encoded.ends)
        report.documents += len(taken)
        report.characters += sum(len(document) for document in taken if isinstance(document, str))
        report.tokens += len(encoded.ids)

    def _set_apart_wrong_ids(self, block: Block, url: str) -> None:
        """Documents that come as ids, not all of them in the vocabulary, are bad."""
        size = self._encoder.vocab_size
        wrong = {
            number: BadDocument("id out of range", url, 0, f"ids {ids.min()} to {ids.max()}, the vocabulary has {size}")
            for number, ids in enumerate(block.documents)
            if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < size
        }
        if wrong:
            block.documents = [ids for number, ids in enumerate(block.documents) if number not in wrong]
            block.bad += wrong.values()

    def _note_bad(self, block: Block) -> None:
        if self._task.unit.copy:  # later passes over the same documents tell nothing new
            return
        for bad in block.bad:
            self._report.bad[bad.kind] = self._report.bad.get(bad.kind, 0) + 1
            if len(self._report.bad_shown) < MAX_SHOWN:
                self._report.bad_shown.append(bad)
            self._rejects.append(_reject(bad))

    def finish(self, *, last: bool, num_bytes: int) -> UnitReport:
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
            storage.remove(self._task.path(".rejects"))  # of a start that was killed, when the unit had some
        _save(self._task, report)
        return report


# --- sequences ---------------------------------------------------------------------------------------------------


def _sequence_maker(task: UnitTask, encoder: DocumentEncoder) -> _Shuffled | _Ordered:
    return _Shuffled(task, encoder) if task.shuffle else _Ordered(task, encoder)


class _Shuffled:
    """Ids to sequences with keys; what fills no sequence is the tail."""

    def __init__(self, task: UnitTask, encoder: DocumentEncoder) -> None:
        self._length = task.length
        self._packer = DocumentPacker(task.length, encoder.dtype) if task.split_documents else None
        self._tail = np.zeros(0, encoder.dtype)
        self._pads = 0
        self._writer = ShuffledRunWriter(
            task.run_name(),
            stream=task.stream,
            seed=task.seed,
            source=task.source,
            buckets=task.buckets,
            run_bytes=task.run_bytes,
        )

    def add(self, ids: np.ndarray, ends: np.ndarray) -> None:
        if self._packer is None:
            sequences, self._tail = cut([self._tail, ids] if len(self._tail) else [ids], self._length)
            self._writer.add(sequences)
        else:
            self._add_padded(self._packer.add(ids, ends))

    def _add_padded(self, sequences: np.ndarray) -> None:
        self._pads += int(np.count_nonzero(sequences == PAD_ID))
        self._writer.add(sequences)

    def finish(self) -> tuple[list[int], np.ndarray, int]:
        """Sizes of the runs, the tail, and the number of pads."""
        if self._packer is not None:
            self._add_padded(self._packer.finish())
        self._writer.flush()
        return [run.count for run in self._writer.runs], self._tail, self._pads


class _Ordered:
    """Ids to one run that keeps their order; the run is cut into sequences only together with all others."""

    def __init__(self, task: UnitTask, encoder: DocumentEncoder) -> None:
        self._packer = DocumentPacker(task.length, encoder.dtype, keep_order=True) if task.split_documents else None
        self._tail = np.zeros(0, encoder.dtype)
        self._writer = OrderedRunWriter(task.run_name(), source=task.source, run_bytes=task.run_bytes)
        self._pads = 0

    def add(self, ids: np.ndarray, ends: np.ndarray) -> None:
        self._put(ids if self._packer is None else self._packer.add(ids, ends))

    def _put(self, ids: np.ndarray) -> None:
        if self._packer is not None:
            self._pads += int(np.count_nonzero(ids == PAD_ID))
        self._writer.add(ids)

    def finish(self) -> tuple[list[int], np.ndarray, int]:
        if self._packer is not None:
            self._put(self._packer.finish())
        self._writer.flush()
        return [run.count for run in self._writer.runs], self._tail, self._pads
