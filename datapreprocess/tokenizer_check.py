"""Compare the fast tokenizer with the reference on random difficult texts and on given documents."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from open_lm.datapreprocess.adversarial_texts import random_texts
from open_lm.datapreprocess.job import PreprocessJob
from open_lm.datapreprocess.readers import Piece, PieceReader
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import ConfigError, DataError

_BATCH_TEXTS = 1000
_BATCH_CHARACTERS = 1 << 20
_MAX_EXAMPLES = 5


@dataclass
class Comparison:
    """The result of `verify`: amounts of compared data, differences, and the time of each tokenizer."""

    fast: str
    reference: str
    texts: int = 0
    num_bytes: int = 0
    tokens: int = 0
    differing: int = 0
    examples: list[str] = field(default_factory=list)  # descriptions of the first differences
    fast_s: float = 0.0
    reference_s: float = 0.0

    def summary(self) -> str:
        """Return a summary of a few lines."""
        rates = [self.num_bytes / 1e6 / max(s, 1e-9) for s in (self.fast_s, self.reference_s)]
        head = (
            f"{self.texts:,} texts ({self.num_bytes / 1e6:,.1f} MB, {self.tokens:,} ids) compared: "
            f"{self.differing:,} differ; {self.fast} {rates[0]:,.1f} MB/s, {self.reference} {rates[1]:,.1f} MB/s"
        )
        return "\n".join([head, *(f"  {line}" for line in self.examples)])


def verify(encoder: DocumentEncoder, count: int, documents: Iterable[str] = (), seed: int = 0) -> Comparison:
    """Compare the ids of `count` random difficult texts, generated from `seed`, and of `documents`.

    Raises ConfigError if the encoder uses the reference, so that there is nothing to compare.
    """
    reference = encoder.reference()
    if reference is encoder:
        reason = encoder.fallback_reason or "documents are token ids"
        raise ConfigError(f"--verify-tokenizer: there is no fast tokenizer to verify: {reason}")
    result = Comparison(encoder.name, reference.name)
    for texts in _batches(chain(random_texts(count, seed, encoder.added_tokens), documents)):
        started = time.perf_counter()
        ids, ends = encoder.encode(texts)
        fast_end = time.perf_counter()
        expected, expected_ends = reference.encode(texts)
        result.reference_s += time.perf_counter() - fast_end
        result.fast_s += fast_end - started
        result.texts += len(texts)
        result.num_bytes += sum(len(text.encode()) for text in texts)
        result.tokens += len(expected)
        if not (np.array_equal(ends, expected_ends) and np.array_equal(ids, expected)):
            differences = [message for text in texts if (message := encoder.difference([text]))]
            result.differing += len(differences)
            result.examples += differences[: _MAX_EXAMPLES - len(result.examples)]
    return result


def verify_job(encoder: DocumentEncoder, job: PreprocessJob, count: int) -> None:
    """Print the comparison for the first `count` documents of a job and as many random texts.

    Raise DataError if the tokenizers differ, and ConfigError if there is nothing to compare.
    """
    if count < 1:
        raise ConfigError(f"--verify-tokenizer must be at least 1, found {count}")
    pieces = (Piece(item.url, num_bytes=item.num_bytes) for item in job.inputs)
    blocks = (block for piece in pieces for block in PieceReader(piece, job.options))
    texts = (document for block in blocks for document in block.documents if isinstance(document, str))
    result = verify(encoder, count, islice(texts, count))
    print(result.summary())
    if result.differing:
        raise DataError(f"the fast tokenizer differs from the reference in {result.differing} texts")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) >= _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
