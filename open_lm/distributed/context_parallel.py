"""Context parallelism: the ranks of a context group each process a shard of every sequence (--context-parallel).

A sequence of T tokens is split into 2 C chunks for C ranks. Rank c gets chunks c and 2 C - 1 - c, which balances the
work of causal attention. Everything except attention operates on the local tokens only. For attention, each rank
all-gathers the keys and values (as in Llama 3, https://arxiv.org/abs/2407.21783, section 3.3.2), and its two chunks of
queries attend to all keys up to their own positions. The model needs no changes: it receives a `DocumentMask`.
Legend: B batch, T sequence, H heads, K head width, C ranks of a context group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from open_lm.config.layout import MeshLayout
from open_lm.errors import ConfigError
from open_lm.kernels.document_attention import (
    DocumentMask,
    disable_compilation,
    document_positions,
    is_document_start,
    token_document_lengths,
)
from open_lm.kernels.general_attention import PLAIN, AttentionOptions, general_attention

# torch 2.13 renamed these functions and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def check_sequence_length(length: int, context: int) -> None:
    """Raise ConfigError if sequences of `length` tokens cannot be split over `context` ranks."""
    if context > 1 and length % (2 * context):
        raise ConfigError(
            f"--context-parallel {context}: the model's sequence length {length} is not divisible by {2 * context}, "
            "two chunks per rank"
        )


def shard_sequences(sequences: Tensor, layout: MeshLayout) -> Tensor:
    """Return this rank's tokens of full sequences: (B,T,…) -> (B,T/C,…)."""
    if layout.context == 1:
        return sequences
    chunks = sequences.chunk(2 * layout.context, dim=1)
    return torch.cat((chunks[layout.context_rank], chunks[-1 - layout.context_rank]), dim=1)


def gather_sequences(shard: Tensor, layout: MeshLayout) -> Tensor:
    """Gather all ranks' shards (B,T/C,…) into full sequences (B,T,…). Differentiable. Collective."""
    if layout.context == 1:
        return shard
    shards: Tensor = _AllGather.apply(shard, layout.context_group)
    halves = shards.unflatten(2, (2, -1))  # (C,B,2,T/(2 C),…)
    in_order = torch.cat((halves[:, :, 0], halves[:, :, 1].flip(0)))
    return in_order.movedim(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class ContextShard:
    """The layout that sequences are sharded by, and one attention mask for each of the two local chunks of queries.

    The masks cover the keys up to the end of the chunk. They are built once per forward pass, outside the blocks:
    selective recomputation cannot handle tensor subclasses that are created inside.
    """

    layout: MeshLayout
    masks: tuple[Tensor, ...]


def context_parallel_mask(
    layout: MeshLayout,
    length: int,
    device: torch.device,
    document_ids: Tensor | None = None,
    options: AttentionOptions = PLAIN,
) -> DocumentMask:
    """Return the positions and the attention masks of this rank's shard of sequences of `length` tokens.

    With document_ids (B,T), attention stays inside documents; the masks then take T/(2 C) * T bytes per sequence. With
    a limiting window or a soft cap in `options` they take as much for one sequence.
    """
    chunk = length // (2 * layout.context)
    ends = [(index + 1) * chunk for index in _chunk_indices(layout)]
    needs_dense = document_ids is None and (options.is_limiting(length) or options.soft_cap is not None)
    ids = torch.zeros(1, length, dtype=torch.int32, device=device) if needs_dense else document_ids
    if ids is None:
        from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes seconds

        is_start = (torch.arange(length, device=device) == 0)[None]
        masks: list[Tensor] = [causal_lower_right(chunk, end) for end in ends]
    else:
        is_start = is_document_start(ids)
        masks = [_chunk_mask(ids[:, :end], chunk, options.window) for end in ends]
    return DocumentMask(
        shard_sequences(document_positions(is_start), layout),
        context_shard=ContextShard(layout, tuple(masks)),
        attn_func=disable_compilation(_attend),
        for_options=lambda other: context_parallel_mask(layout, length, device, document_ids, other),
        lengths=lambda: shard_sequences(token_document_lengths(is_start), layout),
    )


def _chunk_mask(document_ids: Tensor, num_queries: int, window: int | None) -> Tensor:
    """Return the causal document mask (B,1,num_queries,S) bool of the last queries; document_ids are (B,S)."""
    offset = document_ids.shape[1] - num_queries
    mask = (document_ids[:, offset:, None] == document_ids[:, None, :]).tril(diagonal=offset)
    return (mask if window is None else mask.triu(offset - window + 1))[:, None]


def _chunk_indices(layout: MeshLayout) -> tuple[int, int]:
    """Return the indices of this rank's two chunks."""
    return layout.context_rank, 2 * layout.context - 1 - layout.context_rank


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, documents: DocumentMask, options: AttentionOptions = PLAIN
) -> Tensor:
    """Compute causal attention of the local queries to all ranks' keys and values.

    queries (B,T/C,H,K), keys and values (B,T/C,G,K) with G a divisor of H -> (B,T/C,H,K).
    """
    shard: ContextShard = documents.context_shard
    device_type = queries.device.type
    # The q and k norms return float32, and autocast does not cast inputs when the mask is a tensor subclass.
    if torch.is_autocast_enabled(device_type):
        queries, keys, values = (x.to(torch.get_autocast_dtype(device_type)) for x in (queries, keys, values))
    keys_values = gather_sequences(torch.stack((keys, values), dim=2), shard.layout)
    k, v = keys_values.unbind(2)
    outs = []
    for index, chunk, mask in zip(_chunk_indices(shard.layout), queries.chunk(2, dim=1), shard.masks, strict=True):
        end = (index + 1) * chunk.shape[1]  # the mask is aligned to the last key
        outs.append(general_attention(chunk, k[:, :end], v[:, :end], mask, options=options))
    return torch.cat(outs, dim=1)


class _AllGather(torch.autograd.Function):
    """All-gather of equally shaped shards (B,…) to (C,B,…); the backward pass reduce-scatters the gradients (sum)."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = shard.new_empty(dist.get_world_size(group), *shard.shape)
        _all_gather(gathered.flatten(0, 1), shard.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        shard_grad = torch.empty_like(grad[0])
        _reduce_scatter(shard_grad, grad.contiguous().flatten(0, 1), group=ctx.group)
        return shard_grad, None
