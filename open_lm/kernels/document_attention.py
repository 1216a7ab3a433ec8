"""Attention with a block-diagonal causal mask, for sequences that pack several documents.

A document is a run of equal integers in a row of document ids. Each token attends to the earlier tokens of its own
document and to itself. All layers share one `DocumentMask`, computed once per forward pass in the representation that
the attention kernel needs.
Legend: B batch, T sequence, H heads, K head width, N blocks of BLOCK_TOKENS tokens in T.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels.cpu_attention import causal_attention

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
        attn_func: (queries, keys, values, documents) -> attention with xformers_bias or context_shard; excluded from
            compilation by `disable_compilation`.
    """

    positions: Tensor
    dense: Tensor | None = None
    starts: Tensor | None = None
    block_mask: BlockMask | None = None
    xformers_bias: Any = None
    context_shard: Any = None
    attn_func: Callable[..., Tensor] | None = None


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


def document_lengths(is_start: Tensor) -> tuple[int, ...]:
    """Return the number of tokens of each document, sequence by sequence; is_start (B,T) bool. Waits for the device."""
    starts = is_start.flatten().nonzero()[:, 0]
    return tuple(starts.diff(append=starts.new_tensor([is_start.numel()])).tolist())


def dense_document_mask(is_start: Tensor) -> Tensor:
    """Return `DocumentMask.dense`: is_start (B,T) bool -> (B,1,T,T) bool."""
    index = is_start.cumsum(1, dtype=torch.int32)
    return (index[:, :, None] == index[:, None, :]).tril()[:, None]


def flex_block_mask(is_start: Tensor) -> BlockMask:
    """Return `DocumentMask.block_mask` from is_start (B,T) bool, without allocating a T x T tensor.

    Documents are contiguous. A block of queries therefore shares a document with an earlier block of keys if its first
    query and the last key are in the same document. The two blocks need no mask if the last query and the first key
    are in the same document.
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

    def same_document(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (index[b, query] == index[b, key])

    return BlockMask.from_kv_blocks(
        *_kv_block_indices(partial),
        *_kv_block_indices(full),
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=same_document,
        seq_lengths=(length, length),
    )


def _kv_block_indices(needed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks that each query block needs, (B,1,N), and the indices of all key blocks with the
    needed ones first, (B,1,N,N), both int32; needed (B,N,N) bool."""
    order = needed.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return needed.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


def document_attention(queries: Tensor, keys: Tensor, values: Tensor, documents: DocumentMask) -> Tensor:
    """Compute softmax attention within documents, with whichever representation `documents` holds.

    queries, keys and values (B,T,H,K) float -> (B,T,H,K).
    """
    if documents.block_mask is not None:
        return _flex_attention(queries, keys, values, documents.block_mask)
    if documents.starts is not None:
        return causal_attention(queries, keys, values, documents.starts)
    if documents.attn_func is not None:
        return documents.attn_func(queries, keys, values, documents)
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.dense)
    return out.transpose(1, 2).contiguous()


def _flex_attention(queries: Tensor, keys: Tensor, values: Tensor, block_mask: BlockMask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    width = queries.shape[-1]
    if width < _MIN_FLEX_HEAD_WIDTH:  # zero padding changes neither scores nor results
        queries, keys, values = (F.pad(x, (0, _MIN_FLEX_HEAD_WIDTH - width)) for x in (queries, keys, values))
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    # A compiled block compiles the kernel with itself; on a CPU the kernel runs uncompiled.
    kernel = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled_flex_attention()
    out: Tensor = kernel(q, k, v, block_mask=block_mask, scale=width**-0.5)
    return out.transpose(1, 2)[..., :width].contiguous()


@functools.cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def supports_flex_attention(device: torch.device) -> bool:
    """Return whether flex attention can be compiled for a CUDA device; if not, log the reason once."""
    problem = None
    if importlib.util.find_spec("triton") is None:
        problem = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        problem = "the device's compute capability is below 8.0"
    elif not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        problem = "Triton finds no C compiler (install one or set CC)"
    if problem:
        logging.warning(
            "Flex attention is not available, so attention within documents uses a dense mask of sequence x sequence "
            f"bytes, which is slower: {problem}"
        )
    return problem is None
