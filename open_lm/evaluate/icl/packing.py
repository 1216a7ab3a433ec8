"""Pack prompts so that shared tokens are computed once, and form batches.

The prompts of an example's choices often share their context, and examples of a task share the beginning of it, such as
an instruction or the first of the few-shot examples. A packed sequence has every shared token once: it consists of
pieces, each of which follows the tokens of a shared prefix. A token has the position and sees the tokens that it would
have and see in the separate prompt, so that the model computes the same for it.

Legend: B sequences of a batch, T tokens of a sequence, N scored tokens, P pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from open_lm.evaluate.icl.prompts import Example, Ids
from open_lm.kernels.prefix_attention import Piece

# Attention to T * T pairs of tokens costs about as much as the remaining work for this number times T * T / D tokens.
_PAIR_COST = 0.5
_MAX_MASK_BYTES = 2**26  # of the mask of a batch of packed sequences


@dataclass(frozen=True)
class Prompt:
    """The prompt of a choice.

    Attributes:
        example: the example.
        choice: index of the choice.
        ids: tokens that the model reads, (n,) int32: all except for the last one.
        key: bytes whose order is that of the ids.
    """

    example: Example
    choice: int
    ids: Ids
    key: bytes

    @staticmethod
    def of_choice(example: Example, choice: int) -> Prompt:
        context, continuation = example.choices[choice].context, example.choices[choice].continuation
        ids = np.concatenate((context, continuation[:-1]))
        return Prompt(example, choice, ids, ids.astype(">i4").tobytes())

    @property
    def targets(self) -> Ids:
        """The scored tokens; the last of `ids` predicts the last of them."""
        return self.example.choices[self.choice].continuation


@dataclass(frozen=True)
class PackedSequence:
    """A sequence for one or several prompts.

    Attributes:
        ids: (T,) int32 tokens.
        positions: (T,) int32, the position of each token in its prompt.
        pieces: (P,) the pieces.
        prompts: in the order of their scored tokens.
        sources: (N,) int64, index of the token that predicts each scored token.
        targets: (N,) int32, the scored tokens.
    """

    ids: Ids
    positions: np.ndarray
    pieces: tuple[Piece, ...]
    prompts: tuple[Prompt, ...]
    sources: np.ndarray
    targets: Ids

    @property
    def is_causal(self) -> bool:
        """Whether every token sees all earlier ones."""
        return len(self.pieces) == 1


@dataclass(frozen=True)
class Unit:
    """An example, which is computed in one batch.

    Attributes:
        example: the example.
        prompts: one for each different choice, in the order of their tokens.
        num_tokens: different tokens of the prompts.
        width: D of a model that accepts packed sequences; None for a model that does not.
    """

    example: Example
    prompts: tuple[Prompt, ...]
    num_tokens: int
    width: int | None

    @cached_property
    def sequences(self) -> tuple[PackedSequence, ...]:
        """The sequences of the example, for batches of padded sequences: one if that saves work."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        separate = sum(lengths)
        pair_cost = _PAIR_COST / self.width if self.width else 0.0
        cost = self.num_tokens + pair_cost * self.num_tokens**2
        costs_less = cost < separate + pair_cost * sum(length**2 for length in lengths) / 2
        if self.num_tokens == max(lengths) or (self.width and costs_less):
            return (pack(self.prompts),)
        return tuple(pack([prompt]) for prompt in self.prompts)

    @property
    def length(self) -> int:
        """The length of the longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)

    @property
    def is_packed(self) -> bool:
        """Whether a sequence needs a mask."""
        return not self.sequences[0].is_causal


def pack_example(example: Example, width: int | None) -> Unit:
    """Return the prompts of an example.

    Equal choices are computed once: `choices` names the first of them.

    Args:
        example: an example with continuations.
        width: D of a model that accepts packed sequences; None for a model that does not.
    """
    prompts = [Prompt.of_choice(example, index) for index in dict.fromkeys(equal_choices(example))]
    ordered = sorted(prompts, key=lambda prompt: prompt.key)
    num_tokens = sum(len(prompt.ids) - shared for prompt, shared in _with_shared_tokens(ordered))
    return Unit(example, tuple(ordered), num_tokens, width)


def equal_choices(example: Example) -> list[int]:
    """Return, for each choice, the first choice with the same prompt."""
    first: dict[tuple[bytes, bytes], int] = {}
    keys = [(choice.context.tobytes(), choice.continuation.tobytes()) for choice in example.choices]
    return [first.setdefault(key, index) for index, key in enumerate(keys)]


def _with_shared_tokens(ordered: Iterable[Prompt]) -> Iterator[tuple[Prompt, int]]:
    """Yield prompts in the order of their tokens, with the number of first tokens that the one before has as well."""
    before = np.empty(0, dtype=np.int32)
    for prompt in ordered:
        length = min(len(before), len(prompt.ids))
        differences = (before[:length] != prompt.ids[:length]).nonzero()[0]
        yield prompt, int(differences[0]) if len(differences) else length
        before = prompt.ids


def pack(prompts: Iterable[Prompt]) -> PackedSequence:
    """Return the sequence of prompts in which every shared token occurs once."""
    ordered = sorted(prompts, key=lambda prompt: prompt.key)
    parts, positions, sources = [], [], []
    pieces: list[Piece] = []
    path: tuple[tuple[int, int], ...] = ()  # ranges of the tokens of the prompt
    offset = 0
    for prompt, shared in _with_shared_tokens(ordered):
        path, length = _first_tokens(path, shared), len(prompt.ids)
        if length > shared:
            end = offset + length - shared
            if path and path[-1][1] == offset:  # the prompt continues the last piece
                pieces[-1] = pieces[-1]._replace(stop=end)
            else:
                pieces.append(Piece(offset, end, path))
            path = _joined(path, (offset, end))
            parts.append(prompt.ids[shared:])
            positions.append(np.arange(shared, length, dtype=np.int32))
            offset = end
        predicting = _last_tokens(path, len(prompt.targets))
        sources.append(predicting)
    return PackedSequence(
        ids=np.concatenate(parts),
        positions=np.concatenate(positions),
        pieces=tuple(pieces),
        prompts=tuple(ordered),
        sources=np.concatenate(sources),
        targets=np.concatenate([prompt.targets for prompt in ordered]),
    )


def _first_tokens(path: tuple[tuple[int, int], ...], count: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the first tokens of a path."""
    kept = []
    for start, stop in path:
        if count <= 0:
            break
        kept.append((start, min(stop, start + count)))
        count -= stop - start
    return tuple(kept)


def _joined(path: tuple[tuple[int, int], ...], span: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return a path with one more range; adjacent ranges become one."""
    if path and path[-1][1] == span[0]:
        return (*path[:-1], (path[-1][0], span[1]))
    return (*path, span)


def _last_tokens(path: tuple[tuple[int, int], ...], count: int) -> np.ndarray:
    """Return the indices (count,) int64 of the last tokens of a path."""
    parts: list[np.ndarray] = []
    for start, stop in reversed(path):
        if count <= 0:
            break
        parts.insert(0, np.arange(max(start, stop - count), stop))
        count -= stop - start
    return np.concatenate(parts)


def batches_of_lengths(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return batches of indices of texts to generate, the longest first, of at most `max_tokens` tokens with padding.

    A text that is longer is a batch of its own.

    Args:
        lengths: tokens of each prompt and of the text after it.
        max_tokens: tokens of a batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def form_batches(units: Sequence[Unit], max_tokens: int, padded: bool) -> list[list[Unit]]:
    """Return batches of units of at most `max_tokens` tokens each. A larger unit is a separate batch.

    Units of padded batches have similar lengths, the longest first. The others are in the order of their tokens, so
    that units of a batch share as many as possible.

    Args:
        units: the units of all examples.
        max_tokens: limit of a batch.
        padded: whether all sequences of a batch get the length of the longest one. Packed sequences, which then need a
            mask, and others are in separate batches.
    """
    if not padded:
        by_tokens = sorted(units, key=lambda unit: (unit.prompts[0].key, unit.example.index))
        return list(_fill(by_tokens, lambda batch: sum(unit.num_tokens for unit in batch) > max_tokens))
    ordered = sorted(units, key=lambda unit: (-unit.length, unit.example.index))

    def is_full(batch: Sequence[Unit]) -> bool:
        count, length = sum(len(unit.sequences) for unit in batch), batch[0].length
        return count * length > max_tokens or (batch[0].is_packed and count * length**2 > _MAX_MASK_BYTES)

    groups = ([unit for unit in ordered if unit.is_packed is packed] for packed in (True, False))
    return [batch for group in groups for batch in _fill(group, is_full)]


def _fill(units: Sequence[Unit], is_full: Callable[[Sequence[Unit]], bool]) -> Iterator[list[Unit]]:
    batch: list[Unit] = []
    for unit in units:
        if batch and is_full([*batch, unit]):
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch
