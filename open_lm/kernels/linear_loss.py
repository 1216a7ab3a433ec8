"""The cross entropy of a linear layer's outputs without these: computed with its gradients over chunks of tokens.

Logits of all tokens are most of a small model's memory. Here a chunk's logits are computed, turned into their gradient
in place (softmax less one-hot target) and multiplied into the gradients of hidden states and weight while they are at
hand: they are computed once and never kept, as in Hsu et al. 2024 (https://arxiv.org/abs/2410.10989). Matrix products
run in the compute type, all between them and the sum of the weight's gradient in float32 (float64 of float64).

torch.nn.functional.linear_cross_entropy (torch 2.13) goes about it in the same way but is not used: with options its
bfloat16 sum is off by more than a quarter of itself (3.0 for each of 512 tokens, D 96, V 50432), on a CPU it takes
seven times as long, and it knows neither z-loss nor vocabularies that are spread over ranks.

Legend: N tokens, R tokens of a chunk, D model width, V rows of the weight: the vocabulary, or this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from open_lm.kernels.document_attention import kept_apart
from open_lm.kernels.native import elements

_BLOCK_BYTES = 2**20  # of a float32 block of logits on a CPU, for each thread: with its source half a core's cache
_CAST_ROWS = 2048  # of a weight's gradient: adding them casts into a temporary, which is to stay in the cache
_SMALLEST = 1e-30  # probabilities below are too near to underflow for their logarithm
_HALF_GAIN = 1024.0  # float16 gradients of logits are held that much larger, against underflow


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    z_loss_coefficient: float = 0.0,
    per_token: bool = False,
) -> Tensor:
    """The cross entropy of the logits hidden @ weight.T, with the z-loss of `losses.token_loss`.

    The gradients of the sum are computed with it, where they are needed; those of single tokens' losses in the backward
    pass from the logits anew. A result can be differentiated once.

    Args:
        hidden: (N,D) float. Under autocast matrix products run in its type, else in that of hidden and weight.
        weight: (V,D) float, or a DTensor Shard(0) of it over a one-dimensional mesh. Then hidden and targets have to be
            the same on all its ranks, and each computes with its own rows; loss and hidden's gradient are the same
            bits on all.
        targets: (N,) int64; ignore_index marks a token without a target.
        z_loss_coefficient: weight of the z-loss; 0 leaves it out.
        per_token: give each token's loss (N,), 0 without a target, in place of their sum.

    Returns:
        float32, of float64 inputs float64.

    Raises:
        ValueError: a weight that is spread in another way. IndexError: a target beyond the vocabulary, on a CPU.
    """
    part = None
    if isinstance(weight, DTensor):
        part = _part_of(weight)
        weight = weight.to_local()
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    wanted = torch.is_grad_enabled()
    task = _Task(
        dtype=dtype,
        ignore_index=ignore_index,
        z_loss_coefficient=z_loss_coefficient,
        per_token=per_token,
        wants_hidden=wanted and hidden.requires_grad,
        wants_weight=wanted and weight.requires_grad,
        part=part,
    )
    loss: Tensor = kept_apart(_LinearCrossEntropy.apply)(hidden, weight, targets, task)
    return loss


@dataclass(frozen=True)
class _Part:
    """Which rows of the vocabulary, of `total`, this rank of `group` holds: those from `first` on."""

    group: dist.ProcessGroup
    first: int
    total: int

    def locate(self, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Columns (R,) among this rank's `rows`, and whether they are there (R,) bool; any column where not."""
        columns = targets - self.first
        return columns.clamp(0, rows - 1), (columns >= 0) & (columns < rows)

    def combine(self, log_sums: Tensor, own_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Over all ranks: the logarithms (R,) of the sums whose own parts are given so, and the sum of own_logits."""
        peak = log_sums.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, self.group)
        both = torch.stack([(log_sums - peak).exp(), own_logits])
        dist.all_reduce(both, group=self.group)
        return peak + both[0].log(), both[1]


def _part_of(weight: DTensor) -> _Part:
    mesh, total = weight.device_mesh, weight.shape[0]
    if mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ValueError(f"the weight is spread as {weight.placements} over {mesh}, expected (Shard(0),) over one dim")
    each = -(-total // mesh.size())  # as torch.chunk cuts
    if each * (mesh.size() - 1) >= total:
        raise ValueError(f"a vocabulary of {total} leaves some of {mesh.size()} ranks without a row: use fewer ranks")
    return _Part(mesh.get_group(), each * mesh.get_local_rank(), total)


@dataclass(frozen=True)
class _Task:
    """What is computed; `dtype` is that of matrix products, wants_… whether the gradient is needed."""

    dtype: torch.dtype
    ignore_index: int
    z_loss_coefficient: float
    per_token: bool
    wants_hidden: bool
    wants_weight: bool
    part: _Part | None


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (N,D), weight (V,D), targets (N,) and the task -> the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, task: _Task) -> Any:
        ctx.task = task
        if task.per_token:
            ctx.save_for_backward(hidden, weight, targets)
            return _losses(hidden, weight, targets, replace(task, wants_hidden=False, wants_weight=False))[0]
        ctx.gain = _HALF_GAIN if task.dtype == torch.float16 and _has_wide_products(hidden.device) else 1.0
        gains = None if ctx.gain == 1 else torch.full(targets.shape, ctx.gain, device=hidden.device)
        losses, *ctx.gradients = _losses(hidden, weight, targets, task, gains)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        if ctx.task.per_token:
            hidden, weight, targets = ctx.saved_tensors
            _, *gradients = _losses(hidden, weight, targets, ctx.task, outer[0])
            dtypes: tuple[torch.dtype, ...] = (hidden.dtype, weight.dtype)
        else:
            if ctx.gradients is None:
                raise RuntimeError("this loss has been differentiated before: compute it again for another time")
            # Scaled in place and held by nobody else, so that the weight's becomes its .grad without a copy.
            gradients, ctx.gradients = [g if g is None else g.mul_(outer[0] / ctx.gain) for g in ctx.gradients], None
            dtypes = ctx.dtypes
        cast = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
        return *cast, None, None


def _losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, task: _Task, gains: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (N,); as wanted, gradients of their sum weighted by gains (N,): hidden's (N,D) and the weight's (V,D)."""
    valid = targets != task.ignore_index
    if not _on_cpu(hidden):  # which tokens are valid is not known without waiting for the device
        keys = hidden.to(task.dtype).masked_fill(~valid[:, None], 0)  # what they add to the weight's gradient
        targets = targets.masked_fill(~valid, 0)
        losses, of_hidden, of_weight = _over_chunks(
            hidden.to(task.dtype), weight, targets, task, keys=keys, gains=gains
        )
        if of_hidden is not None:
            of_hidden.masked_fill_(~valid[:, None], 0)
        return losses.masked_fill(~valid, 0), of_hidden, of_weight
    rows = valid.nonzero().squeeze(1)
    if len(rows) < len(valid):
        hidden, targets, gains = hidden[rows], targets[rows], None if gains is None else gains[rows]
    hidden = hidden.to(task.dtype)
    vocabulary = len(weight) if task.part is None else task.part.total
    if len(rows) and not 0 <= targets.min() <= targets.max() < vocabulary:
        raise IndexError(f"targets reach from {targets.min()} to {targets.max()}, expected 0 to {vocabulary - 1}")
    losses, of_hidden, of_weight = _over_chunks(hidden, weight, targets, task, keys=hidden, gains=gains)
    if len(rows) < len(valid):
        losses = losses.new_zeros(len(valid)).index_copy_(0, rows, losses)
        if of_hidden is not None:
            of_hidden = of_hidden.new_zeros(len(valid), of_hidden.shape[1]).index_copy_(0, rows, of_hidden)
    return losses, of_hidden, of_weight


def _over_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, task: _Task, *, keys: Tensor, gains: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`_losses` of hidden (N,D) in the compute type, all with targets; the weight's gradient is that of keys (N,D)."""
    tokens, device, wide = len(hidden), hidden.device, _wide(task.dtype)
    shared = _has_wide_products(device)
    weight = weight.to(task.dtype)
    losses = torch.empty(tokens, dtype=wide, device=device)
    of_hidden = torch.empty_like(hidden, dtype=wide if shared else task.dtype) if task.wants_hidden else None
    # Products with the logits' transpose take twice the time of the transpose of products with the logits.
    turned = elements.takes(weight)
    shape = weight.shape[::-1] if turned else weight.shape
    of_weight = torch.zeros(shape, dtype=wide, device=device) if task.wants_weight else None
    spare = None
    if of_weight is not None and wide != task.dtype and not shared:
        spare = torch.empty_like(of_weight, dtype=task.dtype)
    step = min(_chunk_rows(hidden), tokens)
    logits_of_chunk = torch.empty(step, len(weight), dtype=task.dtype, device=device)
    for start in range(0, tokens, max(step, 1)):
        rows = slice(start, start + step)
        logits = logits_of_chunk[: tokens - start]
        torch.mm(hidden[rows], weight.t(), out=logits)
        losses[rows] = _differentiate_(logits, targets[rows], task, None if gains is None else gains[rows])
        if of_hidden is not None:
            _product(logits, weight, of_hidden[rows])
        if of_weight is not None:
            factors = (keys[rows].t().contiguous(), logits) if turned else (logits.t(), keys[rows])
            _add_product_(of_weight, *factors, spare)
    if of_hidden is not None and task.part is not None:
        of_hidden = of_hidden.to(wide)
        dist.all_reduce(of_hidden, group=task.part.group)
    if of_weight is not None and turned:
        of_weight = elements.transposed(of_weight)
    return losses, of_hidden, of_weight


def _differentiate_(logits: Tensor, targets: Tensor, task: _Task, gains: Tensor | None) -> Tensor:
    """Turn logits (R,V), if wanted, into the gradient of their losses' sum weighted by gains (R,); losses (R,)."""
    wide, z, wanted = _wide(task.dtype), task.z_loss_coefficient, task.wants_hidden or task.wants_weight
    columns, owned = (targets, None) if task.part is None else task.part.locate(targets, logits.shape[1])
    places = torch.arange(len(logits), device=logits.device)
    at_columns = logits[places, columns].to(wide)
    losses, at_targets = [], []
    for rows, work in _blocks(logits, wide, whole=task.part is not None):
        log_shares = _softmax(logits[rows], work, columns[rows], at_columns[rows])
        surprise, factor, log_sum = -log_shares, None, at_columns[rows] - log_shares
        if task.part is not None:
            assert owned is not None
            own_sum = log_sum
            log_sum, logit = task.part.combine(own_sum, at_columns.where(owned, 0))
            surprise, factor = log_sum - logit, (own_sum - log_sum).exp()
        losses.append(surprise + z * log_sum.square() if z else surprise)
        if not wanted:
            continue
        at_target = torch.expm1(-surprise)  # the target's share less one, without cancellation
        if z:
            slope = 1 + 2 * z * log_sum
            at_target = at_target + (slope - 1) * torch.exp(-surprise)
            factor = slope if factor is None else factor * slope
        if gains is not None:
            at_target = at_target * gains[rows]
            factor = gains[rows] if factor is None else factor * gains[rows]
        at_targets.append(at_target)
        _store_shares(work, factor, logits[rows])
    if wanted:
        target_gradient = torch.cat(at_targets).to(logits.dtype)
        if owned is not None:
            target_gradient = torch.where(owned, target_gradient, logits[places, columns])
        logits[places, columns] = target_gradient
    return torch.cat(losses)


def _blocks(logits: Tensor, wide: torch.dtype, whole: bool) -> Iterator[tuple[slice, Tensor]]:
    """Rows of logits (R,V) and a place (rows,V) of the wide type to work in: on a CPU as many as stay in its cache.
    Kernels of our own take all rows and work in the logits; their place holds the logarithms of sums (R,)."""
    rows, vocabulary = logits.shape
    if elements.takes(logits):
        yield slice(0, rows), logits.new_empty(rows, dtype=wide)
        return
    block = rows
    if _on_cpu(logits) and not whole:
        block = min(rows, max(1, torch.get_num_threads() * _BLOCK_BYTES // (4 * vocabulary)))
    work = torch.empty(block, vocabulary, dtype=wide, device=logits.device)
    for start in range(0, rows, block):
        yield slice(start, start + block), work[: rows - start]


def _softmax(logits: Tensor, work: Tensor, columns: Tensor, at_columns: Tensor) -> Tensor:
    """Fill work (r,V) with the shares of logits (r,V), on a GPU their logarithms; return logarithms at columns (r,).

    at_columns (r,): the logits at columns. A CPU's softmax takes half the time of its exp.
    """
    if work.dim() == 1:
        peaks, rests = elements.log_sums(logits)
        torch.add(peaks, rests, out=work)
        return (at_columns - peaks) - rests
    places = torch.arange(len(logits), device=logits.device)
    if not _on_cpu(logits):
        torch.log_softmax(logits, -1, dtype=work.dtype, out=work)
        return work[places, columns]
    torch.softmax(work.copy_(logits), -1, out=work)
    shares = work[places, columns]
    if shares.min() >= _SMALLEST:
        return shares.log()
    return at_columns - torch.logsumexp(logits.to(work.dtype), -1)


def _store_shares(work: Tensor, factor: Tensor | None, out: Tensor) -> None:
    """out (r,V) = shares * factor (r,), shares as `_softmax` left them in work."""
    if work.dim() == 1:
        elements.to_shares_(out, work, factor)
        return
    if not _on_cpu(work):
        if factor is None:
            torch.exp(work, out=out)
            return
        work.exp_()
    out.copy_(work if factor is None else work.mul_(factor[:, None]))


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b; out may be float32 where `_has_wide_products`."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, spare: Tensor | None) -> None:
    """total += a @ b. spare: of total's shape and a's type, where total is wider and the device has no such product."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif spare is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif elements.takes(torch.mm(a, b, out=spare)):
        elements.add_(total, spare)
    else:
        for some, more in zip(total.split(_CAST_ROWS), spare.split(_CAST_ROWS), strict=True):
            some.add_(more)


def _chunk_rows(hidden: Tensor) -> int:
    """R. A larger chunk adds to the weight's gradient less often; on a CPU, where products are small, a smaller one
    finds more of it in the cache."""
    if _on_cpu(hidden) and hidden.element_size() > 2:
        return 512
    return 256 if _on_cpu(hidden) and hidden.shape[1] < 512 else 2048


def _on_cpu(tensor: Tensor) -> bool:
    """Whether to look at results costs nothing, and the cache holds less than a chunk."""
    return tensor.device.type == "cpu"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_wide_products(device: torch.device) -> bool:
    """Whether products of half precision can be added to float32 as they are computed: CUDA from torch 2.10 on."""
    return device.type == "cuda" and torch.torch_version.TorchVersion(torch.__version__) >= "2.10"
