"""The exhaustive comparison of the fast tokenizer with the reference: random hostile texts and given documents."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from open_lm.datapreprocess.adversarial_texts import random_texts
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import ConfigError

_BATCH_TEXTS = 1000
_BATCH_CHARACTERS = 1 << 20
_MAX_SHOWN = 5


@dataclass
class Comparison:
    """What `verify` found: how much was compared, what differs, how long each side took."""

    fast: str
    reference: str
    texts: int = 0
    num_bytes: int = 0
    tokens: int = 0
    differing: int = 0
    shown: list[str] = field(default_factory=list)  # the first differences, a sentence each
    fast_seconds: float = 0.0
    reference_seconds: float = 0.0

    def summary(self) -> str:
        """A few lines for a person."""
        rates = [self.num_bytes / 1e6 / max(s, 1e-9) for s in (self.fast_seconds, self.reference_seconds)]
        head = (
            f"{self.texts:,} texts ({self.num_bytes / 1e6:,.1f} MB, {self.tokens:,} ids) compared: "
            f"{self.differing:,} differ; {self.fast} {rates[0]:,.1f} MB/s, {self.reference} {rates[1]:,.1f} MB/s"
        )
        return "\n".join([head, *(f"  {line}" for line in self.shown)])


def verify(encoder: DocumentEncoder, count: int, documents: Iterable[str] = (), seed: int = 0) -> Comparison:
    """Compare the ids of `count` random hostile texts, which `seed` decides, and of `documents`.

    Raises ConfigError where the reference itself encodes, so that there is nothing to compare.
    """
    reference = encoder.reference()
    if reference is encoder:
        reason = encoder.fallback_reason or "documents come as ids"
        raise ConfigError(f"--verify-tokenizer: {encoder.name} itself encodes the documents: {reason}")
    found = Comparison(encoder.name, reference.name)
    for texts in _batches(chain(random_texts(count, seed, encoder.added_tokens), documents)):
        started = time.perf_counter()
        ids, ends = encoder.encode(texts)
        between = time.perf_counter()
        expected, expected_ends = reference.encode(texts)
        found.reference_seconds += time.perf_counter() - between
        found.fast_seconds += between - started
        found.texts += len(texts)
        found.num_bytes += sum(len(text.encode()) for text in texts)
        found.tokens += len(expected)
        if not (np.array_equal(ends, expected_ends) and np.array_equal(ids, expected)):
            differences = [told for text in texts if (told := encoder.difference([text]))]
            found.differing += len(differences)
            found.shown += differences[: _MAX_SHOWN - len(found.shown)]
    return found


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
