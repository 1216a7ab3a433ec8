"""The fast tokenizer: byte-pair encoding by the fastokens library, for those tokenizers that it can take.

It gives the ids that the tokenizer's own library gives, many times faster, and no Python object for every id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from open_lm.datapreprocess.sentencepiece_json import NotConvertible, convert
from open_lm.tokenizer import JsonTokenizer, SentencePieceTokenizer


class NoFastTokenizer(Exception):
    """There is no fast tokenizer for a tokenizer; the message says why."""


class FastTokenizer:
    """Batches of texts to ids. Pickles as its source; the native tokenizer is built by the first use.

    Attributes:
        library: name of the library that does the work.
        added_tokens: those that the tokenizer finds in a text before anything else, and its control pieces.
    """

    library = "fastokens"

    def __init__(self, source: str, added_tokens: Sequence[str]) -> None:
        self._source = source
        self.added_tokens = tuple(added_tokens)
        self._native: Any = _load(source)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one behind the other, and how many each text has."""
        if self._native is None:
            self._native = _load(self._source)
        ids, offsets = self._native.encode_batch_flat(texts)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}


def fast_tokenizer(tokenizer: object) -> FastTokenizer:
    """The fast tokenizer that takes the place of a tokenizer. Raises NoFastTokenizer where there is none for it."""
    try:
        if isinstance(tokenizer, JsonTokenizer):
            source = tokenizer.source
        elif isinstance(tokenizer, SentencePieceTokenizer):
            source = convert(tokenizer.source)
        else:
            raise NoFastTokenizer(f"a {type(tokenizer).__name__} has no file that fastokens reads")
        return FastTokenizer(source, tokenizer.added_tokens())
    except ImportError as error:
        raise NoFastTokenizer(f"fastokens is not installed ({error})") from error
    except NotConvertible as error:
        raise NoFastTokenizer(f"the sentencepiece model cannot be converted: {error}") from error
    except ValueError as error:
        raise NoFastTokenizer(f"fastokens does not take this tokenizer ({error})") from error


def _load(source: str) -> Any:
    import fastokens

    native = fastokens.Tokenizer.from_json_str(source)
    native.no_padding()
    native.no_truncation()
    return native
