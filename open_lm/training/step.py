"""One optimizer step: forward, loss, backward, gradient clipping, update.

The loss of a step is the sum over all valid tokens of all ranks and micro-batches, divided by the number of those
tokens. Neither the number of ranks nor gradient accumulation changes it. Next on the path of a batch:
open_lm.model.transformer. Legend: B sequences of this rank's batch, T sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_lm.config.layout import MeshLayout
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.processes import Runtime, sum_over_ranks
from open_lm.finetune.distillation import Distillation
from open_lm.kernels.sparse_targets import SparseTargets
from open_lm.kernels.threads import limit_threads
from open_lm.model.losses import TokenLoss, batch_loss
from open_lm.monitor.metrics import to_device
from open_lm.optim.build import gradient_norm, step_unless_skipped
from open_lm.parallel.parallelize import gradient_sync, unwrap
from open_lm.training.guard import not_finite


@dataclass(frozen=True)
class StepOptions:
    """Settings of a step. `accum_freq` micro-batches must divide the B sequences of a batch. With `end_of_text_id`,
    attention stays inside the documents that this id ends. `distillation` adds the divergence from a teacher. With
    `reduces_every_micro_batch`, FSDP2 shards the gradients of each micro-batch (see `gradient_sync`)."""

    runtime: Runtime
    layout: MeshLayout
    autocast: Callable[[], AbstractContextManager[object]]
    accum_freq: int = 1
    reduces_every_micro_batch: bool = False
    z_loss_coefficient: float = 0.0
    grad_clip_norm: float | None = None
    log_logit_mean: bool = False
    end_of_text_id: int | None = None
    distillation: Distillation | None = None


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device, equal on all ranks.

    Attributes:
        values: loss and other reported values by name (float).
        grad_norm: gradient norm before clipping (float32).
        skipped: whether the update was skipped (bool).
        valid_tokens: number of tokens with a target, over all ranks (int64).
        samples: number of sequences that hold data, over all ranks (int64).
        counts: the caller's `counts`, summed over all ranks (n,) int64.
    """

    values: dict[str, Tensor]
    grad_norm: Tensor
    skipped: Tensor
    valid_tokens: Tensor
    samples: Tensor
    counts: Tensor


def train_step(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    optimizer: Optimizer,
    options: StepOptions,
    *,
    documents: Tensor | None = None,
    stored: SparseTargets | None = None,
    num_samples: int | None = None,
    counts: Sequence[int] = (),
    scaler: torch.amp.GradScaler | None = None,
    should_skip: Callable[[Tensor, Tensor], Tensor] = not_finite,
    enter_phase: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    """Update `model` once from this rank's inputs and targets, both (B,T) int64 on the device.

    Never waits for the device.

    Args:
        documents: (B,T) numbers of the documents to which attention is limited, if the data mark them.
        stored: the teacher's distributions (B,T,…) of --distill-cache.
        num_samples: sequences that hold data (default: all B).
        counts: integers to sum over ranks together with the step's own counts.
        should_skip: returns whether to skip the update, given the global loss and gradient norm.
        enter_phase: called with the name of each phase when it starts: sums (over ranks, where a rank waits for slower
            ones), forward, backward, optimizer.
    """
    enter_phase("sums")
    layout = options.layout
    batch_size = len(inputs) if num_samples is None else num_samples
    local_counts = to_device([batch_size if layout.contributes_sequences else 0, *counts], inputs.device)
    num_targets = (targets != IGNORE_INDEX).sum().reshape(1) * layout.contributes_sequences
    global_counts = sum_over_ranks(torch.cat([num_targets, local_counts]))
    valid_tokens, samples = global_counts[0], global_counts[1]
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    parts, teachers = micro_documents(documents, options.accum_freq), _micro_teachers(stored, options.accum_freq)
    for micro_inputs, micro_targets, is_last in micro_batches(inputs, targets, options.accum_freq):
        threads = limit_threads(unwrap(model), micro_inputs.numel(), inputs.device)
        with gradient_sync(model, is_last, options.reduces_every_micro_batch), threads:
            enter_phase("forward")
            document_numbers = next(parts)
            token_loss = _token_loss(micro_inputs, micro_targets, document_numbers, next(teachers), options)
            objective, values = _objective(model, micro_inputs, token_loss, document_numbers, valid_tokens, options)
            enter_phase("backward")
            (objective if scaler is None else scaler.scale(objective)).backward()
        totals = {name: totals[name] + value if name in totals else value for name, value in values.items()}
    enter_phase("sums")
    totals = sum_values(totals, layout)
    enter_phase("optimizer")
    if scaler is not None:
        scaler.unscale_(optimizer)
    grad_norm = gradient_norm(model.parameters())
    skipped = should_skip(totals["loss"], grad_norm)
    # scaler.step() would skip overflows only; `should_skip` covers more
    step_unless_skipped(optimizer, skipped, grad_norm, options.grad_clip_norm)
    if scaler is not None:
        scaler.update()
    return StepResult(totals, grad_norm, skipped, valid_tokens, samples, global_counts[2:])


def sum_values(values: dict[str, Tensor], layout: MeshLayout) -> dict[str, Tensor]:
    """Sum float scalars over ranks, counting ranks that share the same tokens once."""
    if not values:
        return {}
    summed = sum_over_ranks(torch.stack([value.float() for value in values.values()]) * layout.contributes_tokens)
    return dict(zip(values, summed.unbind(), strict=True))


def micro_batches(inputs: Tensor, targets: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield `count` equal slices of inputs and targets, and whether each is the last."""
    if len(inputs) % count:
        raise ValueError(f"{len(inputs)} sequences are not divisible by {count} micro-batches")
    slices = zip(inputs.chunk(count), targets.chunk(count), strict=True)
    for number, (micro_inputs, micro_targets) in enumerate(slices, start=1):
        yield micro_inputs, micro_targets, number == count


def micro_documents(documents: Tensor | None, count: int) -> Iterator[Tensor | None]:
    """Yield the documents (B,T) of each of `count` micro-batches; None if there are none."""
    yield from [None] * count if documents is None else documents.chunk(count)


def _micro_teachers(stored: SparseTargets | None, count: int) -> Iterator[SparseTargets | None]:
    """Yield the teacher's distributions (B,T,…) of each of `count` micro-batches; None if there are none."""
    for number in range(count):

        def slice_of(values: Tensor, number: int = number) -> Tensor:
            return values.chunk(count)[number]

        yield None if stored is None else stored.map(slice_of)


def _token_loss(
    inputs: Tensor, targets: Tensor, documents: Tensor | None, stored: SparseTargets | None, options: StepOptions
) -> TokenLoss:
    """Return the loss of a micro-batch: the cross entropy, or that of distillation."""
    logit_means: list[Tensor] | None = [] if options.log_logit_mean else None
    loss = TokenLoss(targets, options.z_loss_coefficient, logit_means=logit_means)
    return loss if options.distillation is None else options.distillation.loss(loss, inputs, documents, stored)


def _objective(  # noqa: PLR0917 - the parts of a micro-batch
    model: nn.Module,
    inputs: Tensor,
    token_loss: TokenLoss,
    documents: Tensor | None,
    valid_tokens: Tensor,
    options: StepOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a micro-batch's contribution to the minimized objective and to the reported values."""
    loss = batch_loss(model, inputs, token_loss, options, documents) / valid_tokens.clamp(min=1)
    ranks = options.layout.gradient_ranks
    weight = 1 / (ranks * options.accum_freq)
    values = {"loss": loss.detach()}
    values |= {name: part / valid_tokens.clamp(min=1) for name, part in token_loss.parts.items()}
    if token_loss.logit_means is not None:
        values["logit_mean"] = token_loss.logit_means[0] * weight
    # DDP and FSDP average gradients over ranks; the loss needs their sum.
    objective = loss * ranks
    auxiliary_loss = getattr(unwrap(model), "auxiliary_loss", lambda: None)()
    if auxiliary_loss is not None:
        objective = objective + auxiliary_loss / options.accum_freq
        values["load_balancing_loss"] = auxiliary_loss.detach() * weight
    return objective, values
