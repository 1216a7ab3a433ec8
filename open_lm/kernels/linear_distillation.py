"""Cross entropy, z-loss and a divergence from a teacher, of a linear layer's outputs, over chunks of tokens.

As in `linear_loss`, the logits of a chunk are computed, replaced by the gradient of the loss and multiplied into the
gradients of hidden states and weight. The teacher's logits are computed from its hidden states for the same chunk, or
its distribution is a few stored ids for each token. Neither model's logits exist for all tokens.

    loss = (1 - w) * cross entropy + w * t^2 * divergence + z-loss

w is the weight of the divergence, t the temperature, by which the logits of the divergence are divided. The factor t^2
keeps the size of gradients (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). The divergence compares the
distributions over the ids that both models have; further rows of either vocabulary are padding. Cross entropy and
z-loss cover all of the student's ids.
Legend: N tokens, R tokens of a chunk, D model width, V rows of the student's weight: the vocabulary, or this rank's
shard of it, M stored ids of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_lm.config.registry import DISTILL_LOSSES
from open_lm.kernels.divergences import Chunk, log_sum_exp
from open_lm.kernels.document_attention import disable_compilation
from open_lm.kernels.logits import finish_logits_, with_bias_column
from open_lm.kernels.products import accumulation_dtype, add_matmul_, matmul_into, supports_float32_output
from open_lm.kernels.sparse_targets import SparseTargets
from open_lm.kernels.vocab_shard import VocabShard

_CHUNK_ELEMENTS = {"cpu": 1 << 22}  # logits of a chunk, of which a few copies exist in float32
_DEFAULT_CHUNK_ELEMENTS = 1 << 25
_MAX_CHUNK_ROWS = 2048
_FLOAT16_GRAD_SCALE = 1024.0  # float16 gradients of logits are scaled up by this factor against underflow


@dataclass
class TeacherHead:
    """The output layer of a teacher, without gradients.

    weight (Vt,Dt) and bias (Vt,) may be DTensors with Shard(0), the sharding of tensor parallelism. `soft_cap` and
    `num_ids` (None for Vt) are those of `linear_cross_entropy`.
    """

    weight: Tensor
    bias: Tensor | None = None
    soft_cap: float | None = None
    num_ids: int | None = None
    _local: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of token ids."""
        return len(self.weight) if self.num_ids is None else self.num_ids

    def logits(self, hidden: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return the logits (R,count) of hidden states (R,Dt) for the rows from `first` on, as `dtype`.

        Rows that the teacher does not have, and padding, have a large negative logit. Collective for DTensors.
        """
        weight, bias = self._rows(first, count)
        logits = F.linear(hidden.to(weight.dtype), weight, bias).to(dtype)
        finish_logits_(logits, self.soft_cap, self.size - first)
        return F.pad(logits, (0, count - logits.shape[1]), value=torch.finfo(dtype).min / 4)

    def _rows(self, first: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return the rows of weight and bias. Those of DTensors, which may be on other ranks, are kept."""
        rows = slice(first, first + count)
        if not isinstance(self.weight, DTensor):
            return self.weight[rows], None if self.bias is None else self.bias[rows]
        if (first, count) not in self._local:
            bias = self.bias.full_tensor() if isinstance(self.bias, DTensor) else self.bias
            weight = self.weight.full_tensor()[rows].clone()
            self._local[first, count] = weight, None if bias is None else bias[rows].clone()
        return self._local[first, count]


@dataclass(frozen=True)
class DenseTargets:
    """The hidden states (N,Dt) of a teacher and its output layer."""

    hidden: Tensor
    head: TeacherHead

    @property
    def num_ids(self) -> int:
        return self.head.size

    def map(self, function: Callable[[Tensor], Tensor]) -> DenseTargets:
        """Apply a function to each tensor with a row per token."""
        return DenseTargets(function(self.hidden), self.head)


Targets = DenseTargets | SparseTargets


@dataclass(frozen=True)
class DistillationSettings:
    """The terms of the loss: divergence (an entry of DISTILL_LOSSES), its weight from 0 to 1, and the temperature."""

    divergence: str = "forward-kl"
    weight: float = 0.5
    temperature: float = 1.0
    z_loss_coefficient: float = 0.0


@dataclass(frozen=True)
class _Head:
    """How the student's logits are computed. `dtype` is that of matrix products, `size` the number of token ids."""

    dtype: torch.dtype
    needs_hidden_grad: bool
    needs_weight_grad: bool
    shard: VocabShard | None
    soft_cap: float | None
    size: int

    @property
    def first(self) -> int:
        return 0 if self.shard is None else self.shard.first


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Targets,
    settings: DistillationSettings,
    *,
    ignore_index: int,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    num_ids: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of the logits hidden @ weight.T + bias, summed over the tokens with a target.

    The gradients are computed in the forward pass. A result can be differentiated once.

    Args:
        hidden, weight, targets, ignore_index, bias, soft_cap, num_ids: as for `linear_cross_entropy`.
        teacher: the teacher's distribution for each of the N tokens.
        settings: the terms of the loss.

    Returns:
        the loss, and without gradients the cross entropy and the divergence (without weight and t^2) that are in it:
        float32 scalars, or float64 for float64 inputs.
    """
    shard = None
    if isinstance(weight, DTensor):
        shard = VocabShard.of(weight)
        weight = weight.to_local()
        bias = bias.to_local() if isinstance(bias, DTensor) else bias
    if bias is not None:
        hidden, weight = with_bias_column(hidden, weight, bias)
    device_type, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    grad_enabled = torch.is_grad_enabled()
    rows = len(weight) if shard is None else shard.vocab_size
    head = _Head(
        dtype=dtype,
        needs_hidden_grad=grad_enabled and hidden.requires_grad,
        needs_weight_grad=grad_enabled and weight.requires_grad,
        shard=shard,
        soft_cap=soft_cap,
        size=rows if num_ids is None else num_ids,
    )
    apply: Any = disable_compilation(_LinearDistillation.apply)
    loss, cross_entropy, divergence = apply(hidden, weight, targets, teacher, settings, head, ignore_index)
    return loss, cross_entropy, divergence


class _LinearDistillation(torch.autograd.Function):
    """An autograd function with the arguments and results of `linear_distillation`."""

    @staticmethod
    def forward(  # noqa: PLR0917 (an autograd function takes no keywords)
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: Targets,
        settings: DistillationSettings,
        head: _Head,
        ignore_index: int,
    ) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            sums, gradients = _sums_and_gradients(hidden, weight, targets, teacher, settings, head, ignore_index)
        ctx.gradients, ctx.dtypes = gradients, (hidden.dtype, weight.dtype)
        loss, cross_entropy, divergence = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss.clone(), cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated before; compute it again to differentiate it again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else g.mul_(grads[0]).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
        return *scaled, None, None, None, None, None


def _sums_and_gradients(  # noqa: PLR0917 (as `_LinearDistillation.forward`)
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Targets,
    settings: DistillationSettings,
    head: _Head,
    ignore_index: int,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Return the loss, cross entropy and divergence (3,), and the gradients of hidden (N,D) and weight (V,D)."""
    tokens, device, acc_dtype = len(hidden), hidden.device, accumulation_dtype(head.dtype)
    valid = targets != ignore_index
    selected = None
    if device.type == "cpu":  # elsewhere, selecting the tokens would wait for the device
        selected = valid.nonzero()[:, 0]
        hidden, targets, valid = hidden[selected], targets[selected], valid[selected]
        teacher = teacher.map(lambda values: values[selected])
    inputs = hidden.to(head.dtype)
    masked_inputs = inputs.masked_fill(~valid[:, None], 0)
    student_weight = weight.to(head.dtype)
    wide_output = supports_float32_output(device)
    scale = _FLOAT16_GRAD_SCALE if head.dtype == torch.float16 else 1.0
    hidden_grad = weight_grad = product_buffer = None
    if head.needs_hidden_grad:
        hidden_grad = torch.empty_like(inputs, dtype=acc_dtype if wide_output else head.dtype)
    if head.needs_weight_grad:
        weight_grad = torch.zeros(weight.shape, dtype=acc_dtype, device=device)
        if acc_dtype != head.dtype and not wide_output:
            product_buffer = torch.empty_like(weight_grad, dtype=head.dtype)
    sums = torch.zeros(3, dtype=acc_dtype, device=device)
    step = _chunk_rows(inputs, len(weight))
    for start in range(0, len(inputs), step):
        rows = slice(start, start + step)
        logits = torch.mm(inputs[rows], student_weight.t()).to(acc_dtype)
        slopes = finish_logits_(logits, head.soft_cap, head.size - head.first)
        ids, chunk = targets[rows].masked_fill(~valid[rows], 0), _rows_of(teacher, rows)
        values, gradient = _values_and_gradient(logits, ids, chunk, settings, head)
        sums += values.masked_fill(~valid[rows], 0).sum(1)
        if slopes is not None:
            gradient.mul_(slopes)
        gradient = gradient.mul_(scale).to(head.dtype)
        if hidden_grad is not None:
            matmul_into(gradient, student_weight, hidden_grad[rows])
        if weight_grad is not None:
            add_matmul_(weight_grad, gradient.t(), masked_inputs[rows], product_buffer)
    if hidden_grad is not None:
        hidden_grad = hidden_grad.to(acc_dtype).masked_fill_(~valid[:, None], 0).div_(scale)
        if head.shard is not None:
            dist.all_reduce(hidden_grad, group=head.shard.group)
        if selected is not None:
            hidden_grad = hidden_grad.new_zeros(tokens, hidden_grad.shape[1]).index_copy_(0, selected, hidden_grad)
    return sums, (hidden_grad, None if weight_grad is None else weight_grad.div_(scale))


def _rows_of(teacher: Targets, rows: slice) -> Targets:
    return teacher.map(lambda values: values[rows])


def _chunk_rows(inputs: Tensor, columns: int) -> int:
    elements = _CHUNK_ELEMENTS.get(inputs.device.type, _DEFAULT_CHUNK_ELEMENTS)
    return min(max(elements // columns, 1), _MAX_CHUNK_ROWS)


def _values_and_gradient(
    logits: Tensor, targets: Tensor, teacher: Targets, settings: DistillationSettings, head: _Head
) -> tuple[Tensor, Tensor]:
    """Return loss, cross entropy and divergence of each token (3,R), and the loss's gradient of the logits (R,V)."""
    share, z, shard = settings.weight, settings.z_loss_coefficient, head.shard
    log_sums = log_sum_exp(logits, shard)
    columns, owned = (targets, None) if shard is None else shard.locate(targets, logits.shape[1])
    target_logits = logits.gather(1, columns[:, None])[:, 0]
    if shard is not None:
        assert owned is not None
        target_logits = target_logits.where(owned, 0)
        dist.all_reduce(target_logits, group=shard.group)
    cross_entropy = log_sums - target_logits
    divergence, gradient = _divergence(logits, teacher, settings, head)
    temperature = temperature_of(settings)
    gradient.mul_(share * temperature)
    probs = torch.exp(logits - log_sums[:, None])
    gradient.addcmul_(probs, (1 - share + 2 * z * log_sums)[:, None])
    target_grad = torch.full_like(target_logits, share - 1)
    gradient.scatter_add_(1, columns[:, None], (target_grad if owned is None else target_grad * owned)[:, None])
    loss = (1 - share) * cross_entropy + share * temperature**2 * divergence + z * log_sums.square()
    return torch.stack((loss, cross_entropy, divergence)), gradient


def temperature_of(settings: DistillationSettings) -> float:
    """Return the temperature, 1 for a divergence that has none."""
    uses = DISTILL_LOSSES.fact(settings.divergence, "uses", ())
    return settings.temperature if "distill_temperature" in uses else 1.0


def _divergence(logits: Tensor, teacher: Targets, settings: DistillationSettings, head: _Head) -> tuple[Tensor, Tensor]:
    """Return the divergence (R,) of the student's logits (R,V), and its gradient of logits / temperature (R,V)."""
    temperature, num_ids = temperature_of(settings), min(head.size, teacher.num_ids)
    masked = torch.finfo(logits.dtype).min / 4
    num_columns = min(max(num_ids - head.first, 0), logits.shape[1])
    student = logits / temperature
    student[:, num_columns:] = masked
    if isinstance(teacher, SparseTargets):
        return _sparse_forward_kl(student, teacher, head)
    teacher_logits = teacher.head.logits(teacher.hidden, head.first, logits.shape[1], logits.dtype)
    teacher_logits = teacher_logits.div_(temperature)
    teacher_logits[:, num_columns:] = masked
    chunk = Chunk(student, teacher_logits, num_columns, num_ids, head.shard)
    values, gradient = DISTILL_LOSSES.get(settings.divergence)(chunk)
    return values, gradient


def _sparse_forward_kl(student: Tensor, teacher: SparseTargets, head: _Head) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) (R,) and its gradient of the student's logits (R,V), for stored ids.

    The weights of an unbiased sample make both unbiased, because both are linear in the weights.
    """
    log_sums, weights = log_sum_exp(student, head.shard), teacher.weights.to(student.dtype)
    columns, owned = teacher.ids, None
    if head.shard is not None:
        columns, owned = head.shard.locate(teacher.ids, student.shape[1])
    log_probs = student.gather(1, columns) - log_sums[:, None]
    local_weights = weights if owned is None else weights * owned
    cross_entropy = -(local_weights * log_probs).sum(1)
    if head.shard is not None:
        dist.all_reduce(cross_entropy, group=head.shard.group)
    gradient = torch.exp(student - log_sums[:, None]).mul_(weights.sum(1, keepdim=True))
    gradient.scatter_add_(1, columns, -local_weights)
    return cross_entropy - teacher.entropies.to(student.dtype), gradient


# ------------------------------------------------------------------------------------------------- full logits
def logits_distillation(
    logits: Tensor, targets: Tensor, teacher: Targets, settings: DistillationSettings, *, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of full logits (N,V), for models that return them; otherwise as `linear_distillation`.

    Copies in float32 exist for one chunk only. The gradient of the logits has their dtype.
    """
    apply: Any = disable_compilation(_LogitsDistillation.apply)
    loss, cross_entropy, divergence = apply(logits, targets, teacher, settings, ignore_index)
    return loss, cross_entropy, divergence


class _LogitsDistillation(torch.autograd.Function):
    """An autograd function with the arguments and results of `logits_distillation`."""

    @staticmethod
    def forward(  # noqa: PLR0917 (an autograd function takes no keywords)
        ctx: Any, logits: Tensor, targets: Tensor, teacher: Targets, settings: DistillationSettings, ignore_index: int
    ) -> Any:
        acc_dtype, columns = accumulation_dtype(logits.dtype), logits.shape[1]
        head = _Head(logits.dtype, False, False, None, None, columns)
        valid, step = targets != ignore_index, _chunk_rows(logits, columns)
        gradients, sums = torch.empty_like(logits), torch.zeros(3, dtype=acc_dtype, device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            for start in range(0, len(logits), step):
                rows = slice(start, start + step)
                ids, chunk = targets[rows].masked_fill(~valid[rows], 0), _rows_of(teacher, rows)
                values, gradient = _values_and_gradient(logits[rows].to(acc_dtype), ids, chunk, settings, head)
                sums += values.masked_fill(~valid[rows], 0).sum(1)
                gradients[rows] = gradient.masked_fill_(~valid[rows, None], 0)
        ctx.save_for_backward(gradients)
        loss, cross_entropy, divergence = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss.clone(), cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * grads[0], None, None, None, None
