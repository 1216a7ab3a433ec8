"""Attention functions, by the names of --attn-name, and the one place that chooses among them.

All share one interface: `attn(queries, keys, values, is_causal, attention_mask=None)` with queries (B,Tq,H,K), keys and
values (B,Tk,H,K) float, and attention_mask (B,Tk), nonzero where a key may be attended to. Scores are scaled by
1/sqrt(K). Queries are aligned to the END of longer keys: query i stands at key Tk - Tq + i, as in a chunk that is
appended to a cache. In place of an attention_mask there may be `Documents` (from `find_documents`), for as many keys as
queries: attention is causal then, and stays inside documents.
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

from open_lm.errors import ConfigError, join_problems
from open_lm.kernels.cpu_attention import causal_attention
from open_lm.kernels.document_attention import (
    BLOCK_TOKENS,
    Documents,
    allowed_in,
    blocks_in,
    first_tokens,
    has_flex,
    kept_apart,
    lengths_in,
    positions_in,
    softmax_in_documents,
    starts_in,
)

AttnFunc = Callable[..., Tensor]
Mask = Tensor | Documents


def find_documents(document_ids: Tensor, attn_func: AttnFunc) -> Documents:
    """The documents of document_ids (B,T), runs of equal integers, in the form that suits an attention function here.

    The one place that chooses: on a CPU where each begins; on CUDA flex attention, which alone does not wait for
    the device; xformers' kernels where `attn_func` is theirs, or may use them and flex attention cannot be; and a mask
    (B,1,T,T) where none of these can be, where T is short, and for all other attention functions.
    """
    first = first_tokens(document_ids)
    positions = positions_in(first)
    if attn_func in _SDPA and not first.is_cuda:
        return Documents(positions, starts=starts_in(first))
    if attn_func in _SDPA and first.shape[1] <= BLOCK_TOKENS:
        return Documents(positions, allowed=allowed_in(first))
    if attn_func in _SDPA and has_flex(first.device):
        return Documents(positions, blocks=blocks_in(first))
    if attn_func in (xformers_attn, auto_attn):
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        bias = BlockDiagonalCausalMask.from_seqlens(list(lengths_in(first)), device=first.device)
        return Documents(positions, bias=bias, attend=kept_apart(_xformers_in_documents))
    return Documents(positions, allowed=allowed_in(first))


def allowed_keys(queries: Tensor, keys: Tensor, is_causal: bool, attention_mask: Mask | None = None) -> Tensor | None:
    """Which keys each query may attend to: bool, broadcasting to (B,H,Tq,Tk); None where every query may see all keys.

    A query that is left with no key (padding on the left) may see its own, so that no row of the softmax is empty.

    Raises:
        ValueError: more queries than keys, or an attention_mask that is not (B,Tk).
    """
    if isinstance(attention_mask, Documents):
        return attention_mask.allowed
    q_len, k_len = queries.shape[1], keys.shape[1]
    if q_len > k_len:
        raise ValueError(f"{q_len} queries for {k_len} keys: queries are the last of the keys' positions")
    if attention_mask is not None and attention_mask.shape != (keys.shape[0], k_len):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(keys.shape[0], k_len)}: one column "
            "for every key, cached ones included"
        )
    allowed = None
    if is_causal and q_len > 1:
        square = torch.ones(q_len, k_len, dtype=torch.bool, device=queries.device)
        allowed = square.tril(diagonal=k_len - q_len)
    if attention_mask is not None:
        visible = attention_mask.to(torch.bool)[:, None, None, :]
        allowed = visible if allowed is None else allowed & visible
        own = torch.ones(q_len, k_len, dtype=torch.bool, device=queries.device).tril(k_len - q_len).triu(k_len - q_len)
        allowed = allowed | (own & ~allowed.any(-1, keepdim=True))
    return allowed


def torch_attn(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """Softmax attention through torch's scaled_dot_product_attention, inside documents through flex attention as well,
    and of whole rows on a CPU through `cpu_attention` -> (B,Tq,H,K)."""
    if isinstance(attention_mask, Documents):
        return softmax_in_documents(queries, keys, values, attention_mask)
    whole = is_causal and attention_mask is None and 1 < queries.shape[1] == keys.shape[1]
    if whole and queries.device.type == "cpu" and queries.shape == keys.shape == values.shape:
        return causal_attention(queries, keys, values)
    mask = None if whole else allowed_keys(queries, keys, is_causal, attention_mask)
    return _scaled_dot_product(queries, keys, values, mask, is_causal=whole)


def _scaled_dot_product(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    return out.transpose(1, 2).contiguous()


def xformers_attn(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """Softmax attention through xformers' memory-efficient kernels, on CUDA tensors only -> (B,Tq,H,K)."""
    from xformers import ops

    if isinstance(attention_mask, Documents):
        assert attention_mask.attend is not None
        return attention_mask.attend(queries, keys, values, attention_mask)
    mask = None
    if attention_mask is None and is_causal and queries.shape[1] > 1:
        mask = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask()
    elif attention_mask is not None:
        mask = _xformers_bias(queries, keys, allowed_keys(queries, keys, is_causal, attention_mask))
    out: Tensor = ops.memory_efficient_attention(queries, keys, values, attn_bias=mask)
    return out.contiguous()


def _xformers_in_documents(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents) -> Tensor:
    """As xformers_attn; the kernels take the whole batch as one row (1,B*T,H,K)."""
    from xformers import ops

    q, k, v = (x.flatten(0, 1)[None] for x in (queries, keys, values))
    out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=documents.bias)
    return out.reshape(queries.shape)


def _xformers_bias(queries: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor:
    """Additive bias (B,H,Tq,Tk); the kernels want its rows to start at multiples of 8 elements."""
    batch, q_len, heads, _ = queries.shape
    k_len = keys.shape[1]
    bias = queries.new_zeros(batch, heads, q_len, -(-k_len // 8) * 8)[..., :k_len]
    return bias if allowed is None else bias.masked_fill_(~allowed, float("-inf"))


def auto_attn(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """xformers_attn for tensors on CUDA, torch_attn elsewhere and for documents in a form of its -> (B,Tq,H,K)."""
    for_torch = isinstance(attention_mask, Documents) and attention_mask.bias is None
    attn = xformers_attn if queries.is_cuda and not for_torch else torch_attn
    return attn(queries, keys, values, is_causal, attention_mask)


def sdpa_flash(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """torch_attn by its FlashAttention kernels alone, wherever no mask is needed; in half precision -> (B,Tq,H,K)."""
    return _by_backend("FLASH_ATTENTION", queries, keys, values, is_causal, attention_mask)


def sdpa_cudnn(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None = None
) -> Tensor:
    """torch_attn by cuDNN's kernels alone, wherever no mask is needed; in half precision -> (B,Tq,H,K)."""
    return _by_backend("CUDNN_ATTENTION", queries, keys, values, is_causal, attention_mask)


def _by_backend(  # noqa: PLR0917 (in the order of the interface)
    name: str, queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, attention_mask: Mask | None
) -> Tensor:
    """torch_attn through a member of SDPBackend; these kernels know no masks, which are left to torch's choice."""
    if attention_mask is not None or (is_causal and 1 < queries.shape[1] != keys.shape[1]):
        return torch_attn(queries, keys, values, is_causal, attention_mask)
    if queries.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"--attn-name: the kernels of {name} take float16 and bfloat16, found {queries.dtype}; choose another "
            "--precision, or --attn-name auto"
        )
    with sdpa_kernel(getattr(SDPBackend, name)):
        return _scaled_dot_product(queries, keys, values, None, is_causal and queries.shape[1] > 1)


# Attention functions for which documents may be in any form that torch's own attention takes.
_SDPA: tuple[AttnFunc, ...] = (torch_attn, auto_attn, sdpa_flash, sdpa_cudnn)


def _relu_squared(scores: Tensor) -> Tensor:
    return F.relu(scores).square()


def _identity(scores: Tensor) -> Tensor:
    return scores


ATTN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "softplus": F.softplus,
    "identity": _identity,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=-1),
}


def _longest(length: Any) -> Any:
    return length


def _mean_length(length: Any) -> Any:
    return (length + 1) / 2


def _no_length(length: Any) -> Any:
    return 1


# From the number of keys (a number, or one for each row) to the length that weights are divided by. "avg" is the mean
# number of keys that the queries of a causal sequence see.
ATTN_SEQ_SCALARS: dict[str, Callable[[Any], Any]] = {"max": _longest, "avg": _mean_length, "none": _no_length}


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
    """Attention whose weights are activation(scores) / length^alpha (Wortsman et al. 2023, https://arxiv.org/abs/2309.08586).

    Args:
        queries, keys, values, is_causal, attention_mask: as in the module's interface.
        attn_activation: name in ATTN_ACTIVATIONS. Keys that may not be seen get weight 0 whatever the activation.
        attn_seq_scalar: name in ATTN_SEQ_SCALARS; with an attention_mask each row's length is its number of nonzero
            columns, so that padding changes nothing. With documents it stays the row's number of keys: a document's own
            would tell its first tokens where it ends.
        alpha: exponent of the length.

    Returns:
        (B,Tq,H,K) in the queries' type.
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
    """length^-alpha: a number, or (B,1,1,1) in the keys' type where rows are padded."""
    scalar = ATTN_SEQ_SCALARS[attn_seq_scalar]
    if not isinstance(attention_mask, Tensor) or attn_seq_scalar == "none":
        return float(scalar(keys.shape[1])) ** -alpha
    lengths = (attention_mask != 0).sum(-1).clamp(min=1).float()
    return (scalar(lengths) ** -alpha).to(keys.dtype)[:, None, None, None]


def has_xformers() -> bool:
    """Whether xformers can be used here: CUDA is there, the package is installed and its kernels can be loaded."""
    return xformers_problem() is None


def xformers_problem() -> str | None:
    """Why xformers cannot be used here, or None where it can."""
    return _xformers_load_problem() if torch.cuda.is_available() else "there is no CUDA device"


@functools.cache
def _xformers_load_problem() -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "the package is not installed"
    try:
        from xformers import ops

        # The general backward kernels are in the compiled library; those of single devices may come without it.
        loaded = ops.fmha.ALL_BW_OPS[0].is_available()
    except Exception as error:  # a library built for another torch or CUDA fails in many ways
        return f"the installed package cannot be loaded ({type(error).__name__}: {error})"
    return None if loaded else "the installed package's kernels do not fit this torch"


def get_attn_func(
    attn_name: str = "auto",
    attn_activation: str | None = None,
    attn_seq_scalar: str | None = None,
    alpha: float | None = None,
) -> AttnFunc:
    """The attention function of --attn-name: the one place where xformers is chosen.

    Args:
        attn_name: auto (xformers on CUDA where it can be loaded, else torch_attn), torch_attn, xformers_attn,
            xformers_attn_variable_length (the same: every length works), custom_attn, or torch's attention by one of
            its kernels on CUDA: sdpa_flash, sdpa_cudnn, flash_attn_3.
        attn_activation, attn_seq_scalar, alpha: --attn-activation, --attn-seq-scalar, --attn-seq-scalar-alpha; all
            three are needed by custom_attn, and by no other.

    Raises:
        ConfigError: an unknown name, kernels that cannot run here, or missing settings of custom_attn.
    """
    if attn_name == "auto":
        return auto_attn if has_xformers() else torch_attn
    if attn_name == "torch_attn":
        return torch_attn
    if attn_name in ("xformers_attn", "xformers_attn_variable_length"):
        if not has_xformers():
            raise ConfigError(f"--attn-name {attn_name}: {xformers_problem()}; use --attn-name auto or torch_attn")
        return xformers_attn
    if attn_name == "custom_attn":
        return _bound_custom_attn(attn_activation, attn_seq_scalar, alpha)
    if attn_name in _BACKENDS:
        problem = backend_problem(attn_name)
        if problem is not None:
            raise ConfigError(f"--attn-name {attn_name}: {problem}; {', '.join(_names_that_work())} work here")
        return _BACKENDS[attn_name]
    names = ("auto", "torch_attn", "xformers_attn", "xformers_attn_variable_length", "custom_attn", *_BACKENDS)
    raise ConfigError(f"--attn-name {attn_name}: expected one of {', '.join(names)}")


# FlashAttention 3, once it is registered with torch, takes the place of torch's own FlashAttention.
_BACKENDS: dict[str, AttnFunc] = {"sdpa_flash": sdpa_flash, "sdpa_cudnn": sdpa_cudnn, "flash_attn_3": sdpa_flash}


def backend_problem(attn_name: str) -> str | None:
    """Why sdpa_flash, sdpa_cudnn or flash_attn_3 cannot be used here, or None where it can.

    flash_attn_3 is registered with torch by this question, for the whole process.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    least = (9, 0) if attn_name == "flash_attn_3" else (8, 0)
    if capability < least:
        return f"the device's compute capability is {capability[0]}.{capability[1]}, below {least[0]}.{least[1]}"
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


def _names_that_work() -> list[str]:
    names = ["auto", "torch_attn", *(["xformers_attn"] if has_xformers() else []), "custom_attn"]
    return names + [name for name in ("sdpa_flash", "sdpa_cudnn") if backend_problem(name) is None]


def _bound_custom_attn(activation: str | None, seq_scalar: str | None, alpha: float | None) -> AttnFunc:
    problems = []
    if activation not in ATTN_ACTIVATIONS:
        problems.append(f"--attn-activation {activation}: expected one of {', '.join(ATTN_ACTIVATIONS)}")
    if seq_scalar not in ATTN_SEQ_SCALARS:
        problems.append(f"--attn-seq-scalar {seq_scalar}: expected one of {', '.join(ATTN_SEQ_SCALARS)}")
    if alpha is None:
        problems.append("--attn-seq-scalar-alpha: expected a number")
    if problems:
        raise ConfigError(join_problems(problems, "--attn-name custom_attn needs its settings"))
    assert activation is not None and seq_scalar is not None and alpha is not None
    return partial(custom_attn, attn_activation=activation, attn_seq_scalar=seq_scalar, alpha=alpha)
