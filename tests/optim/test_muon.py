"""Muon: its directions, its updates compared with a reference and with torch.optim.Muon, and its parameter groups."""

from __future__ import annotations

import optim_worker
import pytest
import torch
from torch import Tensor, nn

from open_lm.config.sections import OptimConfig
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.build import build_optimizer, step_unless_skipped
from open_lm.optim.muon import Muon, orthogonalize

SHAPE = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 31, "seq_len": 12, "moe_freq": 2, "moe_num_experts": 3}


def reference_muon(param: Tensor, grads: list[Tensor], lr: float, wd: float, beta: float = 0.95) -> Tensor:
    """Update one matrix in float64, with the exact polar factor from an SVD instead of the iteration."""
    x, momentum = param.double(), torch.zeros_like(param, dtype=torch.float64)
    for grad in grads:
        momentum = beta * momentum + (1 - beta) * grad
        u, _, vh = torch.linalg.svd((1 - beta) * grad + beta * momentum, full_matrices=False)
        x = (1 - lr * wd) * x - lr * 0.2 * max(x.shape) ** 0.5 * (u @ vh)
    return x


@pytest.mark.parametrize("size", [(4, 4), (5, 12), (40, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_become_about_one(size: tuple[int, int], dtype: torch.dtype) -> None:
    """The singular vectors do not change: the result is U S' V^T with the U and V of the matrix, up to rounding."""
    matrices = (
        torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    )
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonalize(matrices.to(dtype)).float() @ vh.mT
    values = rotated.diagonal(dim1=-2, dim2=-1)
    large = s / s.square().sum(-1, keepdim=True).sqrt() > 0.01
    assert large.float().mean() > 0.8
    assert values[large].min() > 0.65 and values.max() < 1.25
    assert (rotated - torch.diag_embed(values)).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


def test_zero_matrices_remain_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def test_updates_agree_with_the_reference() -> None:
    """Fused matrices are treated separately; size and direction of each update agree with the exact polar factor."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"square": ((8, 8), 1), "tall": ((24, 8), 1), "fused": ((24, 8), 3), "experts": ((2, 8, 20), 1)}
    params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, (shape, _) in shapes.items()}
    parts = {params[name]: n for name, (_, n) in shapes.items()}
    before = {name: param.detach().clone() for name, param in params.items()}
    grads = {name: [torch.randn(p.shape, generator=generator) for _ in range(3)] for name, p in params.items()}
    groups = [{"params": list(params.values())}]
    optimizer = Muon(groups, [], parts=parts, lr=0.1, weight_decay=0.5, dtype=torch.float32)
    for step in range(3):
        for name, param in params.items():
            param.grad = grads[name][step].clone()
        optimizer.step()
    for name, param in params.items():

        def matrices(tensor: Tensor, n: int = shapes[name][1]) -> list[Tensor]:
            return list(tensor.unbind()) if tensor.dim() == 3 else list(tensor.chunk(n))

        for index, (after, start) in enumerate(zip(matrices(param.detach()), matrices(before[name]), strict=True)):
            exact = reference_muon(start, [matrices(grad)[index] for grad in grads[name]], lr=0.1, wd=0.5)
            change, expected = after - start, exact - start
            cosine = (change * expected).sum() / (change.norm() * expected.norm())
            assert cosine > 0.97, (name, index)
            assert change.norm().item() == pytest.approx(expected.norm().item(), rel=0.15), (name, index)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")
@pytest.mark.parametrize("size", [(24, 16), (16, 24)])
def test_updates_agree_with_torchs_muon(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (nn.Parameter(torch.randn(size, generator=generator.manual_seed(4))) for _ in range(2))
    optimizers = [
        Muon([{"params": [ours]}], [], parts={}, lr=0.1, weight_decay=0.1, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    before = ours.detach().clone()
    for _ in range(3):
        grad = torch.randn(size, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (theirs - before).norm()  # bfloat16 rounding differs


def test_muon_updates_the_matrices_of_the_blocks() -> None:
    for wrapped in (False, True):
        model = Transformer(Params(**SHAPE))
        names = {id(param): name for name, param in model.named_parameters()}
        optimizer = build_optimizer(
            nn.Sequential(model) if wrapped else model,
            OptimConfig(optimizer="muon", muon_momentum=0.8, no_decay_norms=True, wd=0.3),
        )
        matrices, embeddings, vectors = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
        assert set(embeddings) == {"tok_embeddings.weight", "output.weight"}
        assert vectors and all("norm" in name for name in vectors)
        assert {name.split(".", 2)[2] for name in matrices} == {
            *("attention.in_proj.weight", "attention.out_proj.weight", "feed_forward.w12.weight"),
            *("feed_forward.w3.weight", "feed_forward.router.layer.weight"),
            *("feed_forward.experts.mlp.w1", "feed_forward.experts.mlp.w2"),
        }
        assert len(matrices) + len(embeddings) + len(vectors) == len(names)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
        assert optimizer.param_groups[0]["momentum"] == 0.8


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing(name: str) -> None:
    """Parameters, moments and step counts bitwise equal those of a run without the step, also if it is the first."""

    def run(bad_steps: tuple[int, ...]) -> dict[str, Tensor]:
        model = optim_worker.Model()
        optimizer = build_optimizer(model, OptimConfig(optimizer=name, lr=0.1, wd=0.2))
        for step in range(3):
            for bad in (True, False) if step in bad_steps else (False,):
                for key, param in model.named_parameters():
                    bad_grad = torch.tensor([float("nan"), float("inf"), 1.0])[torch.arange(param.numel()) % 3]
                    good_grad = optim_worker.values_for(param, f"{key} {step}")
                    param.grad = bad_grad.view_as(param) if bad else good_grad
                step_unless_skipped(optimizer, torch.tensor(bad))
        tensors = {key: param.detach() for key, param in model.named_parameters()}
        moments = {f"{key} {m}": v for key, p in model.named_parameters() for m, v in optimizer.state[p].items()}
        return {**tensors, **moments}

    expected = run(())
    for bad_steps in ((0,), (1, 2)):
        results = run(bad_steps)
        assert results.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(value, results[key])] == []


def test_parameters_without_a_gradient_do_not_change() -> None:
    model = optim_worker.Model()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", lr=0.1))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.step()
    model.layers[0].w3.weight.grad = torch.ones(7, 12)  # type: ignore[union-attr]
    optimizer.step(lambda: None)
    changed = [name for name, param in model.named_parameters() if not torch.equal(param, before[name])]
    assert changed == ["layers.0.w3.weight"] and len(optimizer.state) == 1
