"""Pack the prompts of an example so that shared tokens are computed once, and form batches of similar length.

The prompts of an example's choices often share their context. The example then becomes one packed sequence: the shared
prefix, followed by the rest of each choice. Every rest attends to the prefix and to itself, and its positions follow
those of the prefix, so that the model computes for each token what it would compute in the separate prompt.

Legend: B sequences of a batch, T tokens of a sequence, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from open_lm.evaluate.icl.prompts import Choice, Example, Ids
from open_lm.kernels.prefix_attention import Span

SHARED = 0  # segment of the shared prefix; the rests of the choices have 1, 2, …
# Attention to T * T pairs of tokens costs about as much as the remaining work for this number times T * T / D tokens.
_PAIR_COST = 0.5
_MAX_MASK_BYTES = 2**26  # of the mask of a batch of packed sequences


@dataclass(frozen=True)
class PackedSequence:
    """A sequence for one or several choices of an example.

    Attributes:
        ids: (T,) int32 tokens.
        positions: (T,) int32, the position of each token in its prompt.
        span: number of tokens of the shared prefix and of the rest of each choice; without rests, each token attends
            to all earlier ones.
        sources: (N,) int64, index of the token that predicts each scored token.
        targets: (N,) int32, the scored tokens.
        choices: (N,) int64, the choice to which each scored token belongs.
    """

    ids: Ids
    positions: np.ndarray
    span: Span
    sources: np.ndarray
    targets: Ids
    choices: np.ndarray

    @property
    def segments(self) -> np.ndarray:
        """(T,) int32: SHARED, or the number of the rest, from 1."""
        shared, rests = self.span
        return np.repeat(np.arange(1 + len(rests), dtype=np.int32), (shared, *rests))


@dataclass(frozen=True)
class Unit:
    """The sequences of an example, which are computed in one batch."""

    example: Example
    sequences: tuple[PackedSequence, ...]

    @property
    def length(self) -> int:
        """The length of the longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def is_packed(self) -> bool:
        """Whether a sequence has rests that follow a shared prefix."""
        return bool(self.sequences[0].span[1])


def pack_example(example: Example, width: int | None) -> Unit:
    """Return the sequences of an example.

    Equal choices are computed once: `choices` names the first of them.

    Args:
        example: an example with continuations.
        width: D of a model that accepts packed sequences; None for a model that does not.
    """
    first: dict[tuple[bytes, bytes], int] = {}
    for index, choice in enumerate(example.choices):
        first.setdefault((choice.context.tobytes(), choice.continuation.tobytes()), index)
    members = list(first.values())
    inputs = [_inputs(example.choices[index]) for index in members]
    shared = _common_prefix(inputs)
    tails = sum(len(ids) - shared for ids in inputs)
    if shared and (len(members) == 1 or not tails or (width and _saves(inputs, shared, shared + tails, width))):
        return Unit(example, (_packed(example, members, inputs, shared),))
    return Unit(example, tuple(_packed(example, [i], [ids], len(ids)) for i, ids in zip(members, inputs, strict=True)))


def equal_choices(example: Example) -> list[int]:
    """Return, for each choice, the first choice with the same prompt."""
    first: dict[tuple[bytes, bytes], int] = {}
    keys = [(choice.context.tobytes(), choice.continuation.tobytes()) for choice in example.choices]
    return [first.setdefault(key, index) for index, key in enumerate(keys)]


def _inputs(choice: Choice) -> Ids:
    """Return the tokens of a prompt that the model reads: all except for the last one."""
    return np.concatenate((choice.context, choice.continuation[:-1]))


def _common_prefix(sequences: Sequence[Ids]) -> int:
    """Return the number of tokens with which all sequences begin."""
    first, length = sequences[0], len(sequences[0])
    for other in sequences[1:]:
        length = min(length, len(other))
        differences = np.flatnonzero(first[:length] != other[:length])
        length = int(differences[0]) if len(differences) else length
    return length


def _saves(inputs: Sequence[Ids], shared: int, total: int, width: int) -> bool:
    """Return whether a packed sequence of `total` tokens costs less than the separate ones."""
    pair_cost = _PAIR_COST / width
    separate = sum(len(ids) + pair_cost * len(ids) ** 2 / 2 for ids in inputs)
    return shared > 0 and total + pair_cost * total**2 < separate


def _packed(example: Example, members: Sequence[int], inputs: Sequence[Ids], shared: int) -> PackedSequence:
    """Return the packed sequence of some choices, whose inputs share their first tokens."""
    parts, positions = [inputs[0][:shared]], [np.arange(shared)]
    sources, targets, choices = [], [], []
    offset = shared
    for index, ids in zip(members, inputs, strict=True):
        choice = example.choices[index]
        parts.append(ids[shared:])
        positions.append(np.arange(shared, len(ids)))
        predicting = np.arange(len(choice.context) - 1, len(ids))  # positions of the predicting tokens
        sources.append(np.where(predicting < shared, predicting, predicting - shared + offset))
        targets.append(choice.continuation)
        choices.append(np.full(len(choice.continuation), index))
        offset += len(ids) - shared
    return PackedSequence(
        ids=np.concatenate(parts),
        positions=np.concatenate(positions).astype(np.int32),
        span=(shared, tuple(len(ids) - shared for ids in inputs) if offset > shared else ()),
        sources=np.concatenate(sources),
        targets=np.concatenate(targets),
        choices=np.concatenate(choices),
    )


def form_batches(units: Sequence[Unit], max_tokens: int, padded: bool) -> list[list[Unit]]:
    """Return batches of units of similar length, the longest first, of at most `max_tokens` tokens each.

    A larger unit is a separate batch.

    Args:
        units: the units of all examples.
        max_tokens: limit of a batch.
        padded: whether all sequences of a batch get the length of the longest one. Packed sequences, which then need a
            mask, and others are in separate batches.
    """
    ordered = sorted(units, key=lambda unit: (-unit.length, unit.example.index))
    if not padded:
        return list(_fill(ordered, lambda batch: sum(unit.num_tokens for unit in batch) > max_tokens))

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
