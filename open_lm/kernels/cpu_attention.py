"""Causal softmax attention on a CPU: one operator for all, by the kernels that suit the tensors and the processor.

Bfloat16 on a processor with matrix units goes through kernels of our own (native/attention.py), all else through
torch's.
Legend: B batch, T sequence, H heads, K head width, N documents of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_lm.kernels import operators
from open_lm.kernels.native import attention as native

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Up to this head width torch's backward kernel takes 0.6 times as long in float32 as in bfloat16: its products are too
# small for the matrix units, and conversions between the types remain. At 32 both are equal.
_NARROW = 16


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, first_tokens: Tensor | None = None) -> Tensor:
    """Each query attends to the keys from its document's first up to its own, scores scaled by 1/sqrt(K).

    Args:
        queries, keys, values: (B,T,H,K) float on a CPU; under autocast they are taken in its type.
        first_tokens: (B,T) of any integer type, where in its row each token's document begins; None where a row is one
            document.

    Returns:
        (B,T,H,K) in the queries' type. It and the gradients are the same bits in every run.

    Raises:
        ValueError: queries, keys and values of several types or shapes.
    """
    if torch.is_autocast_enabled("cpu") and queries.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
    kinds = [(x.dtype, tuple(x.shape)) for x in (queries, keys, values)]
    if kinds != kinds[:1] * 3:
        raise ValueError(f"queries, keys and values have to be of one type and shape, found {kinds}")
    if first_tokens is not None:
        first_tokens = first_tokens.to(torch.int32).contiguous()
    out: Tensor
    out, _log_sums = torch.ops.open_lm.cpu_attention(queries, keys, values, first_tokens)
    return out


def _forward(queries: Tensor, keys: Tensor, values: Tensor, first_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> (B,T,H,K) as the queries, and the natural logarithms (B,H,T) of the softmax's sums, in float32 or wider."""
    if not queries.numel():
        return _shapes_forward(queries)
    queries, keys, values = (_side_by_side(x) for x in (queries, keys, values))
    if native.takes(queries):
        return native.forward(queries, keys, values, first_tokens)
    pieces = zip(*(_documents(x, first_tokens) for x in (queries, keys, values)), strict=True)
    outs, log_sums = zip(*(_flash_forward(*piece, is_causal=True) for piece in pieces), strict=True)
    sums = _rows([x[..., None] for x in log_sums], queries.shape[:2])
    return _rows(outs, queries.shape[:2]), sums[..., 0].transpose(1, 2).contiguous()


def _backward(  # noqa: PLR0917 (an operator takes its arguments by position)
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    first_tokens: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_forward` took and gave, and the gradients of its result -> those of queries, keys and values."""
    if not queries.numel():
        return _shapes_backward(grad, queries)
    grad, queries, keys, values = (_side_by_side(x) for x in (grad, queries, keys, values))
    if native.takes(queries):
        return native.backward(grad, queries, keys, values, first_tokens, out, log_sums)
    dtype, batch_and_length = queries.dtype, queries.shape[:2]
    tensors = [grad, queries, keys, values, out]
    if dtype == torch.bfloat16 and queries.shape[-1] <= _NARROW:
        tensors = [x.float() for x in tensors]
    pieces = [_documents(x, first_tokens) for x in (*tensors, log_sums.transpose(1, 2)[..., None])]
    grads = [
        _flash_backward(*piece, sums[..., 0], dropout_p=0.0, is_causal=True)
        for *piece, sums in zip(*pieces, strict=True)
    ]
    of_queries, of_keys, of_values = (_rows(x, batch_and_length).to(dtype) for x in zip(*grads, strict=True))
    return of_queries, of_keys, of_values


def _documents(x: Tensor, first_tokens: Tensor | None) -> list[Tensor]:
    """x (B,T,H,K) as torch's kernels take it, each document by itself, N x (1,H,its tokens,K), or all rows at once
    (B,H,T,K). Documents one by one are faster than a mask, and than attention to the whole row."""
    if first_tokens is None:
        return [x.transpose(1, 2)]
    places = torch.arange(first_tokens.shape[1], dtype=first_tokens.dtype)
    starts = (first_tokens == places).flatten().nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([first_tokens.numel()])).tolist()
    return list(x.flatten(0, 1).transpose(0, 1)[None].split(lengths, dim=2))


def _rows(pieces: Sequence[Tensor], batch_and_length: tuple[int, ...]) -> Tensor:
    """The reverse of `_documents`: -> (B,T,H,K)."""
    if len(pieces) == 1:
        rows = pieces[0].transpose(1, 2)
    else:
        rows = torch.cat(tuple(pieces), dim=2)[0].transpose(0, 1).unflatten(0, batch_and_length)
    return rows.contiguous()


def _side_by_side(x: Tensor) -> Tensor:
    """x, the elements of whose heads lie side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ------------------------------------------------------------------------------------------ for torch
def _shapes_forward(queries: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = queries.shape
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return queries.new_empty(queries.shape), queries.new_empty((batch, heads, length), dtype=wide)


def _shapes_backward(grad: Tensor, queries: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return queries.new_empty(queries.shape), queries.new_empty(queries.shape), queries.new_empty(queries.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _of_log_sums: Any) -> tuple[Tensor | None, ...]:
    return (*torch.ops.open_lm.cpu_attention_backward(grad, *ctx.saved_tensors), None)


_TAKEN = "Tensor queries, Tensor keys, Tensor values, Tensor? first_tokens"
operators.register(f"cpu_attention({_TAKEN}) -> (Tensor, Tensor)", _forward, _shapes_forward)
operators.register(
    f"cpu_attention_backward(Tensor grad, {_TAKEN}, Tensor out, Tensor log_sums) -> (Tensor, Tensor, Tensor)",
    _backward,
    _shapes_backward,
)
operators.differentiate("cpu_attention", _keep, _gradients)
