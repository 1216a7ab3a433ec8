"""Loss masks: the hand-worked example, small cases, and an independent implementation on random sequences."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from open_lm.data import mask_sequence, sample_chunk
from open_lm.data.masking import IGNORE_INDEX, document_ids, mask_targets
from open_lm.errors import DataError

L, P, _ = 42, 2, IGNORE_INDEX
ROWS = torch.tensor([[0, 1, P, L], [0, 1, L, P], [0, L, 1, P], [L, 0, 1, P], [0, 1, P, 3], [L, 0, L, 1], [L, L, L, 1]])


def flags(**options: object) -> SimpleNamespace:
    return SimpleNamespace(seq_len=3, **options)


def test_hand_worked_example() -> None:
    a, b, c, d, e, f = range(10, 16)
    chunk = torch.tensor([[a, b, c, L, d, e, L, f, P, P]])
    args = SimpleNamespace(seq_len=9, target_mask_left=L, target_mask_individual=P, squash_mask_left=False)
    inputs, targets = sample_chunk(chunk, args)
    assert inputs.tolist() == [[a, b, c, L, d, e, L, f, P]]
    assert targets.tolist() == [[_, _, _, _, _, _, f, _, _]]
    args.squash_mask_left = True
    inputs, targets = sample_chunk(chunk, args)
    assert inputs.tolist() == [[a, b, c, d, e, f, P, P, P]]
    assert targets.tolist() == [[_, _, _, _, f, _, _, _, _]]


def test_no_mask_only_shifts() -> None:
    inputs, targets = sample_chunk(ROWS, flags())
    assert torch.equal(inputs, ROWS[:, :-1])
    assert torch.equal(targets, ROWS[:, 1:])


def test_mask_left_keeps_what_follows_the_last_marker() -> None:
    inputs, targets = sample_chunk(ROWS, flags(target_mask_left=L))
    assert torch.equal(inputs, ROWS[:, :-1])
    assert targets.tolist() == [[_, _, _], [_, _, P], [_, 1, P], [0, 1, P], [1, P, 3], [_, _, 1], [_, _, 1]]


def test_mask_individual_is_never_a_target() -> None:
    inputs, targets = sample_chunk(ROWS, flags(target_mask_individual=P))
    assert torch.equal(inputs, ROWS[:, :-1])
    assert targets.tolist() == [[1, _, L], [1, L, _], [L, 1, _], [0, 1, _], [1, _, 3], [0, L, 1], [L, L, 1]]


def test_both_masks() -> None:
    targets = sample_chunk(ROWS, flags(target_mask_left=L, target_mask_individual=P))[1]
    assert targets.tolist() == [[_, _, _], [_, _, _], [_, 1, _], [0, 1, _], [1, _, 3], [_, _, 1], [_, _, 1]]


def test_squash_removes_the_marker() -> None:
    inputs, targets = sample_chunk(ROWS[:6], flags(target_mask_left=L, target_mask_individual=P, squash_mask_left=True))
    assert inputs.tolist() == [[0, 1, P], [0, 1, P], [0, 1, P], [0, 1, P], [0, 1, P], [0, P, P]]
    assert targets.tolist() == [[_, _, _], [_, _, _], [1, _, _], [0, 1, _], [1, _, 3], [_, 1, _]]


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=4),
    st.sampled_from([None, 4]),
    st.sampled_from([None, 5]),
    st.booleans(),
)
def test_masks_row_by_row(rows: list[list[int]], left: int | None, individual: int | None, squash: bool) -> None:
    """Compare the batched implementation with one on lists."""
    chunk = torch.tensor(rows)
    got = mask_targets(chunk[:, :-1], chunk[:, 1:], mask_left=left, mask_individual=individual, squash=squash)
    for row, inputs, targets in zip(rows, *(tensor.tolist() for tensor in got), strict=True):
        expected_inputs, expected = row[:-1], row[1:]
        if left is not None:
            last = max((position for position, token in enumerate(expected) if token == left), default=-1)
            expected = [_ if position <= last and token != left else token for position, token in enumerate(expected)]
            if squash:
                expected_inputs = [token for token in expected_inputs if token != left]
                expected = [token for token in expected if token != left]
                expected_inputs += [individual or 0] * (6 - len(expected_inputs))
                expected += [_] * (6 - len(expected))
        expected = [_ if token in (left, individual) and token is not None else token for token in expected]
        assert (inputs, targets) == (expected_inputs, expected)


def test_longer_chunks_are_cropped_at_random() -> None:
    chunk = torch.arange(20).repeat(2, 1)
    starts = set()
    for _try in range(200):
        inputs, targets = sample_chunk(chunk, flags())
        assert torch.equal(inputs + 1, targets)
        starts.add(int(inputs[0, 0]))
    assert starts == set(range(17))


def test_a_shorter_chunk_is_an_error() -> None:
    with pytest.raises(DataError, match="has 3 ids per sequence, but seq_len 3 needs 4"):
        sample_chunk(torch.zeros(1, 3, dtype=torch.int64), flags())


def test_mask_sequence_starts_anywhere_and_does_not_change_the_chunk() -> None:
    chunk = torch.tensor([[9, 9, 1, L, 5, 6, 9]])
    before = chunk.clone()
    inputs, targets = mask_sequence(chunk, 2, flags(target_mask_left=L), ignore_tok=-7)
    assert inputs.tolist() == [[1, L, 5]]
    assert targets.tolist() == [[-7, 5, 6]]
    assert torch.equal(chunk, before)


def test_document_ids_by_hand() -> None:
    end, pad = 0, 9
    rows = torch.tensor([[5, 5, end, 5, end, end, end, 5, pad], [end] * 9, [5] * 9, [end, *[5] * 7, end]])
    numbers = document_ids(rows, end)
    assert numbers.dtype == torch.int32
    assert numbers.tolist() == [[0, 0, 0, 1, 1, 2, 3, 4, 4], [*range(9)], [0] * 9, [0, *[1] * 8]]


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3))
def test_document_ids_token_by_token(rows: list[list[int]]) -> None:
    expected = [[row[:position].count(3) for position in range(9)] for row in rows]
    assert document_ids(torch.tensor(rows), 3).tolist() == expected
