"""Divergences between the next-token distributions of a teacher and a student, with their gradients (--distill-loss).

A divergence is a function of a `Chunk` that returns the value of each token (R,) and its gradient with respect to the
student's logits divided by the temperature (R,V). Probabilities may be split over ranks by columns: every sum over the
vocabulary is a `Chunk.total`.
Legend: R tokens of a chunk, V columns of the logits: the vocabulary, or this rank's shard of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from open_lm.config.registry import DISTILL_LOSSES
from open_lm.kernels.vocab_shard import VocabShard

Result = tuple[Tensor, Tensor]  # values (R,), gradient (R,V)


@dataclass(frozen=True)
class Chunk:
    """The logits of student and teacher for some tokens, both (R,V) float32 and divided by the temperature.

    The first `num_columns` columns belong to ids that both models have; the others must hold the same large negative
    number in both. `num_ids` is the number of such ids over all ranks. `shard` is this rank's shard of the vocabulary.
    """

    student: Tensor
    teacher: Tensor
    num_columns: int
    num_ids: int
    shard: VocabShard | None = None

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of values (R,V) over the vocabulary, (R,)."""
        sums = values.sum(-1)
        if self.shard is not None:
            dist.all_reduce(sums, group=self.shard.group)
        return sums

    @cached_property
    def student_log_probs(self) -> Tensor:
        """(R,V)."""
        return self.student - log_sum_exp(self.student, self.shard)[:, None]

    @cached_property
    def teacher_log_probs(self) -> Tensor:
        """(R,V)."""
        return self.teacher - log_sum_exp(self.teacher, self.shard)[:, None]


def log_sum_exp(logits: Tensor, shard: VocabShard | None) -> Tensor:
    """Return the logarithm of the sum of exp(logits) over the vocabulary: logits (R,V) -> (R,)."""
    log_sums = torch.logsumexp(logits, -1)
    return log_sums if shard is None else shard.combine(log_sums, log_sums)[0]


@DISTILL_LOSSES.register(
    "forward-kl",
    help="KL(teacher || student), which covers all of the teacher's probability",
    uses=("distill_temperature",),
    cached=True,
)
def forward_kl(chunk: Chunk) -> Result:
    """Compute the divergence of Hinton et al. 2015 (https://arxiv.org/abs/1503.02531)."""
    student, teacher = chunk.student_log_probs, chunk.teacher_log_probs
    probs = teacher.exp()
    return chunk.total(probs * (teacher - student)), student.exp() - probs


@DISTILL_LOSSES.register(
    "reverse-kl",
    help="KL(student || teacher), which concentrates on the teacher's most likely tokens",
    uses=("distill_temperature",),
)
def reverse_kl(chunk: Chunk) -> Result:
    """Compute the divergence of Gu et al. 2023 (https://arxiv.org/abs/2306.08543)."""
    probs = chunk.student_log_probs.exp()
    log_ratios = chunk.student_log_probs - chunk.teacher_log_probs
    values = chunk.total(probs * log_ratios)
    return values, probs * (log_ratios - values[:, None])


@DISTILL_LOSSES.register(
    "jsd",
    help="Jensen-Shannon divergence, the mean of both KL divergences from the mixture of the distributions",
    uses=("distill_temperature",),
)
def jensen_shannon(chunk: Chunk) -> Result:
    """Compute the divergence of Agarwal et al. 2023 (https://arxiv.org/abs/2306.13649) with a mixture of halves."""
    student, teacher = chunk.student_log_probs, chunk.teacher_log_probs
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    student_ratios, teacher_ratios = student - mixture, teacher - mixture
    probs = student.exp()
    from_student = chunk.total(probs * student_ratios)
    values = (from_student + chunk.total(teacher.exp() * teacher_ratios)) / 2
    return values, probs * (student_ratios - from_student[:, None]) / 2


@DISTILL_LOSSES.register("mse", help="mean squared difference of the logits")
def mean_squared_error(chunk: Chunk) -> Result:
    """Compute the loss of Kim et al. 2021 (https://arxiv.org/abs/2105.08919)."""
    differences = chunk.student - chunk.teacher
    differences[:, chunk.num_columns :] = 0
    return chunk.total(differences.square()) / chunk.num_ids, differences * (2 / chunk.num_ids)
