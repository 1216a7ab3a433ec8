"""Optimizers, gradient clipping, optimizer checkpoints and precision."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import optim_worker
import pytest
import torch

from open_lm.checkpoint.interchange import load_model, load_optimizer, write_interchange
from open_lm.checkpoint.model_state import check_moments
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.sharded import ShardedWriter, StoredTensors, TrainingState, load
from open_lm.config.sections import OptimConfig
from open_lm.distributed.precision import build_scaler, compute_dtype, get_autocast, parameter_dtype
from open_lm.errors import CheckpointError, ConfigError
from open_lm.optim.build import build_optimizer, gradient_norm, step_unless_skipped

HELPERS = Path(__file__).parents[1] / "helpers"


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 7))


def test_weight_decay_applies_to_every_parameter() -> None:
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, wd=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.allclose(p, old * (1 - 0.1 * 0.5))


def test_adamw_equals_torchs_adamw_with_the_values_of_the_flags() -> None:
    ours, reference = small_model(), small_model()
    cfg = OptimConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, wd=0.3)
    optimizers = [
        build_optimizer(ours, cfg),
        torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3),
    ]
    ids = torch.arange(7)
    for _ in range(3):
        for model, optimizer in zip((ours, reference), optimizers, strict=True):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_frozen_parameters_are_excluded() -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    optimizer = build_optimizer(model, OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_an_unknown_optimizer_is_rejected() -> None:
    with pytest.raises(ConfigError, match="found 'lion', expected one of adamw, muon"):
        build_optimizer(small_model(), OptimConfig(optimizer="lion"))


@pytest.mark.parametrize("max_norm", [None, 0.01, 1e6])
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_clipping_in_the_step_equals_clipping_before_it(name: str, max_norm: float | None) -> None:
    """SGD stands for an optimizer that does not divide gradients itself."""
    results = []
    for clips_in_step in (True, False):
        model = optim_worker.Model()
        params = list(model.parameters())
        sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        optimizer = sgd if name == "sgd" else build_optimizer(model, optim_worker.config(name))
        for step in range(3):
            for key, param in model.named_parameters():
                param.grad = optim_worker.values_for(param, f"{key} {step}")
            expected = torch.cat([p.grad.flatten() for p in params]).norm()  # type: ignore[union-attr]
            norm = gradient_norm(params)
            assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
            if clips_in_step:
                step_unless_skipped(optimizer, torch.tensor(False), norm, max_norm)
            else:
                torch.nn.utils.clip_grad_norm_(params, max_norm or 1e9)
                step_unless_skipped(optimizer, torch.tensor(False))
        assert "grad_scale" not in vars(optimizer) and "found_inf" not in vars(optimizer)
        results.append(params + [v for state in optimizer.state.values() for v in state.values()])
    # Muon orthogonalizes in bfloat16 on some CPUs, which amplifies rounding.
    for found, exact in zip(*results, strict=True):
        assert torch.allclose(found, exact, rtol=1e-5, atol=1e-5 if name == "muon" else 1e-7)


def test_the_norm_in_one_process_is_bitwise_equal_to_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-12, 1.0, 3e18):
        params = [torch.nn.Parameter(torch.empty(size)) for size in (1, 7, 1000)]
        for param in params:
            param.grad = scale * torch.randn(param.shape, generator=generator)
        expected = torch.nn.utils.get_total_norm([param.grad for param in params])  # type: ignore[misc]
        assert torch.equal(gradient_norm(params), expected)
    assert gradient_norm([torch.nn.Parameter(torch.ones(1))]) == 0.0


def test_the_norm_of_large_gradients_is_exact() -> None:
    """It then equals the norm of a sharded gradient, which is summed over ranks; torch's norm is 1e-4 off here."""
    large = torch.nn.Parameter(torch.empty(1000, 4000))
    large.grad = torch.randn(large.shape, generator=torch.Generator().manual_seed(1))
    assert gradient_norm([large]).item() == pytest.approx(large.grad.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_of_other_dtypes_are_clipped_and_updated(name: str, dtype: torch.dtype) -> None:
    """The norm is computed in float32, not rounded to the dtype of the gradients."""
    model = optim_worker.Model().to(dtype)
    optimizer = build_optimizer(model, optim_worker.config(name))
    before = [param.detach().clone() for param in model.parameters()]
    for key, param in model.named_parameters():
        param.grad = optim_worker.values_for(param, key).to(dtype)
    expected = torch.cat([param.grad.flatten() for param in model.parameters()]).double().norm()  # type: ignore[union-attr]
    norm = gradient_norm(model.parameters())
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    step_unless_skipped(optimizer, torch.tensor(False), norm, 0.5)
    for param, old in zip(model.parameters(), before, strict=True):
        assert param.dtype == dtype and param.isfinite().all() and not torch.equal(param, old)


def test_norms_and_biases_can_be_excluded_from_weight_decay() -> None:
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, wd=0.5, no_decay_norms=True))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in ("0.weight", "2.weight") else 1.0
        assert torch.allclose(p, before[name] * factor), name


# ---------------------------------------------------------------------------------------------- checkpoints
def update(model: optim_worker.Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, param in model.named_parameters():
            param.grad = optim_worker.values_for(param, f"{name} {step}")
        optimizer.step()


def save(folder: Path, **flags: object) -> tuple[Path, Path]:
    """Write a sharded checkpoint after two updates and its interchange files; return both paths."""
    model = optim_worker.Model()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, **flags))  # type: ignore[arg-type]
    update(model, optimizer, range(2))
    extra = {"progress": Progress(epoch=1, step=2, samples_seen=0, seed=0).to_json()}
    sharded = folder / "step_2"
    ShardedWriter().save(TrainingState(model, optimizer, extra=extra), str(sharded), 2, wait=True)
    write_interchange(StoredTensors(str(sharded)), str(folder), "run")
    return sharded, folder / "epoch_1.pt"


def resume(model: optim_worker.Model, optimizer: torch.optim.Optimizer, path: Path) -> None:
    if path.is_dir():
        load(TrainingState(model, optimizer), str(path))
    else:
        args = argparse.Namespace(resume=str(path), seed=0)
        load_model(args, model)
        assert load_optimizer(args, model, optimizer)


@pytest.mark.parametrize("no_decay_norms", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_resumes_from_either_kind_of_checkpoint(name: str, no_decay_norms: bool, tmp_path: Path) -> None:
    uninterrupted = optim_worker.Model()
    flags = {"optimizer": name, "no_decay_norms": no_decay_norms}
    optimizer = build_optimizer(uninterrupted, OptimConfig(lr=0.1, **flags))  # type: ignore[arg-type]
    update(uninterrupted, optimizer, range(4))
    for path in save(tmp_path, **flags):
        model = optim_worker.Model()
        optimizer = build_optimizer(model, OptimConfig(lr=0.1, **flags))  # type: ignore[arg-type]
        resume(model, optimizer, path)
        update(model, optimizer, range(2, 4))
        for (key, value), expected in zip(model.named_parameters(), uninterrupted.parameters(), strict=True):
            assert torch.equal(value, expected), (path.name, key)


def test_no_decay_norms_can_change_when_a_run_resumes(tmp_path: Path) -> None:
    """Moments are loaded by parameter name; the flags of the resumed run determine which parameters decay."""
    for path in save(tmp_path):
        model = optim_worker.Model()
        optimizer = build_optimizer(model, OptimConfig(lr=0.1, no_decay_norms=True))
        resume(model, optimizer, path)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [OptimConfig().wd, 0.0]
        stored = StoredTensors(str(tmp_path / "step_2"))
        for name, param in model.named_parameters():
            for moment, value in optimizer.state[param].items():
                assert torch.equal(value, stored.read(f"optimizer/{name}/{moment}")), (path.name, name, moment)


@pytest.mark.parametrize("names", [("adamw", "muon"), ("muon", "adamw")])
def test_moments_of_another_optimizer_are_rejected(names: tuple[str, str], tmp_path: Path) -> None:
    for path in save(tmp_path, optimizer=names[0]):
        model = optim_worker.Model()
        optimizer = build_optimizer(model, OptimConfig(optimizer=names[1]))
        with pytest.raises(CheckpointError, match=f"continue with --optimizer {names[0]}, or start a new") as error:
            resume(model, optimizer, path)
        assert f"{path}: was saved by --optimizer {names[0]}, but this run has --optimizer {names[1]}" in str(
            error.value
        )
        assert not optimizer.state, "nothing is partially loaded"


def test_moments_of_another_program_are_rejected() -> None:
    model = optim_worker.Model()
    stored = {"output.weight": {"momentum_buffer"}}
    with pytest.raises(
        CheckpointError, match=r"saved by another program.* has momentum_buffer but not exp_avg"
    ) as error:
        check_moments(stored, model, build_optimizer(model, OptimConfig()), "epoch_1.pt")
    assert str(error.value).endswith("; start a new run from its weights with --pretrained")
    check_moments(stored, model, torch.optim.SGD(model.parameters(), momentum=0.9), "epoch_1.pt")


# ---------------------------------------------------------------------------------------------- ranks
@pytest.mark.processes
def test_every_layout_updates_like_a_single_process(tmp_path: Path, ranks: Callable[..., object]) -> None:
    """Parameters, moments and gradient norms are equal for replicas, uneven shards, hybrids and tensor parallelism.

    They are also equal on all ranks, and after a skipped step.
    """
    ranks(4, "optim_worker", str(tmp_path / "results.pt"), *optim_worker.LAYOUTS)
    results = torch.load(tmp_path / "results.pt")
    assert len(results) == 2 * len(optim_worker.LAYOUTS)
    for (name, layout), result in results.items():
        expected = optim_worker.train("replicas", optim_worker.config(name))
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            # Rounding depends on the number of matrices in a batch, and Muon's updates do not shrink with gradients.
            atol = 1e-3 * optim_worker.LR if name == "muon" else 1e-6
            torch.testing.assert_close(
                result[key], value, rtol=1e-6, atol=atol, equal_nan=True, msg=f"{name} {layout} {key}"
            )


def test_precisions_determine_dtypes() -> None:
    assert parameter_dtype("amp_bfloat16") == torch.float32
    assert parameter_dtype("bf16") == torch.bfloat16 and parameter_dtype("fp16") == torch.float16
    assert compute_dtype("amp", "cpu") == torch.bfloat16 and compute_dtype("amp", "cuda") == torch.float16
    assert build_scaler("amp", torch.device("cpu")) is None
    with get_autocast("amp_bf16", "cpu")():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with get_autocast("fp32", "cpu")():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(ConfigError, match="--precision"):
        get_autocast("int8")
