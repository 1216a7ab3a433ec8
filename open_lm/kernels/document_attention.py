"""Attention with a block-diagonal causal mask, for sequences that pack several documents.

A document is a run of equal integers in a row of document ids. Each token attends to the earlier tokens of its own
document and to itself. All layers share one `DocumentMask`, computed once per forward pass in the representation that
the attention kernel needs.
Legend: B batch, T sequence, H heads, K head width, N blocks of BLOCK_TOKENS tokens in T.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels.cpu_attention import causal_attention
from open_lm.kernels.general_attention import PLAIN, AttentionOptions, general_attention, repeat_heads
from open_lm.kernels.kept_calls import keep_result
from open_lm.kernels.row_softmax import triton_problem

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # its import takes seconds in older versions of torch

BLOCK_TOKENS = 128  # flex attention skips fully masked tiles of this many queries and keys
_MIN_FLEX_HEAD_WIDTH = 16  # the kernels multiply tiles of at least 16


@dataclass(eq=False)  # with frozen=True torch.compile would guard on every length
class DocumentMask:
    """A block-diagonal causal mask over the documents of a batch, in the one representation that the kernel needs.

    Attributes:
        positions: (B,T) int64, the position of each token in its document, from 0.
        dense: (B,1,T,T) bool, true where a query (third dimension) may attend to a key; works on every device and with
            every attention function, at B * T * T bytes.
        starts: (B,T) int32, the index in its sequence at which each token's document begins, for CPU kernels.
        block_mask: the blocks of queries and keys that share a document, for flex attention.
        xformers_bias: the document lengths as xformers' BlockDiagonalCausalMask.
        context_shard: this rank's shard of the sequences, with context parallelism (context_parallel.ContextShard).
        attn_func: (queries, keys, values, documents) -> attention with xformers_bias, or (queries, keys, values,
            documents, options) with context_shard; excluded from compilation by `disable_compilation`.
        for_options: returns the mask of the same documents for layers with other options.
        lengths: returns (B,T) int64, the number of tokens of each token's document.
    """

    positions: Tensor
    dense: Tensor | None = None
    starts: Tensor | None = None
    block_mask: BlockMask | None = None
    xformers_bias: Any = None
    context_shard: Any = None
    attn_func: Callable[..., Tensor] | None = None
    for_options: Callable[[AttentionOptions], DocumentMask] | None = None
    lengths: Callable[[], Tensor] | None = None


def disable_compilation(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `function` excluded from torch.compile, which would recompile it for every list of document lengths.

    Importing the compiler takes seconds, so `function` is returned unchanged if the compiler has not been imported.
    """
    return _compiler_disabled(function) if "torch._dynamo" in sys.modules else function


@functools.cache  # always return the same object, so that a compiled block recognizes it
def _compiler_disabled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    disabled: Callable[..., Tensor] = torch.compiler.disable(function)
    return disabled


def is_document_start(document_ids: Tensor) -> Tensor:
    """Mark the first token of each document: document_ids (B,T) of any integer type -> (B,T) bool."""
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return is_start


def document_positions(is_start: Tensor) -> Tensor:
    """Return the position of each token in its document: is_start (B,T) bool -> (B,T) int64."""
    return torch.arange(is_start.shape[1], device=is_start.device) - document_starts(is_start)


def document_starts(is_start: Tensor) -> Tensor:
    """Return the index at which each token's document begins: is_start (B,T) bool -> (B,T) int32."""
    indices = torch.arange(is_start.shape[1], device=is_start.device)
    return torch.where(is_start, indices, 0).cummax(1).values.to(torch.int32)


def token_document_lengths(is_start: Tensor) -> Tensor:
    """Return the number of tokens of each token's document: is_start (B,T) bool -> (B,T) int64."""
    index = is_start.cumsum(1) - 1
    counts = torch.zeros_like(index).scatter_add_(1, index, torch.ones_like(index))
    return counts.gather(1, index)


def document_lengths(is_start: Tensor) -> tuple[int, ...]:
    """Return the number of tokens of each document, sequence by sequence; is_start (B,T) bool. Waits for the device."""
    starts = is_start.flatten().nonzero()[:, 0]
    return tuple(starts.diff(append=starts.new_tensor([is_start.numel()])).tolist())


def dense_document_mask(is_start: Tensor, window: int | None = None) -> Tensor:
    """Return `DocumentMask.dense`: is_start (B,T) bool -> (B,1,T,T) bool; `window`: as in AttentionOptions."""
    index = is_start.cumsum(1, dtype=torch.int32)
    mask = (index[:, :, None] == index[:, None, :]).tril()
    return (mask if window is None else mask.triu(1 - window))[:, None]


def flex_block_mask(is_start: Tensor, window: int | None = None) -> BlockMask:
    """Return `DocumentMask.block_mask` from is_start (B,T) bool, without allocating a T x T tensor.

    Documents are contiguous. A block of queries therefore shares a document with an earlier block of keys if its first
    query and the last key are in the same document. The two blocks need no mask if the last query and the first key
    are in the same document. A window needs the blocks whose first query and last key are less than `window` apart, and
    needs no mask where this is true of the last query and the first key.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = is_start.shape[1]
    index = is_start.cumsum(1, dtype=torch.int32)
    first_index = index[:, ::BLOCK_TOKENS]
    num_blocks = first_index.shape[1]
    block_ends = torch.arange(BLOCK_TOKENS - 1, num_blocks * BLOCK_TOKENS, BLOCK_TOKENS, device=is_start.device)
    last_index = index[:, block_ends.clamp(max=length - 1)]
    full = (last_index[:, :, None] == first_index[:, None, :]).tril(-1)
    if length % BLOCK_TOKENS:
        full[:, -1] = False  # only the mask excludes queries beyond the end of the sequence
    partial = (first_index[:, :, None] == last_index[:, None, :]).tril() & ~full
    partial |= torch.eye(num_blocks, dtype=torch.bool, device=is_start.device)
    if window is not None:
        starts = torch.arange(num_blocks, device=is_start.device) * BLOCK_TOKENS
        distance = starts[:, None] - starts[None, :]  # of the blocks' first tokens
        inside = distance + BLOCK_TOKENS - 1 < window
        partial = (partial | (full & ~inside)) & (distance - BLOCK_TOKENS + 1 < window)
        full = full & inside

    def same_document(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (index[b, query] == index[b, key])

    def same_document_in_window(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert window is not None
        return same_document(b, h, query, key) & (query - key < window)

    return BlockMask.from_kv_blocks(
        *_kv_block_indices(partial),
        *_kv_block_indices(full),
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=same_document if window is None else same_document_in_window,
        seq_lengths=(length, length),
    )


def _kv_block_indices(needed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks that each query block needs, (B,1,N), and the indices of all key blocks with the
    needed ones first, (B,1,N,N), both int32; needed (B,N,N) bool."""
    order = needed.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return needed.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


def document_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: DocumentMask,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Compute softmax attention within documents, with whichever representation `documents` holds.

    queries (B,T,H,K) float, keys and values (B,T,G,K) with G a divisor of H -> (B,T,H,K). `documents` is the mask for
    these options.
    """
    if documents.block_mask is not None:
        return _flex_attention(queries, keys, values, documents.block_mask, options)
    if documents.starts is not None:
        return causal_attention(queries, keys, values, documents.starts, options.scale)
    if documents.context_shard is not None:
        assert documents.attn_func is not None
        return documents.attn_func(queries, keys, values, documents, options)
    if documents.attn_func is not None:
        keys, values = (repeat_heads(x, queries.shape[2]) for x in (keys, values))
        return documents.attn_func(queries, keys, values, documents)
    return general_attention(queries, keys, values, documents.dense, options=options)


def _flex_attention(
    queries: Tensor, keys: Tensor, values: Tensor, block_mask: BlockMask, options: AttentionOptions
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    width = queries.shape[-1]
    if width < _MIN_FLEX_HEAD_WIDTH:  # zero padding changes neither scores nor results
        queries, keys, values = (F.pad(x, (0, _MIN_FLEX_HEAD_WIDTH - width)) for x in (queries, keys, values))
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    # A compiled block compiles the kernel with itself; on a CPU the kernel runs uncompiled.
    is_separate = q.is_cuda and not torch.compiler.is_compiling()
    kernel = _compiled_flex_attention() if is_separate else flex_attention
    settings: dict[str, Any] = {"score_mod": _soft_cap(options.soft_cap)} if options.soft_cap is not None else {}
    settings |= {"enable_gqa": True} if k.shape[1] < q.shape[1] else {}
    scale = width**-0.5 if options.scale is None else options.scale
    attend = functools.partial(kernel, block_mask=block_mask, scale=scale, **settings)
    out: Tensor = keep_result(attend, q, k, v) if is_separate else attend(q, k, v)
    return out.transpose(1, 2)[..., :width].contiguous()


@functools.cache  # a compiled kernel recognizes the function
def _soft_cap(limit: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, _b: Tensor, _h: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return cap


@functools.cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def supports_flex_attention(device: torch.device) -> bool:
    """Return whether flex attention can be compiled for a CUDA device; if not, log the reason once."""
    problem = triton_problem(device)
    if problem:
        logging.warning(
            "Flex attention is not available, so attention within documents uses a dense mask of sequence x sequence "
            f"bytes, which is slower: {problem}"
        )
    return problem is None
