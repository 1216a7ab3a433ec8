"""Turn units of raw text into shards: read the documents of a unit, encode them, cut the ids into sequences.

A unit is a part of the input of `--train-text`: a range of a file, several small files, or a compressed file. Its shard
is a function of its bytes, the tokenizer and the options, so any process can recreate it with the same checksum.
Imports no torch.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import IO, Any

import numpy as np

from open_lm.data.cache import Cache, CacheFullError, StalledDownloadError
from open_lm.data.shard_format import KEY_DIGITS, PAD_ID, npy_members
from open_lm.data.verify import Expected
from open_lm.datapreprocess.pack import DocumentPacker, cut
from open_lm.datapreprocess.readers import BadDocument, Document, Piece, PieceReader, ReadOptions
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import DataError, StorageError

_BATCH_CHARS = 512 << 10  # documents are encoded in batches of about this size
_BATCH_BYTES = 4 << 20  # of members built at a time
_COMPARED_CHARS = 2 << 10  # at the start of a file, encoded by both tokenizers
_MAX_SHOWN = 5
Grow = Callable[[int], None]


@dataclass(frozen=True)
class TextOptions:
    """What determines the sequences of a text, apart from the tokenizer."""

    seq_len: int
    content_key: str = "text"
    separator: str | None = None
    split_documents: bool = False
    add_bos: bool = False

    @property
    def length(self) -> int:
        """Token ids per sequence."""
        return self.seq_len + 1

    @property
    def read(self) -> ReadOptions:
        return ReadOptions(self.content_key, self.separator)


@dataclass(frozen=True)
class TextUnit:
    """Pieces of files, read in order; `key` identifies them, the state of their files and the settings."""

    key: str
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """The input bytes of all pieces."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def identity(self) -> str:
        """The identity of its shard in a `Cache`."""
        return f"text\n{self.key}"

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "pieces": [[p.url, p.start, p.end, p.num_bytes] for p in self.pieces]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TextUnit:
        return cls(record["key"], tuple(Piece(*piece) for piece in record["pieces"]))


@dataclass
class UnitReport:
    """What the index records of a unit.

    sequences, num_bytes, sha256: count of sequences, size and checksum of its shard.
    tail: base64 of the ids that do not fill a sequence, in the encoder's dtype.
    documents, characters, tokens: counts of the usable documents; tokens include begin- and end-of-text ids.
    bad, bad_shown: number of unusable documents by kind, and messages about the first of them.
    pads: pad ids in the sequences.
    lenient: number of documents from JSON that only Python's parser accepts.
    special: number of documents with the text of a special token.
    digests: SHA-256 of the bytes of each piece; see `InputStream.digest` for None and "".
    mismatch: how the fast tokenizer differs from the reference, which then encoded the unit; "" if it does not.
    """

    key: str
    sequences: int = 0
    num_bytes: int = 0
    sha256: str = ""
    tail: str = ""
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    pads: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    bad_shown: list[str] = field(default_factory=list)
    lenient: int = 0
    special: int = 0
    digests: list[str | None] = field(default_factory=list)
    mismatch: str = ""

    def tail_ids(self, dtype: np.dtype[Any]) -> np.ndarray:
        """Return the ids of the tail."""
        return np.frombuffer(base64.b64decode(self.tail), dtype)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class UnitText:
    """The sequences of a unit. After `sequences` has ended, `report` only lacks the size and checksum of the shard."""

    def __init__(self, unit: TextUnit, options: TextOptions, encoder: DocumentEncoder) -> None:
        self._unit, self._options, self._encoder = unit, options, encoder
        self.report = UnitReport(unit.key)
        self._bad = Counter[str]()
        self._tail = np.zeros(0, encoder.dtype)

    @cached_property
    def _packer(self) -> DocumentPacker | None:
        return DocumentPacker(self._options.length, self._encoder.dtype) if self._options.split_documents else None

    def sequences(self) -> Iterator[np.ndarray]:
        """Yield the sequences, (n, seq_len + 1) of one integer type, in the order of the documents.

        Raises:
            BrokenFile (a DataError): a file cannot be read to its end.
        """
        batch: list[Document] = []
        for documents in self._documents():
            batch += documents
            if sum(map(len, batch)) >= _BATCH_CHARS:
                yield self._encode(batch)
                batch = []
        yield self._encode(batch)
        if self._packer is not None:
            yield self._counted(self._packer.finish())
        self.report.tail = base64.b64encode(self._tail.tobytes()).decode()
        self.report.bad = dict(sorted(self._bad.items()))

    def _documents(self) -> Iterator[list[Document]]:
        for piece in self._unit.pieces:
            reader, at_start = PieceReader(piece, self._options.read), piece.start == 0
            for block in reader:
                self._encoder.reject_unusable(block, piece)
                self.report.lenient += block.lenient
                self._count_bad(block.bad)
                if at_start and block.documents:
                    self._compare(block.documents)
                    at_start = False
                yield block.documents
            self.report.digests.append(reader.digest)

    def _count_bad(self, documents: Iterable[BadDocument]) -> None:
        for bad in documents:
            self._bad[bad.kind] += 1
            if len(self.report.bad_shown) < _MAX_SHOWN:
                place = f" of the part from {bad.start} on" if bad.start else ""
                self.report.bad_shown.append(f"{bad.url}: line {bad.line}{place}: {bad.kind}: {bad.detail}")

    def _compare(self, documents: Sequence[Document]) -> None:
        """Encode the beginning of a file with both tokenizers. If they differ, encode the rest with the reference."""
        texts, chars = [], _COMPARED_CHARS
        for document in documents:
            if isinstance(document, str) and chars > 0:
                texts.append(document[:chars])
                chars -= len(document)
        if difference := self._encoder.difference(texts) if texts else None:
            self.report.mismatch = difference
            self._encoder = self._encoder.reference()

    def _encode(self, documents: Sequence[Document]) -> np.ndarray:
        """Return the sequences that these documents complete."""
        encoded = self._encoder.encode(documents) if documents else None
        if encoded is None:
            return np.zeros((0, self._options.length), self._encoder.dtype)
        self.report.documents += len(documents)
        self.report.characters += sum(len(document) for document in documents if isinstance(document, str))
        self.report.tokens += len(encoded.ids)
        self.report.special += self._encoder.count_special(documents)
        if self._packer is not None:
            return self._counted(self._packer.add(encoded.ids, encoded.ends))
        sequences, self._tail = cut([self._tail, encoded.ids], self._options.length)
        return self._counted(sequences)

    def _counted(self, sequences: np.ndarray) -> np.ndarray:
        self.report.sequences += len(sequences)
        self.report.pads += int(np.count_nonzero(sequences == PAD_ID)) if sequences.dtype.kind == "i" else 0
        return sequences


def shard_bytes(blocks: Iterable[np.ndarray]) -> Iterator[memoryview]:
    """Yield the bytes of a shard, a tar of npy members, in parts. Each block has sequences (n, length)."""
    number = size = 0
    for rows in blocks:
        step = max(1, _BATCH_BYTES // max(1, rows.shape[1] * rows.itemsize))
        for start in range(0, len(rows), step):
            members = npy_members(number, KEY_DIGITS, rows[start : start + step])
            number += len(members)
            size += members.nbytes
            yield members.reshape(-1).data
    end = size + 2 * tarfile.BLOCKSIZE
    yield memoryview(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))


class _Hashed:
    """An iterator over parts that counts and hashes them, and can be resumed after a consumer has stopped."""

    def __init__(self, parts: Iterable[memoryview]) -> None:
        self._parts, self._digest, self.num_bytes = iter(parts), hashlib.sha256(), 0

    def __iter__(self) -> Iterator[memoryview]:
        for part in self._parts:
            self._digest.update(part)
            self.num_bytes += len(part)
            yield part

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, file: IO[bytes], grow: Grow) -> str:
        """Write all parts to a file of a cache (`Cache.get`), and return their SHA-256."""
        file.seek(0)
        for part in self:
            grow(self.num_bytes)
            file.write(part)
        file.flush()
        file.truncate()
        return self.sha256


def index_unit(unit: TextUnit, options: TextOptions, encoder: DocumentEncoder, cache: Cache | None) -> UnitReport:
    """Tokenize a unit and return its report. Keep its shard in the cache if it has space."""
    text = UnitText(unit, options, encoder)
    parts = _Hashed(shard_bytes(text.sequences()))
    entry = None
    if cache is not None:
        try:
            with contextlib.suppress(CacheFullError, StalledDownloadError):
                entry = cache.get(unit.identity, -1, parts.write)
        except OSError as error:
            message = f"{cache.folder}: cannot keep tokenized text there ({error.strerror or error})"
            raise StorageError(f"{message}; choose another folder (--cache-dir) or lower --cache-limit") from error
    for _ in parts:  # the report needs the parts that the cache did not consume
        pass
    if entry is not None:
        if entry.sha256 == parts.sha256:
            entry.file.close()
        else:  # written with another version of the tokenizer's library
            assert cache is not None
            cache.discard(entry)
    text.report.num_bytes, text.report.sha256 = parts.num_bytes, parts.sha256
    return text.report


def write_unit(  # noqa: PLR0917 - the last two are those of a cache
    unit: TextUnit, expected: Expected, options: TextOptions, encoder: DocumentEncoder, file: IO[bytes], grow: Grow
) -> str:
    """Write the shard of a unit to a file of a cache, and return its SHA-256.

    Raises:
        DataError: it is not the shard that the index describes.
    """
    parts = _Hashed(shard_bytes(UnitText(unit, options, encoder).sequences()))
    sha256 = parts.write(file, grow)
    if problem := expected.problem(parts.num_bytes, sha256):
        files = ", ".join(dict.fromkeys(piece.url for piece in unit.pieces))
        raise DataError(
            f"{files}: the text (or the version of the tokenizer's library) changed since it was indexed: its shard "
            f"{problem}; restore it, or start a new run with another index"
        )
    return sha256
