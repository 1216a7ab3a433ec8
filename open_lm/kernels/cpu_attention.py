"""Causal softmax attention on a CPU, as one custom operator that selects the kernel.

Bfloat16 on a CPU with matrix units uses native kernels (native/attention.py), everything else torch's.
Legend: B batch, T sequence, H heads, K head width, N documents in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_lm.kernels import operators
from open_lm.kernels.general_attention import repeat_heads
from open_lm.kernels.native import attention as native

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Up to this head width torch's backward kernel takes 0.6 times as long in float32 as in bfloat16: its products are too
# small for the matrix units, and converting between the dtypes takes time. At width 32 both are equal.
_MAX_FLOAT32_BACKWARD_WIDTH = 16


def causal_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    document_starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute causal attention within documents.

    Args:
        queries: (B,T,H,K) float on a CPU; under autocast all three tensors are converted to its dtype.
        keys: like the queries, with H or, for grouped heads, a divisor of H heads.
        values: like the keys.
        document_starts: (B,T) of any integer type, the index at which each token's document begins; None if each
            sequence is one document.
        scale: factor of the scores; None for 1/sqrt(K).

    Returns:
        (B,T,H,K) in the dtype of the queries. The result and the gradients are bit-identical in every run.

    Raises:
        ValueError: queries, keys and values with different dtypes or shapes.
    """
    if torch.is_autocast_enabled("cpu") and queries.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
    if scale is not None:
        queries = queries * (scale * queries.shape[-1] ** 0.5)
    if keys.shape[2] != queries.shape[2]:
        keys, values = (repeat_heads(x, queries.shape[2]) for x in (keys, values))
    types_and_shapes = [(x.dtype, tuple(x.shape)) for x in (queries, keys, values)]
    if types_and_shapes != types_and_shapes[:1] * 3:
        raise ValueError(f"queries, keys and values must have one dtype and shape, found {types_and_shapes}")
    if document_starts is not None:
        document_starts = document_starts.to(torch.int32).contiguous()
    out: Tensor
    out, _log_sums = torch.ops.open_lm.cpu_attention(queries, keys, values, document_starts)
    return out


def _forward(queries: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (B,T,H,K) in the dtype of the queries, and the natural logarithms (B,H,T) of the softmax's sums.

    The logarithms are float32, or float64 for float64 queries.
    """
    if not queries.numel():
        return _empty_results(queries)
    queries, keys, values = (_contiguous_heads(x) for x in (queries, keys, values))
    if native.supports(queries):
        return native.forward(queries, keys, values, document_starts)
    documents = zip(*(_split_documents(x, document_starts) for x in (queries, keys, values)), strict=True)
    outs, log_sums = zip(*(_flash_forward(*document, is_causal=True) for document in documents), strict=True)
    joined_sums = _join_documents([x[..., None] for x in log_sums], queries.shape[:2])
    return _join_documents(outs, queries.shape[:2]), joined_sums[..., 0].transpose(1, 2).contiguous()


def _backward(  # noqa: PLR0917 (operator arguments are positional)
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    document_starts: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    grad is the gradient of the first result of `_forward`; the other arguments are its arguments and results.
    """
    if not queries.numel():
        return _empty_gradients(grad, queries)
    grad, queries, keys, values = (_contiguous_heads(x) for x in (grad, queries, keys, values))
    if native.supports(queries):
        return native.backward(grad, queries, keys, values, document_starts, out, log_sums)
    dtype, batch_and_length = queries.dtype, queries.shape[:2]
    tensors = [grad, queries, keys, values, out]
    if dtype == torch.bfloat16 and queries.shape[-1] <= _MAX_FLOAT32_BACKWARD_WIDTH:
        tensors = [x.float() for x in tensors]
    split = [_split_documents(x, document_starts) for x in (*tensors, log_sums.transpose(1, 2)[..., None])]
    grads = [
        _flash_backward(*document, sums[..., 0], dropout_p=0.0, is_causal=True)
        for *document, sums in zip(*split, strict=True)
    ]
    q_grad, k_grad, v_grad = (_join_documents(x, batch_and_length).to(dtype) for x in zip(*grads, strict=True))
    return q_grad, k_grad, v_grad


def _split_documents(x: Tensor, document_starts: Tensor | None) -> list[Tensor]:
    """Split x (B,T,H,K) into documents in the layout of torch's kernels, N x (1,H,tokens of the document,K).

    Without document_starts return the whole batch as one tensor (B,H,T,K). Separate documents are faster than a mask
    and than attention to the full sequence.
    """
    if document_starts is None:
        return [x.transpose(1, 2)]
    indices = torch.arange(document_starts.shape[1], dtype=document_starts.dtype)
    starts = (document_starts == indices).flatten().nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([document_starts.numel()])).tolist()
    return list(x.flatten(0, 1).transpose(0, 1)[None].split(lengths, dim=2))


def _join_documents(documents: Sequence[Tensor], batch_and_length: tuple[int, ...]) -> Tensor:
    """Invert `_split_documents` -> (B,T,H,K)."""
    if len(documents) == 1:
        joined = documents[0].transpose(1, 2)
    else:
        joined = torch.cat(tuple(documents), dim=2)[0].transpose(0, 1).unflatten(0, batch_and_length)
    return joined.contiguous()


def _contiguous_heads(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---------------------------------------------------------------------------------------- operator registration
def _empty_results(queries: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = queries.shape
    sum_dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return queries.new_empty(queries.shape), queries.new_empty((batch, heads, length), dtype=sum_dtype)


def _empty_gradients(grad: Tensor, queries: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return queries.new_empty(queries.shape), queries.new_empty(queries.shape), queries.new_empty(queries.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _call_backward(ctx: Any, grad: Tensor, _log_sums_grad: Any) -> tuple[Tensor | None, ...]:
    return (*torch.ops.open_lm.cpu_attention_backward(grad, *ctx.saved_tensors), None)


_ARGUMENTS = "Tensor queries, Tensor keys, Tensor values, Tensor? document_starts"
operators.register(f"cpu_attention({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _empty_results)
operators.register(
    f"cpu_attention_backward(Tensor grad, {_ARGUMENTS}, Tensor out, Tensor log_sums) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
)
operators.register_backward("cpu_attention", _save_for_backward, _call_backward)
