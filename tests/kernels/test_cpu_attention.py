"""Attention on a CPU: the kernels of our own and torch's, against exact sums, inside documents, and by what name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels import native
from open_lm.kernels.cpu_attention import causal_attention
from open_lm.kernels.native import attention as kernels_of_our_own

needs_matrix_units = pytest.mark.skipif(
    not {"amx_tile", "amx_bf16"} <= native.processor_features(), reason="this processor has no matrix units (AMX)"
)
KERNELS = [pytest.param("own", marks=needs_matrix_units), "torch"]


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has bfloat16 go through our own kernels, or torch's; ours have to be there where the processor allows them."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(kernels_of_our_own, "supports", lambda queries: False)
    else:
        assert kernels_of_our_own.problem(8) is None
    return name


def inputs(length: int, width: int, dtype: torch.dtype, heads: int = 3, batch: int = 2) -> list[Tensor]:
    """Queries, keys and values as the model makes them, parts of one tensor, and weights of the result."""
    torch.manual_seed(length + width)
    parts = torch.randn(batch, length, 3 * heads, width).to(dtype).split(heads, dim=2)
    return [part.detach().requires_grad_() for part in parts] + [torch.randn(batch, length, heads, width).to(dtype)]


def some_documents(length: int, batch: int = 2) -> Tensor:
    first = torch.rand(batch, length) < 0.05
    first[:, 0] = True
    return torch.where(first, torch.arange(length), 0).cummax(1).values.int()


def allowed(document_starts: Tensor | None, length: int) -> Tensor:
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if document_starts is None:
        return causal
    return causal & (document_starts[:, None, :, None] == document_starts[:, None, None, :])


def results(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> list[Tensor]:
    """What attention gives, and the gradients of its weighted sum."""
    out = attend(q, k, v)
    return [out.detach().double(), *(g.double() for g in torch.autograd.grad(out, (q, k, v), weights))]


def by_sdpa(dtype: torch.dtype, tensors: list[Tensor], mask: Tensor) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors[:3]]

    def attend(*heads: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in heads)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return results(attend, *leaves, tensors[3].to(dtype))


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("length", "width"), [(2, 8), (33, 8), (300, 8), (300, 40), (515, 64), (96, 80), (130, 128)])
def test_bfloat16_is_as_near_to_the_exact_values_as_torch(
    kernels: str, length: int, width: int, documents: bool
) -> None:
    tensors = inputs(length, width, torch.bfloat16)
    document_starts = some_documents(length) if documents else None
    mask = allowed(document_starts, length)
    exact = by_sdpa(torch.float64, tensors, mask)
    found = errors(results(lambda q, k, v: causal_attention(q, k, v, document_starts), *tensors), exact)
    bounds = errors(by_sdpa(torch.bfloat16, tensors, mask), exact)
    assert all(error <= 1.25 * bound + 1e-3 for error, bound in zip(found, bounds, strict=True)), (found, bounds)


@pytest.mark.parametrize("documents", [False, True])
def test_float32_and_float64(documents: bool) -> None:
    document_starts = some_documents(70) if documents else None
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        tensors = inputs(70, 12, dtype)
        exact = by_sdpa(torch.float64, tensors, allowed(document_starts, 70))
        found = results(lambda q, k, v: causal_attention(q, k, v, document_starts), *tensors)
        assert max(errors(found, exact)) < bound


@needs_matrix_units
def test_large_scores_and_keys_that_nobody_sees_give_no_overflow() -> None:
    q, k, v, weights = inputs(200, 64, torch.bfloat16)
    document_starts = (
        torch.arange(200, dtype=torch.int32).div(7, rounding_mode="floor").mul(7).expand(2, -1).contiguous()
    )
    large = [(x.detach() * 300).requires_grad_() for x in (q, k)]
    found = results(lambda *x: causal_attention(*x, document_starts), *large, v, weights)
    assert all(x.isfinite().all() for x in found)
    assert errors(found[:1], by_sdpa(torch.float64, [*large, v, weights], allowed(document_starts, 200))[:1])[0] < 1e-2


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_reaches_all_that_see_it(kernels: str, which: int) -> None:
    tensors = inputs(70, 16, torch.bfloat16, heads=1, batch=1)
    with torch.no_grad():
        tensors[which][0, 40, 0, 3] = torch.nan
    out, *gradients = results(causal_attention, *tensors)
    assert out[0, 40 : 41 if which == 0 else 70, 0].isnan().any(-1).all()
    assert all(not x.isfinite().all() for x in gradients[:2])


@needs_matrix_units
def test_logarithms_are_of_float32_whatever_is_the_default() -> None:
    tensors = inputs(70, 16, torch.bfloat16)
    expected = results(causal_attention, *tensors)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(causal_attention, *tensors), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


@needs_matrix_units
def test_the_number_of_threads_and_other_heads_change_no_bit() -> None:
    tensors = inputs(300, 8, torch.bfloat16, batch=3)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(results(causal_attention, *tensors))
            one = [x[1:2, :, :1].detach().requires_grad_() for x in tensors]  # fewer heads than threads
            found.append([x[:, :, :1] for x in results(causal_attention, *one)])
    finally:
        torch.set_num_threads(threads)
    for whole, one in zip(found[::2], found[1::2], strict=True):
        for a, b, c in zip(whole, found[0], one, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a[1:2, :, :1], c)


@needs_matrix_units
def test_matrix_products_of_other_libraries_between() -> None:
    """The matrix units' tiles are shaped anew by each of us."""
    tensors = inputs(64, 16, torch.bfloat16)
    a, b = torch.randn(200, 96).bfloat16(), torch.randn(96, 72).bfloat16()
    product, attended = a @ b, results(causal_attention, *tensors)
    for _ in range(3):
        for found, expected in zip(results(causal_attention, *tensors), attended, strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(a @ b, product)


def test_autocast_takes_its_type() -> None:
    tensors = inputs(40, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_attention(*tensors[:3]).dtype == torch.bfloat16
        assert causal_attention(*(x.double() for x in tensors[:3])).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_s_own_checks_of_an_operator(dtype: torch.dtype) -> None:
    for document_starts in (None, some_documents(20)):
        tensors = tuple(x.detach() for x in inputs(20, 8, dtype)[:3])
        torch.library.opcheck(
            torch.ops.open_lm.cpu_attention,
            (*tensors, document_starts),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_gradients_are_the_derivative() -> None:
    leaves = tuple(x for x in inputs(6, 4, torch.float64, heads=2)[:3])
    document_starts = torch.tensor([[0, 0, 2, 2, 2, 5]] * 2, dtype=torch.int32)
    assert torch.autograd.gradcheck(causal_attention, leaves)
    assert torch.autograd.gradcheck(causal_attention, (*leaves, document_starts))


@pytest.mark.parametrize(("batch", "length", "heads"), [(0, 8, 3), (2, 0, 3), (2, 8, 0)])
def test_nothing_to_attend(batch: int, length: int, heads: int) -> None:
    for document_starts in (None, torch.zeros(batch, length, dtype=torch.int32)):
        tensors = [torch.zeros(batch, length, heads, 8).bfloat16().requires_grad_() for _ in range(3)]
        out = causal_attention(*tensors, document_starts)
        assert out.shape == (batch, length, heads, 8)
        assert all(x.shape == out.shape for x in torch.autograd.grad(out.sum(), tensors))


def test_documents_in_any_integers_and_tensors_of_one_type() -> None:
    q, k, v, _ = inputs(40, 8, torch.bfloat16)
    document_starts = some_documents(40)
    expected = causal_attention(q, k, v, document_starts)
    for others in (document_starts.long(), document_starts.t().contiguous().t()):
        assert torch.equal(causal_attention(q, k, v, others), expected)
    with pytest.raises(ValueError, match="must have one dtype and shape"):
        causal_attention(q, k.float(), v)


# ------------------------------------------------------------------------------------------ compilation
@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled libraries, and a process that has loaded none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (kernels_of_our_own.problem, kernels_of_our_own._library):
        cached.cache_clear()
    yield tmp_path
    for cached in (kernels_of_our_own.problem, kernels_of_our_own._library):
        cached.cache_clear()


@needs_matrix_units
def test_libraries_are_compiled_once_and_left_alone(fresh: Path) -> None:
    assert kernels_of_our_own.problem(24) is None
    (library,) = (fresh / "open_lm" / "native").iterdir()
    stamp = library.stat().st_mtime_ns
    code = "from open_lm.kernels.native import attention as a; import sys; sys.exit(a.problem(24))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [(path, path.stat().st_mtime_ns) for path in library.parent.iterdir()] == [(library, stamp)]


@needs_matrix_units
@pytest.mark.parametrize("left", [0, 5000])
def test_half_a_library_is_made_anew(fresh: Path, left: int) -> None:
    """To load one ends the process."""
    code = "from open_lm.kernels.native import attention as a; import sys; sys.exit(a.problem(24))"
    subprocess.run([sys.executable, "-c", code], check=True)
    (library,) = (fresh / "open_lm" / "native").iterdir()
    whole = library.read_bytes()
    library.write_bytes(whole[:left])
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(library.read_bytes()) == len(whole)


@needs_matrix_units
def test_a_compiler_may_have_arguments(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -g0")
    assert kernels_of_our_own.problem(24) is None


@needs_matrix_units
def test_without_a_compiler_that_works_torch_s_kernels_serve(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "compiler"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'x.cpp:1: error: no such flag' >&2; exit 1; }\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    assert "no such flag" in str(kernels_of_our_own.problem(8))
    assert not list((fresh / "open_lm" / "native").iterdir())
    q, k, v, _ = inputs(40, 8, torch.bfloat16)
    assert causal_attention(q, k, v).isfinite().all()


@needs_matrix_units
def test_what_is_missing_is_told(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert kernels_of_our_own.problem(8) == "there is no C++ compiler g++ (install g++, or set CXX)"
    monkeypatch.setenv("CXX", str(fresh / "absent"))
    assert "absent" in str(kernels_of_our_own.problem(16))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert "set XDG_CACHE_HOME to a writable folder" in str(kernels_of_our_own.problem(24))

    def nobody_knows() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody_knows)
    assert "set XDG_CACHE_HOME to a writable folder" in str(kernels_of_our_own.problem(32))


def test_a_processor_without_matrix_units_is_told(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "processor_features", lambda: frozenset({"avx512f"}))
    assert "this processor has no amx_bf16, amx_tile, avx512_bf16" in str(kernels_of_our_own.problem(8))
    assert "the head width is 10000, expected at most 256" in str(kernels_of_our_own.problem(10_000))
