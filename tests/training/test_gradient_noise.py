"""Gradient noise scale: the estimator, its equality in all layouts, resuming, and what a run logs of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainer_worker
from data_helpers import SEQ_LEN, write_source
from rank_processes import run_ranks
from run_helpers import tiny_flags, train, train_rows

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import OptimConfig
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime
from open_lm.errors import ConfigError
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.build import build_optimizer
from open_lm.report.collect import collect_run
from open_lm.report.curves import curve_figures
from open_lm.training.gradient_noise import DECAY, GradientNoise, estimate
from open_lm.training.step import StepOptions, train_step

SIZES: dict[str, Any] = {"device": torch.device("cpu"), "seq_len": trainer_worker.SEQ_LEN, "global_batch_size": 8}


def test_estimates_are_unbiased_with_unequal_numbers_of_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, dim, repeats = torch.tensor([1.0, 0.0, 5.0, 10.0], dtype=torch.float64), 5, 40_000
    true = torch.linspace(-0.3, 0.5, dim, dtype=torch.float64)
    scale = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)  # standard deviation of a token's gradient
    draws = torch.randn(repeats, len(tokens), dim, generator=generator, dtype=torch.float64)
    sums = tokens[:, None] * true + tokens.sqrt()[:, None] * scale * draws
    parts = sums / tokens.sum()
    full, small = parts.sum(1).square().sum(-1), parts.square().sum((1, 2))
    signal, noise = estimate(full, small, tokens.square().sum(), tokens.sum())
    for found, expected in ((signal, true.square().sum()), (noise, scale.square().sum())):
        error = found.std() / repeats**0.5
        assert abs(found.mean() - expected) < 4 * error < 0.05 * expected


def direct_estimates(model: Transformer, inputs: torch.Tensor, targets: torch.Tensor, size: int) -> tuple[float, float]:
    """Return |G|^2 and tr(S) from the gradients of small batches of `size` sequences, computed one by one."""
    gradients, counts = [], []
    for ids, labels in zip(inputs.split(size), targets.split(size), strict=True):
        loss = torch.nn.functional.cross_entropy(
            model(ids)[0].flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
        counts.append(float((labels != IGNORE_INDEX).sum()))
    total, n = sum(counts), np.array(counts)
    full = (sum(gradients) / total).square().sum().item()  # type: ignore[union-attr]
    small = sum((g / total).square().sum().item() for g in gradients)
    signal = (full - small) / (1 - (n**2).sum() / total**2)
    return signal, total * (full - signal)


@pytest.mark.parametrize(("tied", "scaled"), [(False, False), (True, False), (False, True)])
def test_a_step_measures_what_gradients_of_single_sequences_give(tied: bool, scaled: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(Params(**trainer_worker.SHAPE, weight_tying=tied))
    model.reset_parameters(seed=5)
    inputs, targets = trainer_worker.batch(0)
    expected = direct_estimates(model, inputs, targets, size=1)
    noise = GradientNoise(model, MeshLayout(), 8, **SIZES)
    options = StepOptions(Runtime(), MeshLayout(), get_autocast("fp32"), accum_freq=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    noise.start(scaler)
    result = train_step(model, inputs, targets, build_optimizer(model, OptimConfig(lr=1e-3)), options, scaler=scaler)
    noise.finish(targets, result.grad_norm, ~result.skipped)
    assert noise.state() == pytest.approx([(1 - DECAY) * value for value in (*expected, 1.0)], rel=1e-5)
    values = noise.values()
    assert values["gradient_variance"] == pytest.approx(expected[1], rel=1e-5)
    # A skipped step, and one whose tokens are all in one small batch, change nothing.
    state = noise.state()
    for labels, accepted in ((targets, False), (torch.where(torch.arange(8)[:, None] == 3, targets, -100), True)):
        noise.start()
        result = train_step(model, inputs, labels, build_optimizer(model, OptimConfig(lr=1e-3)), options)
        noise.finish(labels, result.grad_norm, torch.tensor(accepted))
        assert noise.state() == state
    noise.restore(())  # rolled back to a checkpoint of a run that did not measure
    assert noise.values() == {}


@pytest.mark.processes
def test_all_layouts_measure_the_same_and_train_as_without(tmp_path: Path) -> None:
    reference = trainer_worker.train("plain", accum_freq=4, measures_noise=True)
    assert [step[:2] for step in reference] == trainer_worker.train("plain", accum_freq=4)
    assert trainer_worker.train("plain", accum_freq=4, checkpointing=True, measures_noise=True) == reference
    jobs = [
        {"layout": layout, "accum_freq": 2, "measures_noise": measures}
        for layout in ("plain", "static_graph", "fsdp", "hybrid")
        for measures in (True, False)
    ]
    jobs += [{"layout": "fsdp", "measures_noise": True}, {"layout": "plain", "measures_noise": True, "tied": True}]
    out = tmp_path / "out.json"
    result = run_ranks(2, "trainer_worker", str(out), *map(json.dumps, jobs), folder=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    steps = {json.dumps(json.loads(job), sort_keys=True): value for job, value in json.loads(out.read_text()).items()}

    def found(**job: Any) -> list[list[float]]:
        return list(steps[json.dumps(job, sort_keys=True)])

    for layout in ("plain", "static_graph", "fsdp", "hybrid"):
        measured = found(layout=layout, accum_freq=2, measures_noise=True)
        np.testing.assert_allclose(measured, reference, rtol=2e-4, atol=1e-7)
        assert [step[:2] for step in measured] == found(layout=layout, accum_freq=2, measures_noise=False)
    np.testing.assert_allclose(
        found(layout="fsdp", measures_noise=True),
        trainer_worker.train("plain", accum_freq=2, measures_noise=True),
        rtol=2e-4,
        atol=1e-7,
    )
    np.testing.assert_allclose(
        found(layout="plain", measures_noise=True, tied=True),
        trainer_worker.train("plain", accum_freq=2, measures_noise=True, tied=True),
        rtol=2e-4,
        atol=1e-7,
    )


def test_a_run_logs_the_noise_scale_and_a_resumed_run_continues_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_source(tmp_path / "data", [100, 100])
    flags = [*tiny_flags(tmp_path, tmp_path / "logs"), "--lr-scheduler", "const"]
    noise = ["--log-gradient-noise", "--accum-freq", "2"]
    train(flags, data, 6, "--name", "plain", "--accum-freq", "2", epochs=2)
    train(flags, data, 6, "--name", "measured", *noise, epochs=2)
    plain, measured = (train_rows(tmp_path / "logs" / name) for name in ("plain", "measured"))
    assert [row["train/loss"] for row in plain] == [row["train/loss"] for row in measured]
    last = measured[-1]
    ratio = last["train/gradient_variance"] / last["train/gradient_squared_norm"]
    assert last["train/gradient_noise_scale_tokens"] == pytest.approx(ratio)
    assert last["train/gradient_noise_scale"] == pytest.approx(ratio / SEQ_LEN)
    assert last["train/global_batch_size"] == 4
    figures = curve_figures([collect_run(str(tmp_path / "logs" / "measured"))], ["measured"], 100).main
    (figure,) = (figure for figure in figures if figure.title == "Gradient noise scale")
    assert {series.name for series in figure.series} == {"gradient noise scale", "global batch size"}
    assert re.search(r"Noise scale: [\d.e+]+ sequences", caplog.text)
    train(flags, data, 6, "--name", "resumed", *noise, epochs=1)
    train(flags, data, 6, "--name", "resumed", *noise, "--resume", "latest", epochs=2)
    resumed = train_rows(tmp_path / "logs" / "resumed")[-1]
    names = [name for name in last if "gradient" in name]
    assert {name: resumed[name] for name in names} == {name: last[name] for name in names}


@pytest.mark.parametrize(
    ("layout", "accum_freq", "message"),
    [
        (MeshLayout(), 1, "found one micro-batch on one rank; set --accum-freq 2"),
        (MeshLayout(tensor=2), 4, "found --tensor-parallel 2"),
        (MeshLayout(shard=2, context=2), 4, "found --context-parallel 2"),
        (MeshLayout(shard=2, expert=2), 4, "found --expert-parallel 2"),
    ],
)
def test_layouts_without_small_batches_are_rejected(layout: MeshLayout, accum_freq: int, message: str) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=message):
        GradientNoise(model, layout, accum_freq, **SIZES)
