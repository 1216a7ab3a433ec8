"""Attention that stays inside documents, for rows that hold several of them one after the other.

A document is a run of equal numbers in a row of document ids; each of its tokens sees the document's tokens up to
itself. What all layers need for that is worked out once for a forward pass (`Documents`), in one of the forms below.
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

BLOCK_TOKENS = 128  # flex attention skips the squares of this many queries and keys that hold nothing to attend to
_LEAST_FLEX_WIDTH = 16  # of a head: the kernels multiply tiles of at least 16


@dataclass(eq=False)  # a frozen one would have torch.compile look at every length
class Documents:
    """The documents of a batch, and the one form of them that the chosen kernel takes.

    Attributes:
        positions: (B,T) int64, counted from 0 in each document.
        allowed: (B,1,T,T) bool, true where a query (third dimension) may see a key: for every device and attention
            function, at B * T * T bytes.
        starts: (B,T) int32, where in its row each token's document begins, for kernels on a CPU.
        blocks: which blocks of queries and keys share a document, for flex attention.
        bias: the lengths, as xformers' kernels take them (BlockDiagonalCausalMask).
        part: whose part of longer rows these tokens are, for context parallelism (context_parallel.PartOfRows).
        attend: (queries, keys, values, documents) -> attention by bias or part, see `kept_apart`.
    """

    positions: Tensor
    allowed: Tensor | None = None
    starts: Tensor | None = None
    blocks: BlockMask | None = None
    bias: Any = None
    part: Any = None
    attend: Callable[..., Tensor] | None = None


def kept_apart(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, kept out of compilation: it would be compiled anew for every list of lengths.

    The compiler takes seconds to import, so that nothing is done where nobody has loaded it.
    """
    return _not_compiled(function) if "torch._dynamo" in sys.modules else function


@functools.cache  # one object, so that a compiled block finds what it has seen before
def _not_compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    apart: Callable[..., Tensor] = torch.compiler.disable(function)
    return apart


def first_tokens(document_ids: Tensor) -> Tensor:
    """Where documents begin: document_ids (B,T) of any integer type -> (B,T) bool."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return begins


def positions_in(first: Tensor) -> Tensor:
    """Positions (B,T) int64 that start at 0 with each first token; first (B,T) bool."""
    return torch.arange(first.shape[1], device=first.device) - starts_in(first)


def allowed_in(first: Tensor) -> Tensor:
    """The mask `Documents.allowed` (B,1,T,T) of documents that begin at first (B,T) bool."""
    number = first.cumsum(1, dtype=torch.int32)
    return (number[:, :, None] == number[:, None, :]).tril()[:, None]


def lengths_in(first: Tensor) -> tuple[int, ...]:
    """Tokens of each document that begins at first (B,T) bool, row after row. Waits for the device."""
    starts = first.flatten().nonzero()[:, 0]
    return tuple(starts.diff(append=starts.new_tensor([first.numel()])).tolist())


def starts_in(first: Tensor) -> Tensor:
    """`Documents.starts` (B,T) int32 of documents that begin at first (B,T) bool."""
    places = torch.arange(first.shape[1], device=first.device)
    return torch.where(first, places, 0).cummax(1).values.to(torch.int32)


def blocks_in(first: Tensor) -> BlockMask:
    """`Documents.blocks` of documents that begin at first (B,T) bool; nothing of the size of T * T is made.

    Documents follow one another, so a block of queries shares a document with an earlier block of keys if its first
    query and the last key do, and lies in one document with all of them if its last query and the first key do.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = first.shape[1]
    number = first.cumsum(1, dtype=torch.int32)
    head = number[:, ::BLOCK_TOKENS]
    ends = torch.arange(BLOCK_TOKENS - 1, head.shape[1] * BLOCK_TOKENS, BLOCK_TOKENS, device=first.device)
    tail = number[:, ends.clamp(max=length - 1)]
    whole = (tail[:, :, None] == head[:, None, :]).tril(-1)
    if length % BLOCK_TOKENS:
        whole[:, -1] = False  # queries after the row's end are left out by the mask alone
    partial = (head[:, :, None] == tail[:, None, :]).tril() & ~whole
    partial |= torch.eye(head.shape[1], dtype=torch.bool, device=first.device)

    def same_document(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (number[b, query] == number[b, key])

    return BlockMask.from_kv_blocks(
        *_in_order(partial),
        *_in_order(whole),
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=same_document,
        seq_lengths=(length, length),
    )


def _in_order(needed: Tensor) -> tuple[Tensor, Tensor]:
    """needed (B,N,N) bool -> how many blocks of keys each block of queries needs, (B,1,N), and these first in
    (B,1,N,N); both int32."""
    order = needed.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return needed.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


def softmax_in_documents(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents) -> Tensor:
    """Softmax attention inside documents, by whichever form of them is there: four times (B,T,H,K) float."""
    if documents.blocks is not None:
        return _through_flex(queries, keys, values, documents.blocks)
    if documents.starts is not None:
        return causal_attention(queries, keys, values, documents.starts)
    if documents.attend is not None:
        return documents.attend(queries, keys, values, documents)
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.allowed)
    return out.transpose(1, 2).contiguous()


def _through_flex(queries: Tensor, keys: Tensor, values: Tensor, blocks: BlockMask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    width = queries.shape[-1]
    if width < _LEAST_FLEX_WIDTH:  # zeros change neither scores nor results
        queries, keys, values = (F.pad(x, (0, _LEAST_FLEX_WIDTH - width)) for x in (queries, keys, values))
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    # Inside a compiled block it is compiled with the block; on a CPU it is not compiled.
    kernel = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled_flex()
    out: Tensor = kernel(q, k, v, block_mask=blocks, scale=width**-0.5)
    return out.transpose(1, 2)[..., :width].contiguous()


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def has_flex(device: torch.device) -> bool:
    """Whether flex attention's kernels can be compiled for a CUDA device; where not, a warning says why, once."""
    problem = None
    if importlib.util.find_spec("triton") is None:
        problem = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        problem = "the device's compute capability is below 8.0"
    elif not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        problem = "Triton finds no C compiler (install one or set CC)"
    if problem:
        logging.warning(
            f"Attention inside documents runs with a mask of sequence x sequence bytes, slower than it could: {problem}"
        )
    return problem is None
