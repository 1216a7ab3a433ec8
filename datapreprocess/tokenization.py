"""Documents to token ids, each document closed by the end-of-text id.

`DocumentEncoder` is the only thing the engine sees of a tokenizer. Texts go through the fast tokenizer where there is
one for the tokenizer at hand; the tokenizer's own library is the reference that it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from open_lm.data.shard_format import token_dtype
from open_lm.datapreprocess.fast_tokenizer import FastTokenizer, NoFastTokenizer, fast_tokenizer
from open_lm.datapreprocess.adversarial_texts import fixed_sample
from open_lm.errors import ConfigError, DataError

Document = str | np.ndarray  # a text, or a 1-D array of ids


class BatchTokenizer(Protocol):
    """What open_lm.tokenizer.load_tokenizer gives, as far as it must be there."""

    eot_id: int
    vocab_size: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class Encoded(NamedTuple):
    """Documents as ids: one behind the other, and where in `ids` each of them ends (end of text included)."""

    ids: np.ndarray
    ends: np.ndarray


class DocumentEncoder:
    """Documents (texts or arrays of ids) to one flat array of ids.

    Pickles as the tokenizer's source and loads what it needs on first use. How many threads a batch takes is the
    process's affair: RAYON_NUM_THREADS.

    Attributes:
        vocab_size: ids are below it; those of the tokenizer and of documents that come as ids are checked.
        eot_id: follows every document.
        bos_id: precedes every document; None where nothing does.
        fingerprint: of the tokenizer; equal fingerprints mean equal ids for equal text.
        dtype: the smallest unsigned type that holds the ids, in which `encode` returns them.
        name: what encodes texts: "fastokens", "tokenizers", "sentencepiece", or "ids" where no text is expected.
        fallback_reason: why it is not the fast tokenizer; None where it is, or where there are no texts.
    """

    def __init__(
        self, tokenizer: BatchTokenizer | None, vocab_size: int | None = None, eot_id: int = 0, add_bos: bool = False
    ) -> None:
        if tokenizer is None and vocab_size is None:
            raise ConfigError("without a tokenizer the size of the vocabulary must be given (--vocab_size)")
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else 0)
        self.eot_id = tokenizer.eot_id if tokenizer else eot_id
        self.bos_id: int | None = getattr(tokenizer, "bos_id", None) if add_bos else None
        self.fingerprint = tokenizer.fingerprint if tokenizer else "none: documents come as ids"
        self.dtype: np.dtype[Any] = token_dtype(self.vocab_size)
        if add_bos and self.bos_id is None:
            raise ConfigError("no token begins a document: the tokenizer names none, or there is no tokenizer")
        if max(self.eot_id, self.bos_id or 0) >= self.vocab_size:
            bos = "" if self.bos_id is None else f" and beginning of text {self.bos_id}"
            raise ConfigError(
                f"--vocab_size {self.vocab_size} is too small for end of text {self.eot_id}{bos} "
                f"(the tokenizer knows {tokenizer.vocab_size if tokenizer else 0} ids)"
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

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """The ids of all documents in their order, each between `bos_id` (if any) and `eot_id`.

        Raises ConfigError for texts without a tokenizer, DataError for what is no text and no id of the vocabulary.
        """
        ids, lengths = self._plain(documents)
        if ids.size and not 0 <= (least := ids.min()) <= (most := ids.max()) < self.vocab_size:
            raise self._outside(least if least < 0 else most)
        before = 0 if self.bos_id is None else 1
        ends = np.cumsum(lengths + (before + 1))
        flat = np.empty(len(ids) + (before + 1) * len(ends), self.dtype)
        own = np.ones(len(flat), bool)
        own[ends - 1] = False
        flat[ends - 1] = self.eot_id
        if self.bos_id is not None:
            starts = ends - (lengths + 2)
            own[starts] = False
            flat[starts] = self.bos_id
        flat[own] = ids
        return Encoded(flat, ends)

    def difference(self, texts: Sequence[str]) -> str | None:
        """None where the fast tokenizer gives the same ids as the reference, else the first place where it does not."""
        if self._fast is None:
            return None
        expected, expected_lengths = self.reference()._texts(texts)
        try:
            ids, lengths = self._fast.encode_batch(texts)
        except ValueError as error:
            return f"{self.name} refuses a text that {self.reference().name} takes ({error})"
        if np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected):
            return None
        for text, one, other in zip(texts, _parts(ids, lengths), _parts(expected, expected_lengths), strict=True):
            if not np.array_equal(one, other):
                return self._describe(text, one.tolist(), other.tolist())
        raise AssertionError("equal parts make equal wholes")

    def self_check(self) -> str | None:
        """`difference` on a fixed sample of texts that are hard to tokenize, this tokenizer's own tokens among them."""
        if self._fast is None:
            return None
        return self.difference(fixed_sample(self.added_tokens))

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The tokens that are found in a text before anything else; none where there is no fast tokenizer."""
        return self._fast.added_tokens if self._fast else ()

    def checked(self) -> DocumentEncoder:
        """Itself where the self-check passes, else the reference with what differed as `fallback_reason`."""
        problem = self.self_check()
        return self if problem is None else self.reference(problem)

    def reference(self, reason: str = "the reference is asked for") -> DocumentEncoder:
        """The same without the fast tokenizer; itself where there is none."""
        if self._fast is None:
            return self
        other = DocumentEncoder.__new__(DocumentEncoder)
        other.__dict__ = {**self.__dict__, "_fast": None, "fallback_reason": reason}
        return other

    def _plain(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the documents themselves, one behind the other, and how many each has."""
        texts = [document for document in documents if isinstance(document, str)]
        if len(texts) == len(documents):
            return self._texts(texts)
        encoded = _parts(*self._texts(texts))
        parts = [next(encoded) if isinstance(document, str) else self._checked(document) for document in documents]
        return np.concatenate(parts), np.fromiter(map(len, parts), np.int64, count=len(parts))

    def _texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        if self._tokenizer is None:
            raise ConfigError("the documents are texts, not ids: name a --tokenizer")
        if self._fast is not None:
            try:
                return self._fast.encode_batch(texts)
            except ValueError:
                pass  # it refuses what has no id of its own; the reference, which takes that, does this batch
        try:
            lists = self._tokenizer.encode_batch(texts)
        except TypeError as error:
            raise _not_unicode(texts, error) from error
        lengths = np.fromiter(map(len, lists), np.int64, count=len(lists))
        return np.fromiter((i for ids in lists for i in ids), np.int64, count=int(lengths.sum())), lengths

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        """The ids of one document in `dtype`."""
        ids = np.asarray(ids)
        if not ids.size:
            return np.empty(0, self.dtype)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(
                f"a document of token ids must be one row of whole numbers, not {ids.dtype} of shape {ids.shape}"
            )
        if not 0 <= int(least := ids.min()) <= int(most := ids.max()) < self.vocab_size:
            raise self._outside(least if least < 0 else most)
        return ids.astype(self.dtype)

    def _outside(self, found: Any) -> DataError:
        return DataError(f"token id {found} does not fit a vocabulary of {self.vocab_size}; see --vocab_size")

    def _describe(self, text: str, found: list[int], expected: list[int]) -> str:
        same = 0
        while same < min(len(found), len(expected)) and found[same] == expected[same]:
            same += 1
        shown = text if len(text) <= 80 else f"{text[:80]}…"
        return (
            f"{self.name} differs from {self.reference().name} from token {same} of the text {shown!r}: "
            f"{found[same : same + 5]} instead of {expected[same : same + 5]}"
        )


def _parts(ids: np.ndarray, lengths: np.ndarray) -> Any:
    """The ids of each document, one after the other."""
    ends = np.cumsum(lengths).tolist()
    return (ids[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _not_unicode(texts: Sequence[str], error: Exception) -> Exception:
    """What to raise for texts that a tokenizer refused: a half surrogate is all that a str may hold amiss."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            return DataError(
                f"document {number} of a batch is not valid text: character {problem.start} is the lone surrogate "
                f"{text[problem.start]!r}, in {text[max(0, problem.start - 30) : problem.start + 30]!r}"
            )
    return error
