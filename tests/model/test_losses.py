"""Token losses: sums over valid tokens that add up over micro-batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from open_lm.data.masking import IGNORE_INDEX
from open_lm.model.losses import CrossEntropyLossWithZLoss, token_loss


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 9, 17, generator=generator) * 3
    targets = torch.randint(17, (4, 9), generator=generator)
    targets[0, :4] = IGNORE_INDEX
    targets[2] = IGNORE_INDEX
    return logits, targets


def test_mean_equals_cross_entropy(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = batch
    loss_sum, num_valid = token_loss(logits, targets)
    assert (loss_sum.dtype, num_valid.dtype, num_valid.item()) == (torch.float32, torch.float32, 4 * 9 - 13)
    torch.testing.assert_close(loss_sum / num_valid, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_z_loss_includes_only_valid_tokens(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = batch
    z = [
        torch.log(torch.exp(logits[b, t]).sum()).item() ** 2
        for b in range(4)
        for t in range(9)
        if targets[b, t] != IGNORE_INDEX
    ]
    plain, _ = token_loss(logits, targets)
    with_z, _ = token_loss(logits, targets, z_loss_coefficient=0.1)
    assert (with_z - plain).item() == pytest.approx(0.1 * sum(z), rel=1e-5)


def test_losses_and_gradients_of_a_split_batch_add_up(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = batch
    logits = logits.requires_grad_()
    full, count = token_loss(logits, targets, 1e-2)
    (expected,) = torch.autograd.grad(full / count, logits)
    parts = [token_loss(logits[i : i + 1], targets[i : i + 1], 1e-2) for i in range(4)]
    total = torch.stack([loss for loss, _ in parts]).sum() / torch.stack([n for _, n in parts]).sum()
    torch.testing.assert_close(total, full / count)
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], expected)


def test_loss_and_gradients_are_zero_without_valid_tokens() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    loss_sum, num_valid = token_loss(logits, torch.full((2, 5), IGNORE_INDEX), 0.1)
    loss_sum.backward()
    assert loss_sum.item() == num_valid.item() == 0
    assert logits.grad is not None and not logits.grad.any()


def test_half_precision_is_computed_in_float32(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = batch
    half, _ = token_loss(logits.bfloat16(), targets)
    exact, _ = token_loss(logits.bfloat16().float(), targets)
    assert half.item() == exact.item()


def test_module_averages_over_valid_tokens(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = batch
    loss_sum, num_valid = token_loss(logits, targets, 1e-4)
    assert CrossEntropyLossWithZLoss()(logits, targets).item() == (loss_sum / num_valid).item()
    plain = CrossEntropyLossWithZLoss(eps=0.0)(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(plain, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
