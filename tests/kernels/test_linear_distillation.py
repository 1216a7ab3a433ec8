"""The chunked loss of distillation compared with a plain loss of all logits."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_processes import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from open_lm.config.registry import DISTILL_LOSSES
from open_lm.data.masking import IGNORE_INDEX
from open_lm.kernels import linear_distillation
from open_lm.kernels.linear_distillation import (
    DenseTargets,
    DistillationSettings,
    SparseTargets,
    TeacherHead,
)

LOSSES = ("forward-kl", "reverse-kl", "jsd", "mse")


def problem(dtype: torch.dtype = torch.float32, vocab: int = 53, teacher_vocab: int = 53, **head: Any) -> Any:
    """Return hidden (N,D), weight (V,D), targets (N,) and a teacher; every fifth token has no target."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(90, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 8, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(min(vocab, teacher_vocab, 50), (90,), generator=generator)
    targets[::5] = IGNORE_INDEX
    teacher_weight = torch.randn(teacher_vocab, 6, generator=generator).to(dtype)
    teacher = DenseTargets(torch.randn(90, 6, generator=generator).to(dtype), TeacherHead(teacher_weight, **head))
    return hidden, weight, targets, teacher


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def divergence(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence (N,) of logits (N,K), by torch's own functions where it has them."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if name == "forward-kl":
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if name == "reverse-kl":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if name == "jsd":
        log_m = ((log_q.exp() + log_p.exp()) / 2).log()
        kl = [F.kl_div(log_m, log_x, reduction="none", log_target=True).sum(-1) for log_x in (log_p, log_q)]
        return (kl[0] + kl[1]) / 2
    return F.mse_loss(student, teacher, reduction="none").mean(-1)


def reference(  # noqa: PLR0917
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: DenseTargets,
    settings: DistillationSettings,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    num_ids: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `linear_distillation` does, from all logits."""
    logits = capped(F.linear(hidden, weight, bias), soft_cap)[:, :num_ids]
    head = teacher.head
    teacher_logits = capped(F.linear(teacher.hidden, head.weight, head.bias), head.soft_cap)[:, : head.size]
    valid = targets != IGNORE_INDEX
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    ids, t = min(logits.shape[1], head.size), linear_distillation.temperature_of(settings)
    values = divergence(settings.divergence, logits[:, :ids] / t, teacher_logits[:, :ids] / t) * valid
    z = settings.z_loss_coefficient * torch.logsumexp(logits, -1).square() * valid
    loss = (1 - settings.weight) * cross_entropy + settings.weight * t**2 * values + z
    return loss.sum(), cross_entropy.sum(), values.sum()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of 32 tokens, the last of which is not full."""
    monkeypatch.setattr(linear_distillation, "_chunk_rows", lambda inputs, columns: 32)


def chunked(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return linear_distillation.linear_distillation(*args, ignore_index=IGNORE_INDEX, **options)


def assert_equal_losses(problem: Any, settings: DistillationSettings, tolerance: float = 1e-6, **head: Any) -> None:
    hidden, weight, *_ = problem
    found, expected = chunked(*problem, settings, **head), reference(*problem, settings, **head)
    for value, expected_value in zip(found, expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=tolerance, atol=1e-4 * tolerance)
    assert found[0].requires_grad and not found[1].requires_grad and not found[2].requires_grad
    inputs = (hidden, weight, *([head["bias"]] if "bias" in head else []))
    pairs = zip(torch.autograd.grad(3 * found[0], inputs), torch.autograd.grad(3 * expected[0], inputs), strict=True)
    for gradient, expected_gradient in pairs:
        scale = expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("loss", LOSSES)
def test_full_logits_give_the_same_loss(loss: str) -> None:
    hidden, weight, targets, teacher = problem(torch.float64, 53, 60)
    settings = DistillationSettings(loss, 0.5, 2.0, 1e-2)
    logits = F.linear(hidden, weight)
    function = linear_distillation.logits_distillation
    found = function(logits, targets, teacher, settings, ignore_index=IGNORE_INDEX)
    expected = chunked(hidden, weight, targets, teacher, settings)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(3 * sums[0], (hidden, weight)) for sums in (found, expected))
    torch.testing.assert_close(*gradients)


class _LargestTensor(TorchDispatchMode):
    """Record the largest number of elements of a tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self.elements = max(self.elements, value.numel() if isinstance(value, Tensor) else 0)
        return result


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_exist_for_one_chunk_only(loss: str) -> None:
    hidden, weight, targets, teacher = problem()
    with _LargestTensor() as largest:
        total = chunked(hidden, weight, targets, teacher, DistillationSettings(loss, z_loss_coefficient=1e-2))[0]
        torch.autograd.backward(total)
    assert largest.elements <= 32 * 53  # a chunk of 32 tokens; 90 tokens have 4,770 logits


def test_every_registered_loss_is_compared() -> None:
    assert set(DISTILL_LOSSES.names()) == set(LOSSES)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_equals_the_loss_of_all_logits(loss: str, temperature: float, weight: float) -> None:
    settings = DistillationSettings(loss, weight, temperature, z_loss_coefficient=1e-2)
    assert_equal_losses(problem(), settings, 2e-6)
    assert_equal_losses(problem(torch.float64), settings, 1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(64, 53), (53, 64)])
def test_vocabularies_with_other_padding_are_compared_over_the_ids_of_both(
    loss: str, vocab: int, teacher_vocab: int
) -> None:
    settings = DistillationSettings(loss, 0.5, 2.0, 1e-2)
    assert_equal_losses(problem(torch.float64, vocab, teacher_vocab), settings, 1e-12)
    padded = problem(torch.float64, vocab, teacher_vocab, num_ids=50, soft_cap=3.0)
    assert_equal_losses(padded, settings, 1e-12, soft_cap=2.0, num_ids=52)


@pytest.mark.parametrize("loss", LOSSES)
def test_biases_of_both_heads(loss: str) -> None:
    bias = torch.linspace(-1, 1, 53, dtype=torch.float64).requires_grad_()
    biased = problem(torch.float64, bias=torch.linspace(2, -2, 53, dtype=torch.float64))
    assert_equal_losses(biased, DistillationSettings(loss, 0.5), 1e-12, bias=bias)


def test_a_weight_of_zero_is_the_plain_loss() -> None:
    hidden, weight, targets, teacher = problem(torch.float64)
    loss, cross_entropy, _ = chunked(hidden, weight, targets, teacher, DistillationSettings(weight=0.0))
    expected = F.cross_entropy(F.linear(hidden, weight), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(cross_entropy, expected)


def test_no_token_with_a_target_gives_zero() -> None:
    hidden, weight, targets, teacher = problem()
    results = chunked(hidden, weight, torch.full_like(targets, IGNORE_INDEX), teacher, DistillationSettings())
    assert [value.item() for value in results] == [0, 0, 0]
    assert not any(g.any() for g in torch.autograd.grad(results[0], (hidden, weight)))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_close_to_float32(autocast: bool) -> None:
    hidden, weight, targets, teacher = problem(torch.float32 if autocast else torch.bfloat16)
    settings = DistillationSettings("forward-kl", 0.5, 2.0)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    head = TeacherHead(teacher.head.weight.float())
    expected = reference(*exact, targets, DenseTargets(teacher.hidden.float(), head), settings)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = chunked(hidden, weight, targets, teacher, settings)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    pairs = zip(torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(expected, exact), strict=True)
    for gradient, expected_gradient in pairs:
        error = (gradient.float() - expected_gradient).norm() / expected_gradient.norm()
        assert error < 1e-2


def test_all_ids_of_a_distribution_give_the_loss_of_its_logits() -> None:
    hidden, weight, targets, teacher = problem(torch.float64)
    settings = DistillationSettings("forward-kl", 0.7, 2.0, 1e-2)
    log_probs = (F.linear(teacher.hidden, teacher.head.weight) / 2).log_softmax(-1)
    ids = torch.randperm(53).expand(90, 53)
    weights, entropies = log_probs.gather(1, ids).exp(), -(log_probs.exp() * log_probs).sum(-1)
    sparse = SparseTargets(ids, weights, entropies, 53)
    results = [chunked(hidden, weight, targets, target, settings) for target in (teacher, sparse)]
    torch.testing.assert_close(results[1], results[0])
    gradients = [torch.autograd.grad(result[0], (hidden, weight)) for result in results]
    torch.testing.assert_close(gradients[1], gradients[0])


def over_two_ranks(rank: int, folder: Path) -> None:
    """Compare a vocabulary of 53 rows on two ranks with one on a single rank, for teachers of several sizes."""
    mesh = init_device_mesh("cpu", (2,))
    for loss, teacher_vocab in product(LOSSES, (53, 60, 20)):
        hidden, weight, targets, teacher = problem(torch.float64, 53, teacher_vocab)
        settings = DistillationSettings(loss, 0.5, 2.0, 1e-2)
        split = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
        ids = torch.arange(90 * 5).view(90, 5) * 7 % 20
        sparse = SparseTargets(ids, torch.full((90, 5), 0.2), torch.zeros(90), 20)
        dense = DenseTargets(teacher.hidden, TeacherHead(distribute_tensor(teacher.head.weight, mesh, [Shard(0)])))
        for targets_of_ranks, targets_of_one in ((dense, teacher), (sparse, sparse)):
            found = chunked(hidden, split, targets, targets_of_ranks, settings, soft_cap=3.0)
            expected = chunked(hidden, weight, targets, targets_of_one, settings, soft_cap=3.0)
            torch.testing.assert_close(found, expected)
            hidden_grad, weight_grad = torch.autograd.grad(found[0], (hidden, split))
            full_grad = weight_grad.full_tensor()  # type: ignore[attr-defined]
            gradients = torch.autograd.grad(expected[0], (hidden, weight))
            torch.testing.assert_close((hidden_grad, full_grad), gradients)


@pytest.mark.processes
def test_a_vocabulary_over_two_ranks_gives_the_same_loss(tmp_path: Path) -> None:
    on_ranks(over_two_ranks, tmp_path)
