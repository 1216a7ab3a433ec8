"""Encode documents as token ids; an end-of-text id follows every document.

`DocumentEncoder` is the engine's only interface to tokenizers. It uses the fast tokenizer if it supports the given
tokenizer. The tokenizer's own library is the reference: both must give the same ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from open_lm.data.shard_format import token_dtype
from open_lm.datapreprocess.adversarial_texts import fixed_sample
from open_lm.datapreprocess.fast_tokenizer import FastTokenizer, NoFastTokenizer, fast_tokenizer
from open_lm.datapreprocess.job import SPECIAL_TOKENS
from open_lm.datapreprocess.readers.base import BadDocument, Block, Document, Piece
from open_lm.datapreprocess.special_tokens import SubstringFinder
from open_lm.errors import ConfigError, DataError
from open_lm.tokenizer import NO_TOKENIZER, Tokenizer, load_tokenizer


class BatchTokenizer(Protocol):
    """The required part of the interface of open_lm.tokenizer.Tokenizer."""

    eot_id: int
    vocab_size: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def files(self) -> Mapping[str, bytes]: ...


class Encoded(NamedTuple):
    """Concatenated ids of documents, and the end position of each document in `ids` (after its end-of-text id)."""

    ids: np.ndarray
    ends: np.ndarray


class DocumentEncoder:
    """An encoder of documents (texts or arrays of token ids) as one flat array of ids.

    Pickles as the source of the tokenizer, which is loaded on first use. The environment variable RAYON_NUM_THREADS
    limits the threads per batch.

    Attributes:
        vocab_size: upper limit of the ids; ids of the tokenizer and of documents are checked against it.
        eot_id: id that follows every document.
        bos_id: id that precedes every document; None: no such id.
        fingerprint: fingerprint of the tokenizer; equal fingerprints mean equal ids for equal text.
        dtype: dtype of the encoded ids, the smallest unsigned type that holds them.
        name: library that encodes texts: "fastokens", "tokenizers", "sentencepiece", or "ids" without a tokenizer.
        fallback_reason: why the fast tokenizer is not used; None if it is used, or if there is no tokenizer.
        special_tokens: tokens such as "<|endoftext|>" that the tokenizer would find in a text.
        special_tokens_in_text: how documents that contain their text are encoded: with plain "text" or, if allowed,
            with their "ids". None if the tokenizer never finds special tokens in a text.
    """

    def __init__(
        self,
        tokenizer: BatchTokenizer | None,
        vocab_size: int | None = None,
        eot_id: int = 0,
        add_bos: bool = False,
        allow_special_tokens: bool = False,
    ) -> None:
        if tokenizer is None and vocab_size is None:
            raise ConfigError("without a --tokenizer, --vocab_size is required")
        self.special_tokens = tokenizer.special_tokens() if isinstance(tokenizer, Tokenizer) else []
        self.special_tokens_in_text: str | None = None
        if isinstance(tokenizer, Tokenizer) and self.special_tokens:
            self.special_tokens_in_text = "ids" if allow_special_tokens else "text"
            tokenizer = tokenizer if allow_special_tokens else tokenizer.with_split_special_tokens()
        self._contains_special = SubstringFinder(self.special_tokens)
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else 0)
        self.eot_id = tokenizer.eot_id if tokenizer else eot_id
        self.bos_id: int | None = getattr(tokenizer, "bos_id", None) if add_bos else None
        self.fingerprint = tokenizer.fingerprint if tokenizer else NO_TOKENIZER
        self.dtype: np.dtype[Any] = token_dtype(self.vocab_size)
        if add_bos and self.bos_id is None:
            raise ConfigError("--add-bos: there is no begin-of-text token; use a tokenizer that has one")
        if max(self.eot_id, self.bos_id or 0) >= self.vocab_size:
            bos = "" if self.bos_id is None else f" and the begin-of-text id {self.bos_id}"
            raise ConfigError(
                f"--vocab_size {self.vocab_size} is too small for the end-of-text id {self.eot_id}{bos}; "
                f"the tokenizer has {tokenizer.vocab_size if tokenizer else 0} ids"
            )
        self._fast: FastTokenizer | None = None
        self.fallback_reason: str | None = None
        if tokenizer is not None:
            try:
                self._fast = fast_tokenizer(tokenizer)
            except NoFastTokenizer as reason:
                self.fallback_reason = str(reason)

    @property
    def name(self) -> str:
        if self._tokenizer is None:
            return "ids"
        if self._fast is not None:
            return self._fast.library
        return str(getattr(self._tokenizer, "library", type(self._tokenizer).__name__))

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Return the files by name that `open_lm.tokenizer.Tokenizer.files` describes; empty without a tokenizer."""
        return {} if self._tokenizer is None else self._tokenizer.files()

    def settings(self) -> dict[str, Any]:
        """Return the facts that determine the ids of a document, for dataset.json."""
        special = self.special_tokens_in_text
        return {
            "tokenizer_fingerprint": self.fingerprint,
            "eot_id": self.eot_id,
            "bos_id": self.bos_id,
            "vocab_size": self.vocab_size,
            **({} if special is None else {SPECIAL_TOKENS: special}),
        }

    def reject_unusable(self, block: Block, piece: Piece) -> None:
        """Move documents of a piece that cannot be encoded to the bad ones: ids that are not all in the vocabulary."""
        size = self.vocab_size
        bad = {
            number: BadDocument(
                "id out of range",
                piece.url,
                0,
                f"found ids {ids.min()} to {ids.max()}, but the vocabulary has {size} ids",
            )
            for number, ids in enumerate(block.documents)
            if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < size
        }
        if bad:
            block.documents = [ids for number, ids in enumerate(block.documents) if number not in bad]
            block.bad += bad.values()

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """Encode documents in order; add `bos_id` (if any) before and `eot_id` after each.

        Raises ConfigError for texts without a tokenizer, and DataError for invalid text or ids outside the vocabulary.
        """
        ids, lengths = self._encode_content(documents)
        if ids.size and not 0 <= (smallest := ids.min()) <= (largest := ids.max()) < self.vocab_size:
            raise self._out_of_range(smallest if smallest < 0 else largest)
        num_bos = 0 if self.bos_id is None else 1
        ends = np.cumsum(lengths + (num_bos + 1))
        flat = np.empty(len(ids) + (num_bos + 1) * len(ends), self.dtype)
        is_content = np.ones(len(flat), bool)
        is_content[ends - 1] = False
        flat[ends - 1] = self.eot_id
        if self.bos_id is not None:
            starts = ends - (lengths + 2)
            is_content[starts] = False
            flat[starts] = self.bos_id
        flat[is_content] = ids
        return Encoded(flat, ends)

    def difference(self, texts: Sequence[str]) -> str | None:
        """Return the first difference between the ids of the fast tokenizer and of the reference, or None."""
        if self._fast is None:
            return None
        expected, expected_lengths = self.reference()._encode_texts(texts)
        try:
            ids, lengths = self._fast.encode_batch(texts)
        except ValueError as error:
            return f"{self.name} rejects a text that {self.reference().name} accepts ({error})"
        if np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected):
            return None
        pairs = zip(texts, _split_ids(ids, lengths), _split_ids(expected, expected_lengths), strict=True)
        for text, text_ids, expected_ids in pairs:
            if not np.array_equal(text_ids, expected_ids):
                return self._describe_difference(text, text_ids.tolist(), expected_ids.tolist())
        raise AssertionError("all texts are equal, but their concatenations differ")

    def self_check(self) -> str | None:
        """Return `difference` for a fixed sample of difficult texts, including the added tokens of this tokenizer."""
        if self._fast is None:
            return None
        return self.difference(fixed_sample(self.added_tokens))

    def count_special(self, documents: Iterable[Document]) -> int:
        """Return the number of documents that contain the text of a special token."""
        return sum(isinstance(document, str) and self._contains_special(document) for document in documents)

    def unsplittable_tokens(self) -> list[str]:
        """Return the begin and end tokens whose text gets their id although special tokens are encoded as text."""
        if not isinstance(self._tokenizer, Tokenizer) or self.special_tokens_in_text == "ids":
            return []
        names = {i: self._tokenizer.token(i) for i in (self.eot_id, self._tokenizer.bos_id) if i is not None}
        return [name for token_id, name in names.items() if token_id in self._tokenizer.encode(name)]

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Tokens that the tokenizer matches before splitting the text; empty without a fast tokenizer."""
        return self._fast.added_tokens if self._fast else ()

    def reference(self, reason: str = "the reference tokenizer is requested") -> DocumentEncoder:
        """Return an equal encoder without the fast tokenizer; self if it has none."""
        if self._fast is None:
            return self
        other = DocumentEncoder.__new__(DocumentEncoder)
        other.__dict__ = {**self.__dict__, "_fast": None, "fallback_reason": reason}
        return other

    def _encode_content(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of the documents, without bos and eot ids, and the number of ids of each."""
        texts = [document for document in documents if isinstance(document, str)]
        if len(texts) == len(documents):
            return self._encode_texts(texts)
        encoded = _split_ids(*self._encode_texts(texts))
        parts = [next(encoded) if isinstance(document, str) else self._check_ids(document) for document in documents]
        return np.concatenate(parts), np.fromiter(map(len, parts), np.int64, count=len(parts))

    def _encode_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        if self._tokenizer is None:
            raise ConfigError("the documents are texts, expected token ids; use --tokenizer to encode texts")
        if self._fast is not None:
            try:
                return self._fast.encode_batch(texts)
            except ValueError:
                pass  # it rejects characters without an id; the reference accepts them and encodes this batch
        try:
            lists = self._tokenizer.encode_batch(texts)
        except TypeError as error:
            raise _invalid_text_error(texts, error) from error
        lengths = np.fromiter(map(len, lists), np.int64, count=len(lists))
        return np.fromiter((i for ids in lists for i in ids), np.int64, count=int(lengths.sum())), lengths

    def _check_ids(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids of one document in `dtype`; DataError if they are not valid ids."""
        ids = np.asarray(ids)
        if not ids.size:
            return np.empty(0, self.dtype)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(
                f"a document of token ids has dtype {ids.dtype} and shape {ids.shape}, expected a 1-D integer array"
            )
        if not 0 <= int(smallest := ids.min()) <= int(largest := ids.max()) < self.vocab_size:
            raise self._out_of_range(smallest if smallest < 0 else largest)
        return ids.astype(self.dtype)

    def _out_of_range(self, token_id: Any) -> DataError:
        return DataError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} ids; check --vocab_size")

    def _describe_difference(self, text: str, ids: list[int], expected: list[int]) -> str:
        first = 0
        while first < min(len(ids), len(expected)) and ids[first] == expected[first]:
            first += 1
        excerpt = text if len(text) <= 80 else f"{text[:80]}…"
        return (
            f"{self.name} differs from {self.reference().name} at token {first} of the text {excerpt!r}: "
            f"found {ids[first : first + 5]}, expected {expected[first : first + 5]}"
        )


def make_encoder(
    tokenizer: str | None,
    eot_token: str | None,
    vocab_size: int | None,
    add_bos: bool = False,
    allow_special_tokens: bool = False,
) -> DocumentEncoder:
    """Return the encoder of a tokenizer; without a tokenizer, documents are token ids and end with id 0."""
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size must be at least 1, found {vocab_size}")
    if tokenizer is None:
        if eot_token is not None:
            raise ConfigError(
                f"--eot-token {eot_token}: needs a --tokenizer; without one, documents are token ids and end with id 0"
            )
        return DocumentEncoder(None, vocab_size, add_bos=add_bos)
    return DocumentEncoder(
        load_tokenizer(tokenizer, eot_token), vocab_size, add_bos=add_bos, allow_special_tokens=allow_special_tokens
    )


def _split_ids(ids: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the ids of each document."""
    ends = np.cumsum(lengths).tolist()
    return (ids[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _invalid_text_error(texts: Sequence[str], error: Exception) -> Exception:
    """Return a DataError for the first text with a lone surrogate, else the tokenizer's own error.

    Lone surrogates are the only str content that UTF-8 cannot encode.
    """
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            return DataError(
                f"document {number} of a batch is not valid text: character {problem.start} is the lone surrogate "
                f"{text[problem.start]!r}, in {text[max(0, problem.start - 30) : problem.start + 30]!r}"
            )
    return error
