"""Context parallelism: ranks that share rows, each with a part of every sequence (--context-parallel).

A row of T tokens is cut into 2 C chunks for C ranks, and rank c has chunks c and 2 C - 1 - c, so that causal attention
is the same work for all. All that is not attention sees its own tokens alone. For attention a rank gathers the keys and
values of all (as Llama 3 was trained, https://arxiv.org/abs/2407.21783, section 3.3.2), and its two chunks of queries
look back from where they stand. The model knows nothing of it: it is given `DocumentMask`.
Legend: B batch, T sequence, H heads, K head width, C ranks of a context group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from open_lm.config.layout import MeshLayout
from open_lm.errors import ConfigError
from open_lm.kernels.document_attention import DocumentMask, is_document_start, disable_compilation, document_positions

# Named anew from torch 2.13 on, which warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def check_sequence_length(length: int, context: int) -> None:
    """ConfigError where sequences of `length` tokens cannot be cut for so many ranks."""
    if length % (2 * context):
        raise ConfigError(
            f"--context-parallel {context}: the model's sequences of {length} tokens do not divide into {2 * context} "
            "chunks, two for each rank"
        )


def local_shard(rows: Tensor, layout: MeshLayout) -> Tensor:
    """This rank's tokens of whole rows: (B,T,…) -> (B,T/C,…)."""
    if layout.context == 1:
        return rows
    chunks = rows.chunk(2 * layout.context, dim=1)
    return torch.cat((chunks[layout.context_rank], chunks[-1 - layout.context_rank]), dim=1)


def gather_sequences(part: Tensor, layout: MeshLayout) -> Tensor:
    """Whole rows (B,T,…) of all ranks' parts (B,T/C,…), with gradients. Collective."""
    if layout.context == 1:
        return part
    parts: Tensor = _Gather.apply(part, layout.context_group)
    halves = parts.unflatten(2, (2, -1))  # (C,B,2,T/(2 C),…)
    in_order = torch.cat((halves[:, :, 0], halves[:, :, 1].flip(0)))
    return in_order.movedim(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class ContextShard:
    """Whose part of rows, and what its two chunks of queries may see of the keys up to their ends. The masks are made
    outside the blocks: once for all, and where recomputation by operator sees no tensor subclass made."""

    layout: MeshLayout
    masks: tuple[Tensor, ...]


def context_parallel_documents(layout: MeshLayout, length: int, device: torch.device, document_ids: Tensor | None = None) -> DocumentMask:
    """What the model needs to know of this rank's part of rows of `length` tokens: where its tokens stand, and how they
    attend to those of all ranks. Inside documents with document_ids (B,T), by masks of T/(2 C) * T bytes for a row."""
    chunk = length // (2 * layout.context)
    ends = [(place + 1) * chunk for place in _places(layout)]
    if document_ids is None:
        from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler with it, which takes seconds

        positions = torch.arange(length, device=device)[None]
        masks: list[Tensor] = [causal_lower_right(chunk, end) for end in ends]
    else:
        positions = document_positions(is_document_start(document_ids))
        masks = [_in_documents(document_ids[:, :end], chunk) for end in ends]
    return DocumentMask(local_shard(positions, layout), context_shard=ContextShard(layout, tuple(masks)), attn_func=disable_compilation(_attend))


def _in_documents(document_ids: Tensor, queries: int) -> Tensor:
    """Which of the keys of document_ids (B,S) the last `queries` of them may see: (B,1,queries,S) bool."""
    before = document_ids.shape[1] - queries
    return (document_ids[:, before:, None] == document_ids[:, None, :]).tril(diagonal=before)[:, None]


def _places(layout: MeshLayout) -> tuple[int, int]:
    """Where this rank's two chunks stand among all."""
    return layout.context_rank, 2 * layout.context - 1 - layout.context_rank


def _attend(queries: Tensor, keys: Tensor, values: Tensor, documents: DocumentMask) -> Tensor:
    """Causal attention of this rank's queries to the keys and values of all: three times (B,T/C,H,K) -> (B,T/C,H,K)."""
    part: ContextShard = documents.context_shard
    kind = queries.device.type
    if torch.is_autocast_enabled(kind):  # norms of queries and keys widen them; autocast does not see through the masks
        queries, keys, values = (x.to(torch.get_autocast_dtype(kind)) for x in (queries, keys, values))
    both = gather_sequences(torch.stack((keys, values), dim=2), part.layout)
    k, v = (x.transpose(1, 2) for x in both.unbind(2))  # fused kernels want a head's elements side by side
    outs = []
    for place, chunk, mask in zip(_places(part.layout), queries.chunk(2, dim=1), part.masks, strict=True):
        end = (place + 1) * chunk.shape[1]  # chunks of queries are the last of the keys that they may see
        out = F.scaled_dot_product_attention(chunk.transpose(1, 2), k[:, :, :end], v[:, :, :end], attn_mask=mask)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1)


class _Gather(torch.autograd.Function):
    """All ranks' parts (B,…) of equal shape as (C,B,…); its gradient is the sum of what all ranks have for a part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = part.new_empty(dist.get_world_size(group), *part.shape)
        _all_gather(gathered.flatten(0, 1), part.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        part = torch.empty_like(grad[0])
        _reduce_scatter(part, grad.contiguous().flatten(0, 1), group=ctx.group)
        return part, None
