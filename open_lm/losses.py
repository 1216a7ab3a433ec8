"""Token losses as sums, so that micro-batches and ranks add up exactly.

Legend: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100


def token_loss(
    logits: Tensor, targets: Tensor, z_loss_coefficient: float = 0.0, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over the valid tokens, and their number.

    The z-loss of a token is the squared logarithm of its softmax's denominator (Chowdhery et al. 2022, section 5,
    https://arxiv.org/abs/2204.02311); it keeps logits from drifting. Like the cross entropy it is a sum over valid
    tokens, so that the loss of a batch does not depend on how it is cut.

    Args:
        logits: (…, V) float, any floating type; computed in float32.
        targets: (…) int64; ignore_index marks a token without a target.
        z_loss_coefficient: weight of the z-loss; 0 leaves it out.

    Returns:
        (loss_sum, num_valid), both float32 scalars on the logits' device. Divide by the number of valid tokens of the
        whole step, over micro-batches and ranks. With no valid token both are 0, and so are the gradients.
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
        ignore_index: target of tokens that do not count.
    """

    def __init__(self, eps: float = 1e-4, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.eps = eps
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (…, V) float, target (…) int64 -> float32 scalar; nan without any valid token, as torch's own."""
        loss_sum, num_valid = token_loss(input, target, self.eps, self.ignore_index)
        return loss_sum / num_valid
