"""Norms, position embeddings and the splitting of rows into blocks."""

from __future__ import annotations

import cmath
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from open_lm.errors import ConfigError
from open_lm.kernels import cache_blocks
from open_lm.kernels.cache_blocks import row_blocks
from open_lm.model.norms import NORMS, get_norm_class
from open_lm.model.positional_embedding import POSITIONAL_EMBEDDINGS, get_positional_embedding
from open_lm.model.positional_embedding.rotary import rotate_halves, rotate_interleaved


@pytest.mark.parametrize("name", sorted(NORMS))
def test_norms_match_their_definition(name: str) -> None:
    norm = get_norm_class(name)(6, eps=1e-2)
    weight, bias = (getattr(norm, part, None) for part in ("weight", "bias"))
    assert (weight is not None) == (name != "no_wb_layer_norm")
    assert (bias is not None) == (name in ("default_layer_norm", "lp_layer_norm"))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 2.0)
    x = torch.randn(3, 5, 6, dtype=torch.float64).float()
    centered = x if "rms_norm" in name else x - x.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    gain = getattr(norm, "gain_offset", 0) + (1 if weight is None else weight)
    expected = expected * gain + (0 if bias is None else bias)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("name", ["lp_layer_norm", "gain_only_lp_layer_norm"])
def test_low_precision_norm_returns_the_autocast_dtype(name: str) -> None:
    norm, x = get_norm_class(name)(6, eps=1e-5), torch.randn(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert norm(x).dtype == torch.float32


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"--model-norm: found 'batch', expected one of .*rms_norm"):
        get_norm_class("batch")
    with pytest.raises(ConfigError, match=r"--positional-embedding-type: found 'sine', expected one of rotary"):
        get_positional_embedding("sine", 8)
    with pytest.raises(ConfigError, match=r"\(head_dim, .* is 7, but must be even"):
        get_positional_embedding("rotary", 7)


def rotated(x: Tensor, pair_angles: list[float], pairs: list[tuple[int, int]]) -> Tensor:
    """Return x (K,) with each pair of features rotated as a complex number."""
    out = x.clone()
    for angle, (i, j) in zip(pair_angles, pairs, strict=True):
        value = complex(x[i], x[j]) * cmath.exp(1j * angle)
        out[i], out[j] = value.real, value.imag
    return out


@pytest.mark.parametrize("name", ["rotary", "llama_rotary", "head_rotary"])
def test_rotations_match_complex_multiplication(name: str) -> None:
    heads, width = 3, 8
    q, k = torch.randn(2, 4, heads, width), torch.randn(2, 4, heads, width)
    positions = torch.tensor([[3, 4, 5, 6], [0, 0, 1, 2]])
    embed = get_positional_embedding(name, width)
    got_q, got_k, got_v = embed(q, k, k, embed.angles(positions, heads))
    half = width // 2
    pairs = [(2 * i, 2 * i + 1) if name == "llama_rotary" else (i, i + half) for i in range(half)]
    for b, t, h in ((b, t, h) for b in range(2) for t in range(4) for h in range(heads)):
        position = h if name == "head_rotary" else int(positions[b, t])
        angles = [position * 10000 ** (-2 * i / width) for i in range(half)]
        torch.testing.assert_close(got_q[b, t, h], rotated(q[b, t, h], angles, pairs), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got_k[b, t, h], rotated(k[b, t, h], angles, pairs), atol=1e-5, rtol=1e-5)
    assert got_v is k


@pytest.mark.parametrize("name", sorted(POSITIONAL_EMBEDDINGS))
def test_results_have_the_dtype_of_values(name: str) -> None:
    q = torch.randn(1, 2, 2, 4)
    embed = get_positional_embedding(name, 4)
    got_q, got_k, got_v = embed(q, q, q.bfloat16(), embed.angles(torch.arange(2), 2))
    assert got_q.dtype == got_k.dtype == got_v.dtype == torch.bfloat16


def test_frequencies_stay_exact_in_half_precision() -> None:
    embed = get_positional_embedding("rotary", 64)
    before = embed.inv_freq.clone()
    embed.bfloat16()
    assert embed.inv_freq.dtype == torch.float32
    assert torch.equal(embed.inv_freq, before)
    q = torch.randn(1, 1, 1, 64)
    far, fresh = torch.tensor([2000]), get_positional_embedding("rotary", 64)
    exact, _, _ = fresh(q, q, q, fresh.angles(far, 1))
    torch.testing.assert_close(embed(q, q, q, embed.angles(far, 1))[0], exact)


@pytest.mark.parametrize("rotate", [rotate_halves, rotate_interleaved])
@pytest.mark.parametrize("shared", [True, False])
def test_rotation_equals_the_compiled_rotation_and_passes_gradcheck(
    rotate: Callable[..., Tensor], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With angles shared by all sequences and heads, or separate angles; with blocks of two tokens."""
    monkeypatch.setattr(cache_blocks, "_BLOCK_BYTES", 400 // torch.get_num_threads())
    q = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    angles = torch.linspace(0, 9, 20).view(5, 1, 4) if shared else torch.linspace(0, 9, 120).view(2, 5, 3, 4)
    cos, sin = angles.cos(), angles.sin()
    found = rotate(q, cos, sin)
    torch.testing.assert_close(found, torch.compile(rotate, backend="eager")(q, cos, sin), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(rotate, (q, cos, sin))
    half = rotate(q.bfloat16(), cos, sin, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and rotate(q.bfloat16(), cos, sin).dtype == torch.float32
    torch.testing.assert_close(half.double(), found, atol=3e-2, rtol=1e-2)


def test_row_blocks_cover_all_rows_once() -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    assert list(row_blocks(5, 2**19 * threads // 2, cpu)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [block.stop - block.start for block in row_blocks(3, 2**40, cpu)] == [1, 1, 1]
    assert list(row_blocks(10**6, 2**20, torch.device("meta"))) == [slice(0, 10**6)]
    assert list(row_blocks(0, 4, cpu)) == list(row_blocks(0, 4, torch.device("meta"))) == []
