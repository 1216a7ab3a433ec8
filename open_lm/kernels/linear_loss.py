"""The cross entropy of a linear layer's outputs, computed over chunks of tokens without keeping the logits.

The logits of all tokens take most of a small model's memory. Here the logits of one chunk are computed, replaced in
place by their gradient (softmax minus one-hot target), and multiplied into the gradients of hidden states and weight.
The logits are thus computed once and never stored, as in Hsu et al. 2024 (https://arxiv.org/abs/2410.10989). Matrix
products run in the compute dtype. Everything between them, and the sum of the weight's gradient, is in float32 (float64
for float64 inputs).

torch.nn.functional.linear_cross_entropy (torch 2.13) uses the same method but is not an alternative. Its bfloat16 sum
is wrong by more than a quarter when options are given (3.0 for each of 512 tokens, D 96, V 50432), it takes seven times
as long on a CPU, and it supports neither the z-loss nor a vocabulary that is sharded over ranks.

Legend: N tokens, R tokens of a chunk, D model width, V rows of the weight: the vocabulary, or this rank's shard of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_lm.config.memory_limits import LOSS_CHUNK_TOKENS
from open_lm.kernels.document_attention import disable_compilation
from open_lm.kernels.logits import finish_logits_, with_bias_column
from open_lm.kernels.native import elements
from open_lm.kernels.products import accumulation_dtype, add_matmul_, matmul_into, supports_float32_output
from open_lm.kernels.row_softmax import softmax_kernels
from open_lm.kernels.vocab_shard import VocabShard

_BLOCK_BYTES = 2**20  # float32 logits per thread on a CPU; with their source they fill half of a core's cache
_MIN_PROBABILITY = 1e-30  # smaller probabilities are too close to underflow to take their logarithm
_FLOAT16_GRAD_SCALE = 1024.0  # float16 gradients of logits are scaled up by this factor against underflow


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    z_loss_coefficient: float = 0.0,
    per_token: bool = False,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    num_ids: int | None = None,
) -> Tensor:
    """Compute the cross entropy of the logits hidden @ weight.T, with the z-loss of `losses.token_loss`.

    The gradients of the sum are computed in the forward pass if they are needed. The gradients of per-token losses are
    computed in the backward pass, from recomputed logits. A result can be differentiated once.

    Args:
        hidden: (N,D) float. Matrix products run in the autocast dtype if autocast is on, else in the dtype of hidden
            and weight.
        weight: (V,D) float, or a DTensor with Shard(0) over a one-dimensional mesh. In that case hidden and targets
            must be equal on all ranks of the mesh, and each rank computes with its own rows. The loss and the gradient
            of hidden are then bit-identical on all ranks.
        targets: (N,) int64; ignore_index marks a token without a target.
        z_loss_coefficient: weight of the z-loss; 0 turns it off.
        per_token: return the loss of each token (N,), 0 without a target, instead of the sum.
        bias: (V,) to add to the logits, with the sharding of the weight. It is computed as a further column of the
            weight, for hidden states that end in 1.
        soft_cap: limit c of the logits l: c tanh(l / c).
        num_ids: number of token ids; further rows of the weight are padding with probability 0. None for V.

    Returns:
        float32, or float64 for float64 inputs.

    Raises:
        ValueError: a weight with another sharding. IndexError: a target outside the vocabulary, on a CPU.
    """
    vocab_shard = None
    if isinstance(weight, DTensor):
        vocab_shard = VocabShard.of(weight)
        weight = weight.to_local()
        bias = bias.to_local() if isinstance(bias, DTensor) else bias
    if bias is not None:
        hidden, weight = with_bias_column(hidden, weight, bias)
    vocab_size = len(weight) if vocab_shard is None else vocab_shard.vocab_size
    device_type, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    grad_enabled = torch.is_grad_enabled()
    settings = _Settings(
        dtype=dtype,
        ignore_index=ignore_index,
        z_loss_coefficient=z_loss_coefficient,
        per_token=per_token,
        needs_hidden_grad=grad_enabled and hidden.requires_grad,
        needs_weight_grad=grad_enabled and weight.requires_grad,
        vocab_shard=vocab_shard,
        soft_cap=soft_cap,
        num_ids=vocab_size if num_ids is None else num_ids,
    )
    loss: Tensor = disable_compilation(_LinearCrossEntropy.apply)(hidden, weight, targets, settings)
    return loss


@dataclass(frozen=True)
class _Settings:
    """The settings of the loss: dtype is that of matrix products, num_ids the size of V without padding."""

    dtype: torch.dtype
    ignore_index: int
    z_loss_coefficient: float
    per_token: bool
    needs_hidden_grad: bool
    needs_weight_grad: bool
    vocab_shard: VocabShard | None
    soft_cap: float | None
    num_ids: int

    @property
    def needs_grad(self) -> bool:
        return self.needs_hidden_grad or self.needs_weight_grad


class _LinearCrossEntropy(torch.autograd.Function):
    """An autograd function: hidden (N,D), weight (V,D), targets (N,) and the settings -> the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, settings: _Settings) -> Any:
        ctx.settings = settings
        if settings.per_token:
            ctx.save_for_backward(hidden, weight, targets)
            no_grad = replace(settings, needs_hidden_grad=False, needs_weight_grad=False)
            return _losses_and_gradients(hidden, weight, targets, no_grad)[0]
        scaled = settings.dtype == torch.float16 and supports_float32_output(hidden.device)
        ctx.grad_scale = _FLOAT16_GRAD_SCALE if scaled else 1.0
        loss_grads = torch.full(targets.shape, ctx.grad_scale, device=hidden.device) if scaled else None
        losses, *ctx.gradients = _losses_and_gradients(hidden, weight, targets, settings, loss_grads)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.settings.per_token:
            hidden, weight, targets = ctx.saved_tensors
            _, *gradients = _losses_and_gradients(hidden, weight, targets, ctx.settings, loss_grads=grads[0])
            dtypes: tuple[torch.dtype, ...] = (hidden.dtype, weight.dtype)
        else:
            if ctx.gradients is None:
                raise RuntimeError("this loss was differentiated before; compute it again to differentiate it again")
            # Scale in place and drop the reference, so that the weight's gradient becomes its .grad without a copy.
            factor = grads[0] / ctx.grad_scale
            gradients, ctx.gradients = [g if g is None else g.mul_(factor) for g in ctx.gradients], None
            dtypes = ctx.dtypes
        cast = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
        return *cast, None, None


_Result = tuple[Tensor, Tensor | None, Tensor | None]


def _losses_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, settings: _Settings, loss_grads: Tensor | None = None
) -> _Result:
    """Compute the losses (N,) and, if needed, the gradients of hidden (N,D) and weight (V,D).

    loss_grads (N,) are the gradients of the final result with respect to each token's loss, 1 if None. Tokens without a
    target have loss 0 and contribute to no gradient.
    """
    valid = targets != settings.ignore_index
    if _on_cpu(hidden):
        return _select_valid_tokens(hidden, weight, targets, settings, loss_grads, valid)
    return _mask_invalid_tokens(hidden, weight, targets, settings, loss_grads, valid)


def _select_valid_tokens(  # noqa: PLR0917 (as `_losses_and_gradients`)
    hidden: Tensor, weight: Tensor, targets: Tensor, settings: _Settings, loss_grads: Tensor | None, valid: Tensor
) -> _Result:
    """Compute with the valid tokens only; valid (N,) bool."""
    rows = valid.nonzero().squeeze(1)
    if len(rows) < len(valid):
        hidden, targets, loss_grads = hidden[rows], targets[rows], None if loss_grads is None else loss_grads[rows]
    hidden = hidden.to(settings.dtype)
    if len(rows) and not 0 <= targets.min() <= targets.max() < settings.num_ids:
        limits = f"{targets.min()} to {targets.max()}"
        raise IndexError(f"targets range from {limits}, expected 0 to {settings.num_ids - 1}")
    losses, hidden_grad, weight_grad = _loop_over_chunks(
        hidden, weight, targets, settings, loss_grads=loss_grads, weight_grad_input=hidden
    )
    if len(rows) < len(valid):
        losses = losses.new_zeros(len(valid)).index_copy_(0, rows, losses)
        if hidden_grad is not None:
            hidden_grad = hidden_grad.new_zeros(len(valid), hidden_grad.shape[1]).index_copy_(0, rows, hidden_grad)
    return losses, hidden_grad, weight_grad


def _mask_invalid_tokens(  # noqa: PLR0917 (as `_losses_and_gradients`)
    hidden: Tensor, weight: Tensor, targets: Tensor, settings: _Settings, loss_grads: Tensor | None, valid: Tensor
) -> _Result:
    """Compute with all tokens and mask the results; selecting the valid (N,) ones would wait for the device."""
    losses, hidden_grad, weight_grad = _loop_over_chunks(
        hidden.to(settings.dtype),
        weight,
        targets.masked_fill(~valid, 0),
        settings,
        loss_grads=loss_grads,
        weight_grad_input=hidden.to(settings.dtype).masked_fill(~valid[:, None], 0),
    )
    if hidden_grad is not None:
        hidden_grad.masked_fill_(~valid[:, None], 0)
    return losses.masked_fill(~valid, 0), hidden_grad, weight_grad


def _loop_over_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    settings: _Settings,
    *,
    loss_grads: Tensor | None,
    weight_grad_input: Tensor,
) -> _Result:
    """Compute `_losses_and_gradients` chunk by chunk, for tokens that all have targets.

    hidden (N,D) is in the compute dtype. weight_grad_input (N,D) replaces hidden in the gradient of the weight.
    """
    tokens, device, acc_dtype = len(hidden), hidden.device, accumulation_dtype(settings.dtype)
    float32_output = supports_float32_output(device)
    first_row = 0 if settings.vocab_shard is None else settings.vocab_shard.first
    weight = weight.to(settings.dtype)
    losses = torch.empty(tokens, dtype=acc_dtype, device=device)
    hidden_grad = None
    if settings.needs_hidden_grad:
        hidden_grad = torch.empty_like(hidden, dtype=acc_dtype if float32_output else settings.dtype)
    # Products with the transposed logits take twice as long as products with the logits, so accumulate the transposed
    # gradient and transpose it once.
    transposed = elements.supports(weight)
    shape = weight.shape[::-1] if transposed else weight.shape
    weight_grad = torch.zeros(shape, dtype=acc_dtype, device=device) if settings.needs_weight_grad else None
    product_buffer = None
    if weight_grad is not None and acc_dtype != settings.dtype and not float32_output:
        product_buffer = torch.empty_like(weight_grad, dtype=settings.dtype)
    step = min(_chunk_rows(hidden), tokens)
    logits_buffer = torch.empty(step, len(weight), dtype=settings.dtype, device=device)
    for start in range(0, tokens, max(step, 1)):
        rows = slice(start, start + step)
        logits = logits_buffer[: tokens - start]
        torch.mm(hidden[rows], weight.t(), out=logits)
        chunk_loss_grads = None if loss_grads is None else loss_grads[rows]
        slopes = finish_logits_(logits, settings.soft_cap, settings.num_ids - first_row)
        losses[rows] = _replace_logits_by_gradient_(logits, targets[rows], settings, chunk_loss_grads)
        if slopes is not None and settings.needs_grad:
            logits.mul_(slopes)
        if hidden_grad is not None:
            matmul_into(logits, weight, hidden_grad[rows])
        if weight_grad is not None:
            inputs = weight_grad_input[rows]
            factors = (inputs.t().contiguous(), logits) if transposed else (logits.t(), inputs)
            add_matmul_(weight_grad, *factors, product_buffer)
    if hidden_grad is not None and settings.vocab_shard is not None:
        hidden_grad = hidden_grad.to(acc_dtype)
        dist.all_reduce(hidden_grad, group=settings.vocab_shard.group)
    if weight_grad is not None and transposed:
        weight_grad = elements.transposed(weight_grad)
    return losses, hidden_grad, weight_grad


def _replace_logits_by_gradient_(
    logits: Tensor, targets: Tensor, settings: _Settings, loss_grads: Tensor | None
) -> Tensor:
    """Return the losses (R,) of logits (R,V). If needed, overwrite the logits with the gradient of the sum of losses
    weighted by loss_grads (R,)."""
    acc_dtype, z, shard = accumulation_dtype(settings.dtype), settings.z_loss_coefficient, settings.vocab_shard
    columns, owned = (targets, None) if shard is None else shard.locate(targets, logits.shape[1])
    row_indices = torch.arange(len(logits), device=logits.device)
    target_logits = logits[row_indices, columns].to(acc_dtype)
    losses, target_grads = [], []
    kernels = softmax_kernels(logits)
    for rows, buffer in _row_blocks(logits, acc_dtype, kernels is not None, one_block=shard is not None):
        log_probs = _softmax_into(buffer, logits[rows], columns[rows], target_logits[rows], kernels)
        nll, factor, log_sum = -log_probs, None, target_logits[rows] - log_probs
        if shard is not None:
            assert owned is not None
            local_log_sum = log_sum
            log_sum, logit = shard.combine(local_log_sum, target_logits.where(owned, 0))
            nll, factor = log_sum - logit, (local_log_sum - log_sum).exp()
        losses.append(nll + z * log_sum.square() if z else nll)
        if not settings.needs_grad:
            continue
        target_grad = torch.expm1(-nll)  # the target's probability minus 1, without cancellation
        if z:
            z_factor = 1 + 2 * z * log_sum
            target_grad = target_grad + (z_factor - 1) * torch.exp(-nll)
            factor = z_factor if factor is None else factor * z_factor
        if loss_grads is not None:
            target_grad = target_grad * loss_grads[rows]
            factor = loss_grads[rows] if factor is None else factor * loss_grads[rows]
        target_grads.append(target_grad)
        _write_probs(buffer, factor, logits[rows], kernels)
    if settings.needs_grad:
        target_grad = torch.cat(target_grads).to(logits.dtype)
        if owned is not None:
            target_grad = torch.where(owned, target_grad, logits[row_indices, columns])
        logits[row_indices, columns] = target_grad
    return torch.cat(losses)


# --------------------------------------------------------------------------------------------- softmax of a block
def _row_blocks(
    logits: Tensor, acc_dtype: torch.dtype, in_place: bool, one_block: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows of logits (R,V), each with a buffer (rows,V) of acc_dtype that fits a CPU's cache.

    Kernels process all rows in place; their buffer holds the logarithms of the softmax's sums (R,).
    """
    rows, vocab_size = logits.shape
    if in_place:
        yield slice(0, rows), logits.new_empty(rows, dtype=acc_dtype)
        return
    block = rows
    if _on_cpu(logits) and not one_block:
        block = min(rows, max(1, torch.get_num_threads() * _BLOCK_BYTES // (4 * vocab_size)))
    buffer = torch.empty(block, vocab_size, dtype=acc_dtype, device=logits.device)
    for start in range(0, rows, block):
        yield slice(start, start + block), buffer[: rows - start]


def _softmax_into(buffer: Tensor, logits: Tensor, columns: Tensor, target_logits: Tensor, kernels: Any) -> Tensor:
    """Write the softmax of logits (r,V) to the buffer, on a GPU its logarithm.

    Returns the log-probabilities at columns (r,). target_logits (r,) are the logits at columns. On a CPU softmax takes
    half as long as exp. kernels: those of `softmax_kernels`, or None.
    """
    if kernels is not None:
        maxima, log_sums = kernels.log_sum_exp(logits)
        torch.add(maxima, log_sums, out=buffer)
        return (target_logits - maxima) - log_sums
    row_indices = torch.arange(len(logits), device=logits.device)
    if not _on_cpu(logits):
        torch.log_softmax(logits, -1, dtype=buffer.dtype, out=buffer)
        return buffer[row_indices, columns]
    torch.softmax(buffer.copy_(logits), -1, out=buffer)
    probs = buffer[row_indices, columns]
    if probs.min() >= _MIN_PROBABILITY:
        return probs.log()
    return target_logits - torch.logsumexp(logits.to(buffer.dtype), -1)


def _write_probs(buffer: Tensor, factor: Tensor | None, out: Tensor, kernels: Any) -> None:
    """Write probabilities times factor (r,) to out (r,V), from the buffer that `_softmax_into` filled."""
    if kernels is not None:
        kernels.to_probs_(out, buffer, factor)
        return
    if not _on_cpu(buffer):
        if factor is None:
            torch.exp(buffer, out=out)
            return
        buffer.exp_()
    out.copy_(buffer if factor is None else buffer.mul_(factor[:, None]))


def _chunk_rows(hidden: Tensor) -> int:
    """Return R. Larger chunks add to the weight's gradient less often; smaller ones keep more of it in a CPU's cache,
    which matters when matrix products are small."""
    if _on_cpu(hidden) and hidden.element_size() > 2:
        return 512
    return 256 if _on_cpu(hidden) and hidden.shape[1] < 512 else LOSS_CHUNK_TOKENS


def _on_cpu(tensor: Tensor) -> bool:
    """Return whether reading values is free, and the cache is smaller than a chunk."""
    return tensor.device.type == "cpu"
