"""Attention functions, selected by --attn-name.

All functions share one interface: `attn(queries, keys, values, is_causal, attention_mask=None)` with queries
(B,Tq,H,K), keys and values (B,Tk,H,K) float, and attention_mask (B,Tk), nonzero where a key may be attended to. Scores
are scaled by 1/sqrt(K). Queries are aligned to the END of longer keys: query i has the position of key Tk - Tq + i, as
in a chunk that is appended to a KV cache. In place of an attention_mask the functions accept a `DocumentMask` (see
`create_document_mask`) if there are as many keys as queries: attention is then causal within each document. `attend`
adds the options of a layer and grouped heads.
Legend: B batch, T sequence (Tq of queries, Tk of keys), H heads, G key heads, K head width.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_lm.config.registry import ATTENTION
from open_lm.errors import ConfigError
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
    token_document_lengths,
)
from open_lm.kernels.general_attention import PLAIN, AttentionOptions, general_attention, repeat_heads
from open_lm.model.attention_masks import Mask, allowed_keys
from open_lm.model.custom_attention import ATTN_ACTIVATIONS, ATTN_SEQ_SCALARS, bound_custom_attn, custom_attn

__all__ = [
    "ATTN_ACTIVATIONS",
    "ATTN_SEQ_SCALARS",
    "AttentionOptions",
    "AttnFunc",
    "Mask",
    "allowed_keys",
    "attend",
    "create_document_mask",
    "custom_attn",
    "get_attn_func",
    "prepare_mask",
    "torch_attn",
    "xformers_attn",
]

AttnFunc = Callable[..., Tensor]


def attend(  # noqa: PLR0917 (as the attention functions)
    attn_func: AttnFunc, queries: Tensor, keys: Tensor, values: Tensor, mask: Mask | None, options: AttentionOptions
) -> Tensor:
    """Compute the causal attention of a layer.

    Args:
        attn_func: an attention function of this module. Options other than the default need torch's kernels, which
            then replace it.
        queries: (B,Tq,H,K) float.
        keys: (B,Tk,G,K) float, cached keys included.
        values: (B,Tk,G,K) float.
        mask: the result of `prepare_mask`.
        options: the layer's options.

    Returns:
        (B,Tq,H,K).
    """
    if options.is_plain:
        if attn_func not in _SDPA:
            keys, values = (repeat_heads(x, queries.shape[2]) for x in (keys, values))
        return attn_func(queries, keys, values, is_causal=True, attention_mask=mask)
    if isinstance(mask, DocumentMask):
        return document_attention(queries, keys, values, mask, options)
    is_square = 1 < queries.shape[1] == keys.shape[1]
    is_full = mask is None and is_square and not options.is_limiting(keys.shape[1])
    if is_full and queries.device.type == "cpu" and options.soft_cap is None and not options.dropout:
        return causal_attention(queries, keys, values, scale=options.scale)
    allowed = None if is_full else allowed_keys(queries, keys, True, mask, options.window)
    return general_attention(queries, keys, values, allowed, is_full, options)


def check_attention_options(attn_name: str, options: AttentionOptions) -> None:
    """Raise ConfigError if an attention function by that name does not support the options."""
    changed = {
        "attn_scale": options.scale is not None,
        "attn_soft_cap": options.soft_cap is not None,
        "attn_window": options.window is not None,
        "attn_dropout": options.dropout > 0,
    }
    if any(changed.values()) and not ATTENTION.fact(attn_name, "options", True):
        names = ", ".join(name for name, is_set in changed.items() if is_set)
        raise ConfigError(f"--attn-name {attn_name} does not support {names}; use --attn-name auto")


def prepare_mask(
    mask: Mask | None, options: AttentionOptions, attn_func: AttnFunc, x: Tensor, has_cache: bool
) -> Mask | None:
    """Return the mask for layers with these options, to be computed once for all of them.

    mask: that of the model's forward pass, for layers without a window. x (B,T,…) has the sequences without cached
    positions. Flex attention needs a mask for a window or a soft cap even if nothing else is masked.
    """
    if isinstance(mask, DocumentMask):
        return mask.for_options(options) if mask.for_options is not None and not options.is_plain else mask
    needs_flex = options.soft_cap is not None or options.is_limiting(x.shape[1])
    if mask is None and needs_flex and x.is_cuda and not has_cache:
        one_document = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        return create_document_mask(one_document, attn_func, options)
    return mask


def create_document_mask(document_ids: Tensor, attn_func: AttnFunc, options: AttentionOptions = PLAIN) -> DocumentMask:
    """Return the block-diagonal causal mask of document_ids (B,T), runs of equal integers, for an attention function.

    The representation depends on the device and the function: document starts for the CPU kernels; flex attention's
    block mask on CUDA, the only one that does not wait for the device; xformers' bias if `attn_func` uses xformers and
    flex attention is not available; otherwise, and for short sequences on CUDA, a dense mask (B,1,T,T). Layers with
    options other than the default use torch's kernels, and with a limiting window, soft cap or dropout no CPU kernel.
    """
    is_start = is_document_start(document_ids)
    positions = document_positions(is_start)
    mask = partial(
        DocumentMask,
        positions,
        for_options=lambda other: create_document_mask(document_ids, attn_func, other),
        lengths=partial(token_document_lengths, is_start),
    )
    length, window = is_start.shape[1], options.window
    if not options.is_plain:
        attn_func = torch_attn
    has_kernel = not options.is_limiting(length) and options.soft_cap is None and not options.dropout
    if attn_func in _SDPA and not is_start.is_cuda and has_kernel:
        return mask(starts=document_starts(is_start))
    if attn_func in _SDPA and (length <= BLOCK_TOKENS or options.dropout or not is_start.is_cuda):
        return mask(dense=dense_document_mask(is_start, window))
    if attn_func in _SDPA and supports_flex_attention(is_start.device):
        return mask(block_mask=flex_block_mask(is_start, window))
    if attn_func in (xformers_attn, auto_attn) and options.is_plain:
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        bias = BlockDiagonalCausalMask.from_seqlens(list(document_lengths(is_start)), device=is_start.device)
        return mask(xformers_bias=bias, attn_func=disable_compilation(_xformers_document_attention))
    return mask(dense=dense_document_mask(is_start, window))


@ATTENTION.register("torch_attn", help="torch's scaled_dot_product_attention")
def torch_attn(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """Compute softmax attention with torch's kernels, or with `cpu_attention` for full sequences on a CPU.

    Keys may have fewer heads than queries. Document masks are passed to `document_attention`. -> (B,Tq,H,K).
    """
    if isinstance(attention_mask, DocumentMask):
        return document_attention(queries, keys, values, attention_mask)
    plain_causal = is_causal and attention_mask is None and 1 < queries.shape[1] == keys.shape[1]
    if plain_causal and queries.device.type == "cpu":
        return causal_attention(queries, keys, values)
    mask = None if plain_causal else allowed_keys(queries, keys, is_causal, attention_mask)
    return general_attention(queries, keys, values, mask, is_causal=plain_causal)


@ATTENTION.register("xformers_attn", help="xformers' kernels, on CUDA", deterministic=False, options=False)
@ATTENTION.register(
    "xformers_attn_variable_length", help="xformers' kernels, on CUDA", deterministic=False, options=False
)
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
    """Compute attention with xformers_attn on CUDA, and with torch_attn elsewhere -> (B,Tq,H,K).

    torch_attn also computes what xformers does not support or would slow down: torch's document masks, keys with fewer
    heads, and compiled blocks, whose graphs xformers' kernels would split.
    """
    is_torch_mask = isinstance(attention_mask, DocumentMask) and attention_mask.xformers_bias is None
    is_supported = queries.is_cuda and keys.shape[2] == queries.shape[2] and not is_torch_mask
    attn = xformers_attn if is_supported and not torch.compiler.is_compiling() else torch_attn
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
        return general_attention(queries, keys, values, None, is_causal and queries.shape[1] > 1)


def decoding_kernels(x: Tensor, num_cached: int) -> AbstractContextManager[object]:
    """Return a context for a forward pass of x (B,T,D) after `num_cached` keys, where queries are fewer than keys.

    On CUDA it excludes cuDNN's kernels, which torch prefers on some devices: cuDNN makes a new plan for each number of
    keys.
    """
    if not x.is_cuda or not num_cached:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


# Attention functions that accept every DocumentMask that `document_attention` accepts.
_SDPA: tuple[AttnFunc, ...] = (torch_attn, auto_attn, sdpa_flash, sdpa_cudnn)


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
        attn_name: an entry of ATTENTION. "auto" is xformers on CUDA if it can be loaded, else torch_attn; compiled
            blocks use torch_attn.
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
        return bound_custom_attn(attn_activation, attn_seq_scalar, alpha)
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
