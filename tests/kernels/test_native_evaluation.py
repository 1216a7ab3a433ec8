"""Float32 CPU kernels of the evaluation compared with float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from open_lm.kernels import native
from open_lm.kernels.native import evaluation
from open_lm.kernels.prefix_attention import Piece, PrefixAttention
from open_lm.model.positional_embedding.rotary import rotate_halves

needs_vectors = pytest.mark.skipif(
    not native.processor_features() >= native.VECTORS, reason="this CPU has no AVX-512 with bfloat16"
)


def pieces() -> list[Piece]:
    """Return pieces without a prefix, with one of two ranges, with one token, and with more tokens than a vector."""
    spans = [(0, 70, ()), (70, 71, ((0, 70),)), (71, 90, ((0, 3), (5, 41))), (90, 95, ((0, 3), (5, 41), (71, 72)))]
    return [Piece(*span) for span in spans]


def exact_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the attention (N,H,K) of the pieces in float64."""
    allowed = torch.zeros(len(queries), len(queries), dtype=torch.bool)
    for piece in pieces():
        for start, stop in (*piece.prefix, (piece.start, piece.stop)):
            allowed[piece.start : piece.stop, start:stop] = True
    q, k, v = (x.double().transpose(0, 1) for x in (queries, keys, values))
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~allowed.tril(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@needs_vectors
@pytest.mark.parametrize("width", [4, 8, 16, 24, 32, 72])
@pytest.mark.parametrize("threads", [1, 2])
def test_prefix_attention(width: int, threads: int) -> None:
    torch.manual_seed(width)
    # Views of a joint projection, whose tokens and heads are not contiguous.
    queries, keys, values = torch.randn(95, 2, 3, width).unbind(2)
    table = PrefixAttention(pieces())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = evaluation.prefix_attention(queries, keys, values, table._table, table._ranges)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), exact_attention(queries, keys, values), rtol=0, atol=3e-6)
    torch.testing.assert_close(found, table._padded_attention(queries, keys, values), rtol=0, atol=6e-6)


@needs_vectors
@pytest.mark.parametrize("width", [2, 8, 40])
@pytest.mark.parametrize("heads", [1, 3])
def test_rotation(width: int, heads: int) -> None:
    torch.manual_seed(width)
    x, _other = torch.randn(2, 7, 3, 2 * width).chunk(2, dim=-1)  # not contiguous
    angles = torch.randn(1, 7, heads, width // 2).double()
    cos, sin = angles.cos(), angles.sin()
    first, second = x.double().chunk(2, dim=-1)
    expected = torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
    )
    for rotate in (evaluation.rotate_halves, rotate_halves):
        found = rotate(x, cos.float(), sin.float())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@needs_vectors
def test_softmax_sums_of_tiles() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 100).mul_(20)
    logits[1, 70] = logits[1, 30] = 90  # the first of equal maxima counts, and earlier tiles are rescaled
    targets = torch.tensor([3, 99, 30, 0, 50])
    counts = [2, 1, 0, 1, 1]
    sums = evaluation.SoftmaxSums(torch.from_numpy(np.cumsum([0, *counts])), targets)
    for start in (0, 33, 66, 99):
        sums.add(logits[:, start : start + 33].contiguous(), start)
    torch.testing.assert_close(sums.log_sums.double(), logits.double().logsumexp(-1), rtol=0, atol=2e-5)
    assert torch.equal(sums.maxima, logits.amax(-1))
    assert sums.tokens.tolist() == logits.argmax(-1).tolist() and sums.tokens[1] == 30
    rows = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    assert torch.equal(sums.target_logits, logits[rows, targets])


@needs_vectors
def test_nan_propagates() -> None:
    logits = torch.zeros(2, 40)
    logits[1, 20] = torch.nan
    sums = evaluation.SoftmaxSums(torch.tensor([0, 1, 2]), torch.tensor([1, 1]))
    sums.add(logits, 0)
    assert sums.log_sums.isnan().tolist() == [False, True]
