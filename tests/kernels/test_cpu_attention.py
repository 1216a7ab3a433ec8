"""CPU attention with the native kernels and with torch's, compared with float64, with and without documents."""

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
from open_lm.kernels.native import attention as native_attention

needs_matrix_units = pytest.mark.skipif(
    not {"amx_tile", "amx_bf16"} <= native.processor_features(), reason="this CPU has no matrix units (AMX)"
)
KERNELS = [pytest.param("native", marks=needs_matrix_units), "torch"]


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select the native kernels or torch's for bfloat16. The native ones must be available if the CPU has AMX."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(native_attention, "supports", lambda queries: False)
    else:
        assert native_attention.problem(8) is None
    return name


def inputs(length: int, width: int, dtype: torch.dtype, heads: int = 3, batch: int = 2) -> list[Tensor]:
    """Return queries, keys and values as views of one tensor, as in the model, and weights of the result."""
    torch.manual_seed(length + width)
    parts = torch.randn(batch, length, 3 * heads, width).to(dtype).split(heads, dim=2)
    return [part.detach().requires_grad_() for part in parts] + [torch.randn(batch, length, heads, width).to(dtype)]


def random_document_starts(length: int, batch: int = 2) -> Tensor:
    is_start = torch.rand(batch, length) < 0.05
    is_start[:, 0] = True
    return torch.where(is_start, torch.arange(length), 0).cummax(1).values.int()


def dense_mask(document_starts: Tensor | None, length: int) -> Tensor:
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if document_starts is None:
        return causal
    return causal & (document_starts[:, None, :, None] == document_starts[:, None, None, :])


def results(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the result of attention, and the gradients of its weighted sum."""
    out = attend(q, k, v)
    return [out.detach().double(), *(g.double() for g in torch.autograd.grad(out, (q, k, v), weights))]


def reference(dtype: torch.dtype, tensors: list[Tensor], mask: Tensor) -> list[Tensor]:
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
def test_bfloat16_is_as_accurate_as_torch(kernels: str, length: int, width: int, documents: bool) -> None:
    tensors = inputs(length, width, torch.bfloat16)
    document_starts = random_document_starts(length) if documents else None
    mask = dense_mask(document_starts, length)
    exact = reference(torch.float64, tensors, mask)
    found = errors(results(lambda q, k, v: causal_attention(q, k, v, document_starts), *tensors), exact)
    bounds = errors(reference(torch.bfloat16, tensors, mask), exact)
    assert all(error <= 1.25 * bound + 1e-3 for error, bound in zip(found, bounds, strict=True)), (found, bounds)


@pytest.mark.parametrize("documents", [False, True])
def test_float32_and_float64(documents: bool) -> None:
    document_starts = random_document_starts(70) if documents else None
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        tensors = inputs(70, 12, dtype)
        exact = reference(torch.float64, tensors, dense_mask(document_starts, 70))
        found = results(lambda q, k, v: causal_attention(q, k, v, document_starts), *tensors)
        assert max(errors(found, exact)) < bound


@needs_matrix_units
def test_large_scores_and_masked_keys_do_not_overflow() -> None:
    q, k, v, weights = inputs(200, 64, torch.bfloat16)
    document_starts = (
        torch.arange(200, dtype=torch.int32).div(7, rounding_mode="floor").mul(7).expand(2, -1).contiguous()
    )
    large = [(x.detach() * 300).requires_grad_() for x in (q, k)]
    found = results(lambda *x: causal_attention(*x, document_starts), *large, v, weights)
    assert all(x.isfinite().all() for x in found)
    assert (
        errors(found[:1], reference(torch.float64, [*large, v, weights], dense_mask(document_starts, 200))[:1])[0]
        < 1e-2
    )


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_propagates_to_all_queries_that_see_it(kernels: str, which: int) -> None:
    tensors = inputs(70, 16, torch.bfloat16, heads=1, batch=1)
    with torch.no_grad():
        tensors[which][0, 40, 0, 3] = torch.nan
    out, *gradients = results(causal_attention, *tensors)
    assert out[0, 40 : 41 if which == 0 else 70, 0].isnan().any(-1).all()
    assert all(not x.isfinite().all() for x in gradients[:2])


@needs_matrix_units
def test_logarithms_are_float32_with_any_default_dtype() -> None:
    tensors = inputs(70, 16, torch.bfloat16)
    expected = results(causal_attention, *tensors)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(causal_attention, *tensors), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


@needs_matrix_units
def test_results_do_not_depend_on_threads_or_other_heads() -> None:
    tensors = inputs(300, 8, torch.bfloat16, batch=3)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(results(causal_attention, *tensors))
            single = [x[1:2, :, :1].detach().requires_grad_() for x in tensors]  # fewer heads than threads
            found.append([x[:, :, :1] for x in results(causal_attention, *single)])
    finally:
        torch.set_num_threads(threads)
    for full, single in zip(found[::2], found[1::2], strict=True):
        for a, b, c in zip(full, found[0], single, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a[1:2, :, :1], c)


@needs_matrix_units
def test_interleaved_matrix_products_of_other_libraries() -> None:
    """Each library configures the tiles of the matrix units for itself."""
    tensors = inputs(64, 16, torch.bfloat16)
    a, b = torch.randn(200, 96).bfloat16(), torch.randn(96, 72).bfloat16()
    product, attended = a @ b, results(causal_attention, *tensors)
    for _ in range(3):
        for found, expected in zip(results(causal_attention, *tensors), attended, strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(a @ b, product)


def test_autocast_determines_the_dtype() -> None:
    tensors = inputs(40, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_attention(*tensors[:3]).dtype == torch.bfloat16
        assert causal_attention(*(x.double() for x in tensors[:3])).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_passes_opcheck(dtype: torch.dtype) -> None:
    for document_starts in (None, random_document_starts(20)):
        tensors = tuple(x.detach() for x in inputs(20, 8, dtype)[:3])
        torch.library.opcheck(
            torch.ops.open_lm.cpu_attention,
            (*tensors, document_starts),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_gradcheck() -> None:
    leaves = tuple(x for x in inputs(6, 4, torch.float64, heads=2)[:3])
    document_starts = torch.tensor([[0, 0, 2, 2, 2, 5]] * 2, dtype=torch.int32)
    assert torch.autograd.gradcheck(causal_attention, leaves)
    assert torch.autograd.gradcheck(causal_attention, (*leaves, document_starts))


@pytest.mark.parametrize(("batch", "length", "heads"), [(0, 8, 3), (2, 0, 3), (2, 8, 0)])
def test_empty_inputs(batch: int, length: int, heads: int) -> None:
    for document_starts in (None, torch.zeros(batch, length, dtype=torch.int32)):
        tensors = [torch.zeros(batch, length, heads, 8).bfloat16().requires_grad_() for _ in range(3)]
        out = causal_attention(*tensors, document_starts)
        assert out.shape == (batch, length, heads, 8)
        assert all(x.shape == out.shape for x in torch.autograd.grad(out.sum(), tensors))


def test_document_starts_of_any_integer_type_and_tensors_of_one_dtype() -> None:
    q, k, v, _ = inputs(40, 8, torch.bfloat16)
    document_starts = random_document_starts(40)
    expected = causal_attention(q, k, v, document_starts)
    for others in (document_starts.long(), document_starts.t().contiguous().t()):
        assert torch.equal(causal_attention(q, k, v, others), expected)
    with pytest.raises(ValueError, match="must have one dtype and shape"):
        causal_attention(q, k.float(), v)


# ------------------------------------------------------------------------------------------ compilation
@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled libraries in a process that has loaded none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (native_attention.problem, native_attention._library):
        cached.cache_clear()
    yield tmp_path
    for cached in (native_attention.problem, native_attention._library):
        cached.cache_clear()


@needs_matrix_units
def test_libraries_are_compiled_once(fresh: Path) -> None:
    assert native_attention.problem(24) is None
    (library,) = (fresh / "open_lm" / "native").iterdir()
    stamp = library.stat().st_mtime_ns
    code = "from open_lm.kernels.native import attention as a; import sys; sys.exit(a.problem(24))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [(path, path.stat().st_mtime_ns) for path in library.parent.iterdir()] == [(library, stamp)]


@needs_matrix_units
@pytest.mark.parametrize("size", [0, 5000])
def test_a_truncated_library_is_recompiled(fresh: Path, size: int) -> None:
    """Loading a truncated library would crash the process."""
    code = "from open_lm.kernels.native import attention as a; import sys; sys.exit(a.problem(24))"
    subprocess.run([sys.executable, "-c", code], check=True)
    (library,) = (fresh / "open_lm" / "native").iterdir()
    content = library.read_bytes()
    library.write_bytes(content[:size])
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(library.read_bytes()) == len(content)


@needs_matrix_units
def test_cxx_may_contain_arguments(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -g0")
    assert native_attention.problem(24) is None


@needs_matrix_units
def test_torch_is_used_if_the_compiler_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "compiler"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'x.cpp:1: error: no such flag' >&2; exit 1; }\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    assert "no such flag" in str(native_attention.problem(8))
    assert not list((fresh / "open_lm" / "native").iterdir())
    q, k, v, _ = inputs(40, 8, torch.bfloat16)
    assert causal_attention(q, k, v).isfinite().all()


@needs_matrix_units
def test_missing_requirements_are_reported(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert native_attention.problem(8) == "there is no C++ compiler g++ (install g++, or set CXX)"
    monkeypatch.setenv("CXX", str(fresh / "absent"))
    assert "absent" in str(native_attention.problem(16))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert "set XDG_CACHE_HOME to a writable folder" in str(native_attention.problem(24))

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert "set XDG_CACHE_HOME to a writable folder" in str(native_attention.problem(32))


def test_a_processor_without_matrix_units_is_reported(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "processor_features", lambda: frozenset({"avx512f"}))
    assert "this CPU has no amx_bf16, amx_tile, avx512_bf16" in str(native_attention.problem(8))
    assert "the head width is 10000, expected at most 256" in str(native_attention.problem(10_000))
