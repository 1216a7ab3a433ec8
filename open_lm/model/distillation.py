"""The loss of a student that learns from a teacher, in place of `TokenLoss`.

The teacher's forward pass with `HiddenStates` as its loss returns its hidden states and its output layer; the student's
loss, `DistillationLoss`, computes both models' logits chunk by chunk.
Legend: B sequences of this rank's batch, T sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from open_lm.config.layout import MeshLayout
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.context_parallel import shard_sequences
from open_lm.kernels.linear_distillation import (
    DenseTargets,
    DistillationSettings,
    Targets,
    TeacherHead,
    linear_distillation,
    logits_distillation,
)
from open_lm.model.losses import TokenLoss, logit_mean


@dataclass(frozen=True)
class HiddenStates(TokenLoss):
    """A loss of 0 that appends the model's hidden states (B,T,D) and its output layer to `results`."""

    results: list[DenseTargets] = field(default_factory=list)

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        soft_cap: float | None = None,
        num_ids: int | None = None,
    ) -> Tensor:
        """Append the arguments; see `TokenLoss.from_hidden`."""
        self.results.append(DenseTargets(hidden, TeacherHead(weight, bias, soft_cap, num_ids)))
        return hidden.new_zeros(())


@dataclass(frozen=True)
class DistillationLoss(TokenLoss):
    """Cross entropy, z-loss and a divergence from a teacher, summed over the tokens with a target.

    `parts` gets the summed cross entropy and divergence, without weights.

    Attributes:
        teacher: the teacher's distributions, whose tensors start with (B,T). Those of a live teacher cover this rank's
            tokens only, as its forward pass with context parallelism does.
        settings: the terms of the loss.
    """

    teacher: Targets = field(kw_only=True)
    settings: DistillationSettings = field(kw_only=True)

    def shard(self, layout: MeshLayout) -> DistillationLoss:
        """Return the loss of this rank's tokens, for context parallelism."""
        teacher = self.teacher
        if not isinstance(teacher, DenseTargets):
            teacher = teacher.map(lambda values: shard_sequences(values, layout))
        return replace(self, targets=shard_sequences(self.targets, layout), teacher=teacher)

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        soft_cap: float | None = None,
        num_ids: int | None = None,
    ) -> Tensor:
        """Return the loss; see `TokenLoss.from_hidden`."""
        if self.logit_means is not None:
            self.logit_means.append(logit_mean(hidden, weight))
        return self._with_parts(
            *linear_distillation(
                hidden.flatten(0, -2),
                weight,
                self.targets.flatten(),
                self._flat_teacher(),
                self.settings,
                ignore_index=IGNORE_INDEX,
                bias=bias,
                soft_cap=soft_cap,
                num_ids=num_ids,
            )
        )

    def from_logits(self, logits: Tensor) -> Tensor:
        """Return the loss of logits (B,T,V) of any floating type."""
        if self.logit_means is not None:
            self.logit_means.append(logits.detach().float().mean())
        flat = logits.flatten(0, -2), self.targets.flatten(), self._flat_teacher()
        return self._with_parts(*logits_distillation(*flat, self.settings, ignore_index=IGNORE_INDEX))

    def _flat_teacher(self) -> Targets:
        return self.teacher.map(lambda values: values.flatten(0, 1))

    def _with_parts(self, loss: Tensor, cross_entropy: Tensor, divergence: Tensor) -> Tensor:
        """Add to the parts of the loss, and return it."""
        for name, value in (("ce_loss", cross_entropy), ("distill_loss", divergence)):
            self.parts[name] = self.parts[name] + value if name in self.parts else value
        return loss.float()
