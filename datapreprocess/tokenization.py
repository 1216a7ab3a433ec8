"""Documents to token ids, each document closed by the end-of-text id.

`DocumentEncoder` is the only thing the engine sees of a tokenizer: a faster one takes the place of the one inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np

from open_lm.data.shard_format import token_dtype
from open_lm.errors import ConfigError, DataError


class BatchTokenizer(Protocol):
    """What open_lm.tokenizer.load_tokenizer gives, as far as it is used here."""

    eot_id: int
    vocab_size: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class DocumentEncoder:
    """Documents (texts or arrays of ids) to one flat array of ids.

    vocab_size: ids are below it; those of the tokenizer and of documents that come as ids are checked.
    dtype: the smallest unsigned type that holds them, in which `encode` returns them.
    """

    def __init__(self, tokenizer: BatchTokenizer | None, vocab_size: int | None = None, eot_id: int = 0) -> None:
        if tokenizer is None and vocab_size is None:
            raise ConfigError("without a tokenizer the size of the vocabulary must be given (--vocab_size)")
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else 0)
        self.eot_id = tokenizer.eot_id if tokenizer else eot_id
        self.fingerprint = tokenizer.fingerprint if tokenizer else "none: documents come as ids"
        self.dtype: np.dtype[Any] = token_dtype(self.vocab_size)
        if self.eot_id >= self.vocab_size:
            raise ConfigError(
                f"--vocab_size {self.vocab_size} is too small: the end-of-text id is {self.eot_id} "
                f"(the tokenizer knows {tokenizer.vocab_size if tokenizer else 0} ids)"
            )

    def encode(self, documents: Sequence[str | np.ndarray]) -> np.ndarray:
        """The ids of all documents in their order, each followed by `eot_id`: one array of `dtype`."""
        texts = [document for document in documents if isinstance(document, str)]
        if texts and self._tokenizer is None:
            raise ConfigError("the documents are texts, not ids: name a --tokenizer")
        encoded = iter(self._tokenizer.encode_batch(texts) if texts and self._tokenizer else [])
        lists: list[Any] = []
        for document in documents:
            lists.append(next(encoded) if isinstance(document, str) else document)
            lists.append((self.eot_id,))
        ids = np.fromiter(chain.from_iterable(lists), np.int64, count=sum(map(len, lists)))
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(f"token id {worst} does not fit a vocabulary of {self.vocab_size}; see --vocab_size")
        return ids.astype(self.dtype)
