"""Attention functions compared with loops over queries and keys."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from open_lm.errors import ConfigError
from open_lm.model import attention
from open_lm.model.attention import (
    ATTN_ACTIVATIONS,
    ATTN_SEQ_SCALARS,
    allowed_keys,
    custom_attn,
    get_attn_func,
    sdpa_cudnn,
    sdpa_flash,
    torch_attn,
)

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda s: max(s, 0.0),
    "relu_squared": lambda s: max(s, 0.0) ** 2,
    "softplus": lambda s: math.log1p(math.exp(s)),
    "identity": lambda s: s,
    "relu6": lambda s: min(max(s, 0.0), 6.0),
    "sigmoid": lambda s: 1 / (1 + math.exp(-s)),
}
LENGTHS: dict[str, Callable[[int], float]] = {"max": float, "avg": lambda n: (n + 1) / 2, "none": lambda n: 1.0}


def qkv(q_len: int, k_len: int, batch: int = 2, heads: int = 3, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(q_len * 100 + k_len)
    shapes = ((batch, q_len, heads, width), (batch, k_len, heads, width), (batch, k_len, heads, width))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q * 3, k, v  # large enough for relu6 to clip


def reference(  # noqa: PLR0917
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    mask: Tensor | None = None,
    activation: str = "softmax",
    length: str = "none",
    alpha: float = 1.0,
) -> Tensor:
    out = torch.zeros_like(q)
    for b, i, h in ((b, i, h) for b in range(q.shape[0]) for i in range(q.shape[1]) for h in range(q.shape[2])):
        position = k.shape[1] - q.shape[1] + i
        keys = [
            j for j in range(k.shape[1]) if (not causal or j <= position) and (mask is None or bool(mask[b, j]))
        ] or [position]
        scores = [float(q[b, i, h] @ k[b, j, h]) / math.sqrt(q.shape[-1]) for j in keys]
        if activation == "softmax":
            total = sum(math.exp(s) for s in scores)
            weights = [math.exp(s) / total for s in scores]
        else:
            weights = [ACTIVATIONS[activation](s) for s in scores]
        count = k.shape[1] if mask is None else int(mask[b].sum())
        scale = LENGTHS[length](count) ** -alpha
        out[b, i, h] = sum(
            (weight * scale * v[b, j, h] for weight, j in zip(weights, keys, strict=True)), 0 * v[b, 0, h]
        )
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_len", "k_len"), [(7, 7), (1, 7), (3, 7), (1, 1)])
def test_torch_attn(q_len: int, k_len: int, causal: bool) -> None:
    q, k, v = qkv(q_len, k_len)
    torch.testing.assert_close(torch_attn(q, k, v, is_causal=causal), reference(q, k, v, causal), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_len", "k_len"), [(7, 7), (1, 7), (3, 7)])
def test_torch_attn_with_padding_on_either_side(q_len: int, k_len: int, causal: bool) -> None:
    q, k, v = qkv(q_len, k_len)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    out = torch_attn(q, k, v, is_causal=causal, attention_mask=mask)
    torch.testing.assert_close(out, reference(q, k, v, causal, mask), atol=2e-6, rtol=1e-5)


def test_fully_masked_rows_have_finite_gradients() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv(4, 4))
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    torch_attn(q, k, v, is_causal=True, attention_mask=mask).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (q, k, v))


@pytest.mark.parametrize("activation", sorted(ATTN_ACTIVATIONS))
@pytest.mark.parametrize("length", sorted(ATTN_SEQ_SCALARS))
@pytest.mark.parametrize(("q_len", "k_len"), [(6, 6), (2, 6), (1, 6)])
def test_custom_attn(activation: str, length: str, q_len: int, k_len: int) -> None:
    q, k, v = qkv(q_len, k_len, batch=1, heads=2)
    out = custom_attn(q, k, v, activation, length, 0.5, is_causal=True)
    expected = reference(q, k, v, True, None, activation, length, 0.5)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", sorted(ATTN_ACTIVATIONS))
def test_custom_attn_with_padding(activation: str) -> None:
    q, k, v = qkv(5, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = custom_attn(q, k, v, activation, "max", 1.0, is_causal=True, attention_mask=mask)
    unpadded = custom_attn(q[:1, 2:], k[:1, 2:], v[:1, 2:], activation, "max", 1.0, is_causal=True)
    torch.testing.assert_close(out[:1, 2:], unpadded, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out, reference(q, k, v, True, mask, activation, "max"), atol=1e-5, rtol=1e-5)


def test_custom_softmax_equals_torch_attn() -> None:
    q, k, v = qkv(3, 6)
    torch.testing.assert_close(custom_attn(q, k, v, "softmax", "none", 1.0, is_causal=True), torch_attn(q, k, v, True))


def test_half_precision_dtype_is_preserved() -> None:
    q, k, v = (tensor.bfloat16() for tensor in qkv(4, 6))
    mask = torch.ones(2, 6)
    assert torch_attn(q, k, v, is_causal=True, attention_mask=mask).dtype == torch.bfloat16
    assert custom_attn(q, k, v, "relu", "avg", 1.0, is_causal=True, attention_mask=mask).dtype == torch.bfloat16


def test_invalid_shapes() -> None:
    q, k, _ = qkv(4, 3)
    with pytest.raises(ValueError, match="4 queries for 3 keys"):
        allowed_keys(q, k, is_causal=True)
    q, k, _ = qkv(2, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected \(2, 3\)"):
        allowed_keys(q, k, True, torch.ones(2, 2))


def test_get_attn_func(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_attn_func("auto") is torch_attn
    assert get_attn_func("torch_attn") is torch_attn
    for name in ("xformers_attn", "xformers_attn_variable_length"):
        with pytest.raises(ConfigError, match=f"--attn-name {name}: there is no CUDA device"):
            get_attn_func(name)
    monkeypatch.setattr(attention, "has_xformers", lambda: True)
    assert get_attn_func("auto") is attention.auto_attn
    assert get_attn_func("xformers_attn_variable_length") is attention.xformers_attn
    q, k, v = qkv(4, 4)
    torch.testing.assert_close(attention.auto_attn(q, k, v, True), torch_attn(q, k, v, True))


BACKENDS = ("sdpa_flash", "sdpa_cudnn", "flash_attn_3")


@pytest.mark.parametrize("name", BACKENDS)
def test_unavailable_backends_raise_and_list_the_available_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=f"{name}: there is no CUDA device; auto, torch_attn, custom_attn are available"
    ):
        get_attn_func(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConfigError, match=f"{name}: the device's compute capability is 7.5, below [89].0; auto"):
        get_attn_func(name)


def test_flash_attention_3_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ConfigError, match=r"install (torch 2\.11 or newer|its package)"):
        get_attn_func("flash_attn_3")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: None, raising=False)
    attention._flash_attn_3_problem.cache_clear()
    assert get_attn_func("flash_attn_3") is sdpa_flash
    attention._flash_attn_3_problem.cache_clear()


def test_sdpa_backends_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's FlashAttention also runs on a CPU, which tests how the backends are called."""
    q, k, v = (tensor.bfloat16() for tensor in qkv(4, 4, width=32))
    torch.testing.assert_close(sdpa_flash(q, k, v, True), torch_attn(q, k, v, True), atol=1e-2, rtol=1e-2)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(sdpa_cudnn(q, k, v, True, mask), torch_attn(q, k, v, True, mask))
    assert torch.equal(sdpa_cudnn(q[:, :2], k, v, True), torch_attn(q[:, :2], k, v, True))
    assert torch.equal(sdpa_flash(q[:, :1], k, v, True), torch_attn(q[:, :1], k, v, True))
    with pytest.raises(ConfigError, match=r"FLASH_ATTENTION kernels support float16 and bfloat16, found torch.float32"):
        sdpa_flash(*qkv(4, 4), True)
    with pytest.raises(RuntimeError):
        sdpa_cudnn(q, k, v, True)


BROKEN_PACKAGES = {
    "another CUDA": ("raise ImportError('libcudart.so.1: no such file')", r"loaded \(ImportError: libcudart.so.1"),
    "another torch": ("raise OSError('undefined symbol: _ZN3c10')", r"loaded \(OSError: undefined symbol"),
    "no kernels": (
        """
        class Kernel:
            is_available = staticmethod(lambda: False)
        class fmha:
            ALL_BW_OPS = [Kernel]
        """,
        "kernels were built for another version of torch",
    ),
}


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process with a simulated CUDA device that has not imported xformers; the state is restored afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    attention._xformers_load_problem.cache_clear()
    yield monkeypatch
    attention._xformers_load_problem.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", sorted(BROKEN_PACKAGES))
def test_a_broken_xformers_is_not_used(kind: str, with_cuda: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, problem = BROKEN_PACKAGES[kind]
    (tmp_path / "xformers/ops").mkdir(parents=True)
    (tmp_path / "xformers/__init__.py").touch()
    (tmp_path / "xformers/ops/__init__.py").write_text(textwrap.dedent(code))
    with_cuda.syspath_prepend(tmp_path)
    assert not attention.has_xformers()
    assert get_attn_func("auto") is torch_attn
    with pytest.raises(ConfigError, match=f"--attn-name xformers_attn: the installed package.*{problem}"):
        get_attn_func("xformers_attn")


def test_a_working_xformers_is_checked_once(with_cuda: pytest.MonkeyPatch, tmp_path: Path) -> None:
    working = BROKEN_PACKAGES["no kernels"][0].replace("False", "True")
    (tmp_path / "xformers/ops").mkdir(parents=True)
    (tmp_path / "xformers/__init__.py").touch()
    (tmp_path / "xformers/ops/__init__.py").write_text(textwrap.dedent(working))
    with_cuda.syspath_prepend(tmp_path)
    assert attention.has_xformers()
    (tmp_path / "xformers/ops/__init__.py").unlink()
    del sys.modules["xformers.ops"]
    assert get_attn_func("auto") is attention.auto_attn


def test_custom_attn_lists_all_missing_settings() -> None:
    with pytest.raises(ConfigError) as caught:
        get_attn_func("custom_attn", attn_activation="gelu")
    for flag in (
        "--attn-activation: found 'gelu'",
        "--attn-seq-scalar: found None",
        "--attn-seq-scalar-alpha: expected",
    ):
        assert flag in str(caught.value)
    with pytest.raises(ConfigError, match="flash"):
        get_attn_func("flash")


def test_custom_attn_receives_its_settings() -> None:
    q, k, v = qkv(4, 4)
    attn = get_attn_func("custom_attn", "relu", "max", 1.0)
    assert isinstance(attn, partial)
    torch.testing.assert_close(attn(q, k, v, is_causal=True), reference(q, k, v, True, None, "relu", "max"))


@pytest.mark.parametrize(
    ("compiling", "key_heads", "expected"), [(False, 4, "xformers"), (False, 2, "torch"), (True, 4, "torch")]
)
def test_auto_uses_torch_where_xformers_would_cut_graphs_or_lacks_support(
    compiling: bool, key_heads: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(attention, "xformers_attn", lambda *_: "xformers")
    monkeypatch.setattr(attention, "torch_attn", lambda *_: "torch")
    queries, keys = torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, key_heads, 8)
    assert attention.auto_attn(queries, keys, keys, True) == expected


def test_decoding_excludes_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x, before = torch.zeros(1, 1, 8), torch.backends.cuda.cudnn_sdp_enabled()
    for num_cached, enabled in ((5, False), (0, before)):
        with attention.decoding_kernels(x, num_cached):
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
            assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
