"""Fast byte-pair encoding with the fastokens library, for the tokenizers that it supports.

It gives the same ids as the tokenizer's own library, many times faster, and returns arrays instead of Python lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from open_lm.datapreprocess.sentencepiece_json import NotConvertible, convert
from open_lm.tokenizer import JsonTokenizer, SentencePieceTokenizer


class NoFastTokenizer(Exception):
    """A tokenizer that fastokens does not support; the message gives the reason."""


class FastTokenizer:
    """An encoder of batches of texts. It pickles as its source; the native tokenizer is built on first use.

    Attributes:
        library: name of the library.
        added_tokens: tokens that the tokenizer matches before splitting the text, and its control pieces.
        split_special_tokens: whether special tokens in texts are encoded as plain text.
    """

    library = "fastokens"

    def __init__(self, source: str, added_tokens: Sequence[str], split_special_tokens: bool = False) -> None:
        self._source = source
        self.added_tokens = tuple(added_tokens)
        self.split_special_tokens = split_special_tokens
        self._native: Any = _load(source)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all texts, and the number of ids of each text."""
        if self._native is None:
            self._native = _load(self._source)
        ids, offsets = self._native.encode_batch_flat(texts, split_special_tokens=self.split_special_tokens)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}


def fast_tokenizer(tokenizer: object) -> FastTokenizer:
    """Return the fast tokenizer that is equivalent to `tokenizer`; NoFastTokenizer if it is not supported."""
    try:
        if isinstance(tokenizer, JsonTokenizer):
            source = tokenizer.encoding_source
        elif isinstance(tokenizer, SentencePieceTokenizer):
            source = convert(tokenizer.source)
        else:
            raise NoFastTokenizer(f"fastokens cannot read a {type(tokenizer).__name__}")
        return FastTokenizer(source, tokenizer.added_tokens(), tokenizer.splits_special_tokens)
    except ImportError as error:
        raise NoFastTokenizer(f"fastokens is not installed ({error})") from error
    except NotConvertible as error:
        raise NoFastTokenizer(f"the sentencepiece model cannot be converted: {error}") from error
    except ValueError as error:
        raise NoFastTokenizer(f"fastokens does not support this tokenizer ({error})") from error


def _load(source: str) -> Any:
    import fastokens

    native = fastokens.Tokenizer.from_json_str(source)
    native.no_padding()
    native.no_truncation()
    return native
