"""Attention functions, selected by --attn-name.

All functions share one interface: `attn(queries, keys, values, is_causal, attention_mask=None)` with queries
(B,Tq,H,K), keys and values (B,Tk,H,K) float, and attention_mask (B,Tk), nonzero where a key may be attended to. Scores
are scaled by 1/sqrt(K). Queries are aligned to the END of longer keys: query i has the position of key Tk - Tq + i, as
in a chunk that is appended to a KV cache. In place of an attention_mask the functions accept a `DocumentMask` (see
`create_document_mask`) if there are as many keys as queries: attention is then causal within each document.
Legend: B batch, T sequence (Tq of queries, Tk of keys), H heads, K head width.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_lm.config.registry import ATTENTION, ATTENTION_ACTIVATIONS, ATTENTION_LENGTHS
from open_lm.errors import ConfigError, join_problems
from open_lm.kernels.cpu_attention import causal_attention
from open_lm.kernels.document_attention import (
    BLOCK_TOKENS,
    DocumentMask,
    dense_document_mask,
    disable_compilation,
    document_attention,
    document_lengths,
    document_positions,
    document_starts,
    flex_block_mask,
    is_document_start,
    supports_flex_attention,
)

AttnFunc = Callable[..., Tensor]
Mask = Tensor | DocumentMask


def create_document_mask(document_ids: Tensor, attn_func: AttnFunc) -> DocumentMask:
    """Return the block-diagonal causal mask of document_ids (B,T), runs of equal integers, for an attention function.

    The representation depends on the device and the function: document starts for the CPU kernels; flex attention's
    block mask on CUDA, the only one that does not wait for the device; xformers' bias if `attn_func` uses xformers and
    flex attention is not available; otherwise, and for short sequences on CUDA, a dense mask (B,1,T,T).
    """
    is_start = is_document_start(document_ids)
    positions = document_positions(is_start)
    if attn_func in _SDPA and not is_start.is_cuda:
        return DocumentMask(positions, starts=document_starts(is_start))
    if attn_func in _SDPA and is_start.shape[1] <= BLOCK_TOKENS:
        return DocumentMask(positions, dense=dense_document_mask(is_start))
    if attn_func in _SDPA and supports_flex_attention(is_start.device):
        return DocumentMask(positions, block_mask=flex_block_mask(is_start))
    if attn_func in (xformers_attn, auto_attn):
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        bias = BlockDiagonalCausalMask.from_seqlens(list(document_lengths(is_start)), device=is_start.device)
        attn = disable_compilation(_xformers_document_attention)
        return DocumentMask(positions, xformers_bias=bias, attn_func=attn)
    return DocumentMask(positions, dense=dense_document_mask(is_start))


def allowed_keys(queries: Tensor, keys: Tensor, is_causal: bool, attention_mask: Mask | None = None) -> Tensor | None:
    """Return which keys each query may attend to: bool, broadcasting to (B,H,Tq,Tk); None if nothing is masked.

    A query whose keys are all masked (left padding) may attend to its own key, so that no softmax row is empty.

    Raises:
        ValueError: more queries than keys, or an attention_mask that is not (B,Tk).
    """
    if isinstance(attention_mask, DocumentMask):
        return attention_mask.dense
    q_len, k_len = queries.shape[1], keys.shape[1]
    if q_len > k_len:
        raise ValueError(f"{q_len} queries for {k_len} keys: expected at most as many queries as keys")
    if attention_mask is not None and attention_mask.shape != (keys.shape[0], k_len):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(keys.shape[0], k_len)}: one column "
            "for every key, including cached keys"
        )
    allowed = None
    if is_causal and q_len > 1:
        all_pairs = torch.ones(q_len, k_len, dtype=torch.bool, device=queries.device)
        allowed = all_pairs.tril(diagonal=k_len - q_len)
    if attention_mask is not None:
        not_padding = attention_mask.to(torch.bool)[:, None, None, :]
        allowed = not_padding if allowed is None else allowed & not_padding
        diagonal = torch.ones(q_len, k_len, dtype=torch.bool, device=queries.device)
        diagonal = diagonal.tril(k_len - q_len).triu(k_len - q_len)
        allowed = allowed | (diagonal & ~allowed.any(-1, keepdim=True))
    return allowed


@ATTENTION.register("torch_attn", help="torch's scaled_dot_product_attention")
def torch_attn(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """Compute softmax attention with torch's kernels, or with `cpu_attention` for full sequences on a CPU.

    Document masks are passed to `document_attention`. -> (B,Tq,H,K).
    """
    if isinstance(attention_mask, DocumentMask):
        return document_attention(queries, keys, values, attention_mask)
    plain_causal = is_causal and attention_mask is None and 1 < queries.shape[1] == keys.shape[1]
    if plain_causal and queries.device.type == "cpu" and queries.shape == keys.shape == values.shape:
        return causal_attention(queries, keys, values)
    mask = None if plain_causal else allowed_keys(queries, keys, is_causal, attention_mask)
    return _scaled_dot_product(queries, keys, values, mask, is_causal=plain_causal)


def _scaled_dot_product(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    return out.transpose(1, 2).contiguous()


@ATTENTION.register("xformers_attn", help="xformers' kernels, on CUDA", deterministic=False)
@ATTENTION.register("xformers_attn_variable_length", help="xformers' kernels, on CUDA", deterministic=False)
def xformers_attn(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """Compute softmax attention with xformers' memory-efficient kernels; CUDA tensors only -> (B,Tq,H,K)."""
    from xformers import ops

    if isinstance(attention_mask, DocumentMask):
        assert attention_mask.attn_func is not None
        return attention_mask.attn_func(queries, keys, values, attention_mask)
    mask = None
    if attention_mask is None and is_causal and queries.shape[1] > 1:
        mask = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask()
    elif attention_mask is not None:
        mask = _xformers_bias(queries, keys, allowed_keys(queries, keys, is_causal, attention_mask))
    out: Tensor = ops.memory_efficient_attention(queries, keys, values, attn_bias=mask)
    return out.contiguous()


def _xformers_document_attention(queries: Tensor, keys: Tensor, values: Tensor, documents: DocumentMask) -> Tensor:
    """Compute `xformers_attn` within documents; the kernels expect the batch as one sequence (1,B*T,H,K)."""
    from xformers import ops

    q, k, v = (x.flatten(0, 1)[None] for x in (queries, keys, values))
    out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=documents.xformers_bias)
    return out.reshape(queries.shape)


def _xformers_bias(queries: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor:
    """Return an additive bias (B,H,Tq,Tk) whose rows start at multiples of 8 elements, as the kernels require."""
    batch, q_len, heads, _ = queries.shape
    k_len = keys.shape[1]
    bias = queries.new_zeros(batch, heads, q_len, -(-k_len // 8) * 8)[..., :k_len]
    return bias if allowed is None else bias.masked_fill_(~allowed, float("-inf"))


@ATTENTION.register("auto", help="the fastest implementation that is available on the device")
def auto_attn(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """Compute attention with xformers_attn on CUDA, and with torch_attn elsewhere and for torch's document masks.

    -> (B,Tq,H,K).
    """
    is_torch_mask = isinstance(attention_mask, DocumentMask) and attention_mask.xformers_bias is None
    attn = xformers_attn if queries.is_cuda and not is_torch_mask else torch_attn
    return attn(queries, keys, values, is_causal, attention_mask)


# FlashAttention 3 replaces torch's FlashAttention once it is registered with torch, so both names use one function.
@ATTENTION.register("sdpa_flash", help="torch's FlashAttention kernels, on CUDA")
@ATTENTION.register("flash_attn_3", help="FlashAttention 3, on CUDA")
def sdpa_flash(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """Compute torch_attn with FlashAttention kernels unless a mask is needed; half precision only -> (B,Tq,H,K)."""
    return _sdpa_with_backend("FLASH_ATTENTION", queries, keys, values, is_causal, attention_mask)


@ATTENTION.register("sdpa_cudnn", help="cuDNN's kernels, on CUDA", deterministic=False)
def sdpa_cudnn(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """Compute torch_attn with cuDNN kernels unless a mask is needed; half precision only -> (B,Tq,H,K)."""
    return _sdpa_with_backend("CUDNN_ATTENTION", queries, keys, values, is_causal, attention_mask)


def _sdpa_with_backend(  # noqa: PLR0917 (the order of the interface)
    name: str, queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None
) -> Tensor:
    """Compute torch_attn with a member of SDPBackend, or with torch's choice of kernel if a mask is needed."""
    if attention_mask is not None or (is_causal and 1 < queries.shape[1] != keys.shape[1]):
        return torch_attn(queries, keys, values, is_causal, attention_mask)
    if queries.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"--attn-name: the {name} kernels support float16 and bfloat16, found {queries.dtype}; use another "
            "--precision or --attn-name auto"
        )
    with sdpa_kernel(getattr(SDPBackend, name)):
        return _scaled_dot_product(queries, keys, values, None, is_causal and queries.shape[1] > 1)


# Attention functions that accept every DocumentMask that `document_attention` accepts.
_SDPA: tuple[AttnFunc, ...] = (torch_attn, auto_attn, sdpa_flash, sdpa_cudnn)


@ATTENTION_ACTIVATIONS.register("relu_squared")
def _relu_squared(scores: Tensor) -> Tensor:
    return F.relu(scores).square()


@ATTENTION_ACTIVATIONS.register("identity")
def _identity(scores: Tensor) -> Tensor:
    return scores


ATTENTION_ACTIVATIONS.register("relu")(F.relu)
ATTENTION_ACTIVATIONS.register("softplus")(F.softplus)
ATTENTION_ACTIVATIONS.register("relu6")(F.relu6)
ATTENTION_ACTIVATIONS.register("sigmoid")(torch.sigmoid)
ATTENTION_ACTIVATIONS.register("softmax")(partial(torch.softmax, dim=-1))
ATTN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = ATTENTION_ACTIVATIONS.objects


# Map the number of keys (one number, or one per sequence) to the length by which weights are divided. "avg" is the mean
# number of keys visible to the queries of a causal sequence.
ATTENTION_LENGTHS.register("max", help="the number of keys")(lambda length: length)
ATTENTION_LENGTHS.register("avg", help="the mean number of keys that a query sees")(lambda length: (length + 1) / 2)
ATTENTION_LENGTHS.register("none", help="1")(lambda length: 1)
ATTN_SEQ_SCALARS: dict[str, Callable[[Any], Any]] = ATTENTION_LENGTHS.objects


@ATTENTION.register(
    "custom_attn",
    help="the activation of --attn-activation in place of softmax",
    requires=("attn_activation", "attn_seq_scalar", "attn_seq_scalar_alpha"),
    whole_sequences=True,
)
def custom_attn(  # noqa: PLR0917 (callers pass these by position)
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_activation: str,
    attn_seq_scalar: str,
    alpha: float,
    is_causal: bool = False,
    attention_mask: Mask | None = None,
) -> Tensor:
    """Compute attention with the weights activation(scores) / length^alpha.

    See Wortsman et al. 2023, https://arxiv.org/abs/2309.08586.

    Args:
        queries: (B,Tq,H,K) float.
        keys: (B,Tk,H,K) float.
        values: (B,Tk,H,K) float.
        attn_activation: name in ATTN_ACTIVATIONS. Masked keys get weight 0 with every activation.
        attn_seq_scalar: name in ATTN_SEQ_SCALARS. With an attention_mask the length of a sequence is its number of
            nonzero columns, so that padding has no effect. With a DocumentMask it is the number of keys of the
            sequence, because the document's length would reveal to its first tokens where it ends.
        alpha: exponent of the length.
        is_causal: whether each query attends only to keys up to its own position.
        attention_mask: (B,Tk), nonzero where a key may be attended to, or a `DocumentMask`.

    Returns:
        (B,Tq,H,K) in the dtype of the queries.
    """
    scores = torch.einsum("bqhd,bkhd->bhqk", queries * queries.shape[-1] ** -0.5, keys)
    allowed = allowed_keys(queries, keys, is_causal, attention_mask)
    if attn_activation == "softmax" and allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = ATTN_ACTIVATIONS[attn_activation](scores)
    if attn_activation != "softmax" and allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights * _length_scale(keys, attn_seq_scalar, alpha, attention_mask), values)
    return out.to(queries.dtype)


def _length_scale(keys: Tensor, attn_seq_scalar: str, alpha: float, attention_mask: Mask | None) -> float | Tensor:
    """Return length^-alpha: a number, or (B,1,1,1) in the dtype of the keys if sequences are padded."""
    scalar = ATTN_SEQ_SCALARS[attn_seq_scalar]
    if not isinstance(attention_mask, Tensor) or attn_seq_scalar == "none":
        return float(scalar(keys.shape[1])) ** -alpha
    lengths = (attention_mask != 0).sum(-1).clamp(min=1).float()
    return (scalar(lengths) ** -alpha).to(keys.dtype)[:, None, None, None]


def has_xformers() -> bool:
    """Return whether xformers is usable: there is a CUDA device, and the package and its kernels can be loaded."""
    return xformers_problem() is None


def xformers_problem() -> str | None:
    """Return why xformers is not usable on this machine, or None if it is."""
    return _xformers_load_problem() if torch.cuda.is_available() else "there is no CUDA device"


@functools.cache
def _xformers_load_problem() -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "the package is not installed"
    try:
        from xformers import ops

        # Check a generic backward kernel: it needs the compiled library, which device-specific kernels may not.
        loaded = ops.fmha.ALL_BW_OPS[0].is_available()
    except Exception as error:  # a library built for another torch or CUDA fails in many ways
        return f"the installed package cannot be loaded ({type(error).__name__}: {error})"
    return None if loaded else "the installed package's kernels were built for another version of torch"


def get_attn_func(
    attn_name: str = "auto",
    attn_activation: str | None = None,
    attn_seq_scalar: str | None = None,
    alpha: float | None = None,
) -> AttnFunc:
    """Return the attention function that --attn-name selects.

    Args:
        attn_name: an entry of ATTENTION. "auto" is xformers on CUDA if it can be loaded, else torch_attn.
        attn_activation: --attn-activation; custom_attn requires this and the following settings, no other function
            uses them.
        attn_seq_scalar: --attn-seq-scalar.
        alpha: --attn-seq-scalar-alpha.

    Raises:
        ConfigError: an unknown name, kernels that are not available on this machine, or missing custom_attn settings.
    """
    attn_func: AttnFunc = ATTENTION.get(attn_name)
    if attn_func is auto_attn and not has_xformers():
        return torch_attn
    if attn_func is xformers_attn and not has_xformers():
        raise ConfigError(f"--attn-name {attn_name}: {xformers_problem()}; use --attn-name auto or torch_attn")
    if attn_func is custom_attn:
        return _bound_custom_attn(attn_activation, attn_seq_scalar, alpha)
    if attn_func in (sdpa_flash, sdpa_cudnn):
        problem = backend_problem(attn_name)
        if problem is not None:
            raise ConfigError(f"--attn-name {attn_name}: {problem}; {', '.join(_available_names())} are available")
    return attn_func


def backend_problem(attn_name: str) -> str | None:
    """Return why sdpa_flash, sdpa_cudnn or flash_attn_3 is not usable on this machine, or None if it is.

    As a side effect flash_attn_3 is registered with torch for the whole process.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    minimum = (9, 0) if attn_name == "flash_attn_3" else (8, 0)
    if capability < minimum:
        return f"the device's compute capability is {capability[0]}.{capability[1]}, below {minimum[0]}.{minimum[1]}"
    if attn_name == "flash_attn_3":
        return _flash_attn_3_problem()
    if attn_name == "sdpa_cudnn":
        return None if torch.backends.cudnn.is_available() else "this torch was built without cuDNN"
    return None if torch.backends.cuda.is_flash_attention_available() else "this torch was built without FlashAttention"


@functools.cache
def _flash_attn_3_problem() -> str | None:
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        return f"torch {torch.__version__} cannot register it; install torch 2.11 or newer"
    try:
        activate("FA3")
    except Exception as error:  # a library built for another torch or CUDA fails in many ways
        return (
            f"FlashAttention 3 cannot be loaded ({type(error).__name__}: {error}); install its package, which gives "
            "the module flash_attn_interface (https://github.com/Dao-AILab/flash-attention, folder hopper)"
        )
    return None


def _available_names() -> list[str]:
    names = ["auto", "torch_attn", *(["xformers_attn"] if has_xformers() else []), "custom_attn"]
    return names + [name for name in ("sdpa_flash", "sdpa_cudnn") if backend_problem(name) is None]


def _bound_custom_attn(activation: str | None, seq_scalar: str | None, alpha: float | None) -> AttnFunc:
    problems = []
    for registry, name in ((ATTENTION_ACTIVATIONS, activation), (ATTENTION_LENGTHS, seq_scalar)):
        try:
            registry.get(name)
        except ConfigError as error:
            problems.append(str(error))
    if alpha is None:
        problems.append("--attn-seq-scalar-alpha: expected a number")
    if problems:
        raise ConfigError(join_problems(problems, "--attn-name custom_attn requires these settings"))
    assert activation is not None and seq_scalar is not None and alpha is not None
    return partial(custom_attn, attn_activation=activation, attn_seq_scalar=seq_scalar, alpha=alpha)
