"""The loss of a batch of token ids, for every layout of ranks.

Batch path: training/step.py calls `batch_loss`, which runs the model; the model computes its `TokenLoss` with
kernels/linear_loss.py. Losses are sums over tokens, so that those of micro-batches and ranks add up exactly.

Legend: B sequences of this rank's batch, T sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from open_lm.config.layout import MeshLayout
from open_lm.data.masking import IGNORE_INDEX, document_ids
from open_lm.distributed.context_parallel import context_parallel_mask, gather_sequences, shard_sequences
from open_lm.kernels.linear_loss import linear_cross_entropy


@dataclass(frozen=True)
class TokenLoss:
    """The loss that a model returns instead of logits: cross entropy with the z-loss of `token_loss`.

    Attributes:
        targets: (B,T) int64, IGNORE_INDEX for tokens without a target.
        z_loss_coefficient: weight of the z-loss; 0 turns it off.
        per_token: return the loss of each token, (B,T) float32 with 0 for tokens without a target, instead of the sum,
            a float32 scalar.
        logit_means: a list to which each computation appends the mean of its logits, a detached float32 scalar.
        parts: terms of the summed loss that are reported in addition to it, by name; a computation adds to them.
    """

    targets: Tensor
    z_loss_coefficient: float = 0.0
    per_token: bool = False
    logit_means: list[Tensor] | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)

    def shard(self, layout: MeshLayout) -> TokenLoss:
        """Return the loss of this rank's tokens, for context parallelism."""
        return replace(self, targets=shard_sequences(self.targets, layout))

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        soft_cap: float | None = None,
        num_ids: int | None = None,
    ) -> Tensor:
        """Return the loss of hidden states (B,T,D) with the logits hidden @ weight.T + bias, weight (V,D), bias (V,).

        `linear_cross_entropy` computes it without holding the logits of all tokens; soft_cap and num_ids are its
        arguments. `logit_means` get the mean before soft caps and without bias.
        """
        if self.logit_means is not None:
            self.logit_means.append(logit_mean(hidden, weight))
        losses = linear_cross_entropy(
            hidden.flatten(0, -2),
            weight,
            self.targets.flatten(),
            ignore_index=IGNORE_INDEX,
            z_loss_coefficient=self.z_loss_coefficient,
            per_token=self.per_token,
            bias=bias,
            soft_cap=soft_cap,
            num_ids=num_ids,
        ).float()
        return losses.view_as(self.targets) if self.per_token else losses

    def from_logits(self, logits: Tensor) -> Tensor:
        """Return the loss of logits (B,T,V) of any floating type."""
        if self.logit_means is not None:
            self.logit_means.append(logits.detach().float().mean())
        if not self.per_token:
            return token_loss(logits, self.targets, self.z_loss_coefficient)[0]
        flat_logits, flat_targets = logits.flatten(0, -2).float(), self.targets.flatten()
        losses = F.cross_entropy(flat_logits, flat_targets, ignore_index=IGNORE_INDEX, reduction="none")
        if self.z_loss_coefficient:
            valid = flat_targets != IGNORE_INDEX
            losses = losses + self.z_loss_coefficient * torch.logsumexp(flat_logits, dim=-1).square() * valid
        return losses.view_as(self.targets)


class ForwardOptions(Protocol):
    """The settings of a forward pass.

    Attributes:
        layout: the layout of ranks.
        autocast: a factory of autocast contexts for the compute precision.
        end_of_text_id: the id that ends a document if attention stays within documents, else None.
    """

    @property
    def layout(self) -> MeshLayout: ...
    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]: ...
    @property
    def end_of_text_id(self) -> int | None: ...


def batch_loss(
    model: nn.Module, ids: Tensor, loss: TokenLoss, options: ForwardOptions, documents: Tensor | None = None
) -> Tensor:
    """Return `loss` of the model's predictions for full sequences of ids (B,T).

    documents (B,T) are the numbers of documents to which attention is limited; by default those that
    `options.end_of_text_id` ends.
    With context parallelism the summed loss covers this rank's tokens only; per-token losses cover all tokens, (B,T).
    """
    layout, masks = options.layout, dict[str, Any]()
    if documents is None and options.end_of_text_id is not None:
        documents = document_ids(ids, options.end_of_text_id)
    if layout.context > 1:
        masks["attention_mask"] = context_parallel_mask(layout, ids.shape[1], ids.device, documents)
        ids, loss = shard_sequences(ids, layout), loss.shard(layout)
    elif documents is not None:
        masks["document_ids"] = documents
    with options.autocast():
        result: Tensor = model(ids, loss=loss, **masks)[0]
    return gather_sequences(result, layout) if loss.per_token else result


def logit_mean(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of the logits hidden @ weight.T without computing them.

    hidden (B,T,D), weight (V,D) -> float32 scalar. It is the mean of hidden times the mean of weight. weight may be
    sharded over a mesh.
    """
    row_sum = weight.detach().float().sum(0)
    if isinstance(row_sum, DTensor):
        row_sum = row_sum.full_tensor()
    return hidden.detach().flatten(0, -2).float().mean(0) @ (row_sum / len(weight))


def token_loss(
    logits: Tensor, targets: Tensor, z_loss_coefficient: float = 0.0, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy summed over the valid tokens, and their number.

    The z-loss of a token is the squared logarithm of its softmax's denominator (Chowdhery et al. 2022, section 5,
    https://arxiv.org/abs/2204.02311). It prevents logits from drifting. Like the cross entropy it is a sum over valid
    tokens, so that the loss of a batch does not depend on how the batch is split.

    Args:
        logits: (…, V) of any floating type; computed in float32.
        targets: (…) int64; ignore_index marks a token without a target.
        z_loss_coefficient: weight of the z-loss; 0 turns it off.

    Returns:
        (loss_sum, num_valid), both float32 scalars on the device of the logits. Divide by the number of valid tokens of
        the step, over all micro-batches and ranks. Without valid tokens both are 0, and so are the gradients.
    """
    flat_logits = logits.reshape(-1, logits.shape[-1]).float()
    flat_targets = targets.reshape(-1)
    valid = flat_targets != ignore_index
    loss_sum = F.cross_entropy(flat_logits, flat_targets, ignore_index=ignore_index, reduction="sum")
    if z_loss_coefficient:
        log_denominator = torch.logsumexp(flat_logits, dim=-1)
        loss_sum = loss_sum + z_loss_coefficient * (log_denominator.square() * valid).sum()
    return loss_sum, valid.sum(dtype=torch.float32)


class CrossEntropyLossWithZLoss(nn.Module):
    """`token_loss` averaged over the valid tokens.

    Args:
        eps: weight of the z-loss.
        ignore_index: target of tokens that are excluded.
    """

    def __init__(self, eps: float = 1e-4, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.eps = eps
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Map input (…, V) float, target (…) int64 -> float32 scalar; nan without valid tokens, as in torch."""
        loss_sum, num_valid = token_loss(input, target, self.eps, self.ignore_index)
        return loss_sum / num_valid
