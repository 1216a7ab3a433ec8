"""One optimizer step, the training loop and its metrics."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import trainer_worker

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import DataConfig, FaultConfig, OptimConfig
from open_lm.data.loader import build_train_loader
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime
from open_lm.model.transformer import Params, Transformer
from open_lm.monitor.metrics import (
    DeviceMeans,
    TrainLogEntry,
    device_peak_flops,
    model_flops_per_token,
    peak_memory_bytes,
)
from open_lm.optim.averaging import ModelAverager
from open_lm.optim.build import build_optimizer
from open_lm.optim.schedules import const_lr
from open_lm.system.names import short_labels
from open_lm.training.control import Decision
from open_lm.training.guard import TrainingDiverged
from open_lm.training.step import StepOptions, train_step
from open_lm.training.trainer import Trainer

OPTIONS = StepOptions(Runtime(), MeshLayout(), get_autocast("fp32"))


def assert_equal(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def small_model(**shape: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Params(**{**trainer_worker.SHAPE, **shape}))
    model.reset_parameters(seed=5)
    return model


def one_step(options: StepOptions, step: int = 0, **shape: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return the values reported by a step and the weights after it."""
    model = small_model(**shape)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    result = train_step(model, *trainer_worker.batch(step), optimizer, options)
    return {name: value.item() for name, value in result.values.items()}, model.state_dict()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_equals_the_full_batch_with_masked_tokens(checkpointing: bool) -> None:
    reference = trainer_worker.train("plain")
    for accum_freq in (2, 4, 8):
        steps = trainer_worker.train("plain", accum_freq=accum_freq, checkpointing=checkpointing)
        assert np.allclose(steps, reference, atol=1e-5, rtol=0)


def test_loss_is_the_mean_over_valid_tokens() -> None:
    parts, _ = one_step(replace(OPTIONS, accum_freq=4))
    inputs, targets = trainer_worker.batch(0)
    logits = small_model()(inputs)[0]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    assert parts["loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_z_loss_is_part_of_the_loss() -> None:
    inputs, targets = trainer_worker.batch(0)
    logits = small_model()(inputs)[0]
    z = logits.logsumexp(-1).square()[targets != IGNORE_INDEX].mean().item()
    with_z, without = one_step(replace(OPTIONS, z_loss_coefficient=0.5))[0], one_step(OPTIONS)[0]
    assert with_z["loss"] - without["loss"] == pytest.approx(0.5 * z, rel=1e-4)


def test_batch_without_targets_only_decays_weights() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, wd=0.5))
    inputs, targets = trainer_worker.batch(0)
    result = train_step(model, inputs, torch.full_like(targets, IGNORE_INDEX), optimizer, OPTIONS, num_samples=0)
    assert (result.values["loss"].item(), result.samples.item(), result.valid_tokens.item()) == (0.0, 0, 0)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * 0.95, atol=1e-7)


def test_logit_mean_and_balancing_loss_are_reported() -> None:
    options = replace(OPTIONS, log_logit_mean=True, accum_freq=2)
    parts, _ = one_step(options, moe_freq=1, moe_num_experts=4, moe_capacity_factor=0.0)
    assert set(parts) == {"loss", "logit_mean", "load_balancing_loss"}
    model = small_model(moe_freq=1, moe_num_experts=4, moe_capacity_factor=0.0)
    inputs, _ = trainer_worker.batch(0)
    assert parts["logit_mean"] == pytest.approx(model(inputs)[0].mean().item(), abs=1e-6)
    assert 0 < parts["load_balancing_loss"] < 1


def test_batch_must_be_divisible_into_micro_batches() -> None:
    with pytest.raises(ValueError, match="8 sequences are not divisible by 3 micro-batches"):
        one_step(replace(OPTIONS, accum_freq=3))


def test_non_finite_step_changes_nothing() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig())
    train_step(model, *trainer_worker.batch(0), optimizer, OPTIONS)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with torch.no_grad():
        kept = model.output.weight[0, 0].item()
        model.output.weight[0, 0] = math.inf
    result = train_step(model, *trainer_worker.batch(1), optimizer, OPTIONS)
    with torch.no_grad():
        model.output.weight[0, 0] = kept
    assert result.skipped and not result.values["loss"].isfinite()
    assert_equal((model.state_dict(), optimizer.state_dict()), before)
    assert not train_step(model, *trainer_worker.batch(1), optimizer, OPTIONS).skipped


# ------------------------------------------------------------------------------------------------ the loop
def build_trainer(reports: list[tuple[int, dict[str, Any]]], **changes: Any) -> Trainer:
    data = DataConfig(dataset_type="synthetic", workers=0)
    loader = build_train_loader(data, seq_len=trainer_worker.SEQ_LEN, vocab_size=trainer_worker.VOCAB, batch_size=4)
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    settings: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": const_lr(optimizer, 1e-2, 2),
        "loader": loader,
        "options": OPTIONS,
        "report": lambda values, step: reports.append((step, dict(values))),
        "seq_len": trainer_worker.SEQ_LEN,
        "global_batch_size": 4,
        "total_steps": 7,
        "log_every": 3,
    }
    return Trainer(**{**settings, **changes})


def test_epoch_logs_at_its_steps_and_counts_exactly() -> None:
    reports: list[tuple[int, dict[str, Any]]] = []
    trainer = build_trainer(reports, flops_per_token=1e6, peak_flops=1e9)
    trainer.run_epoch(0, 8)
    trainer.run_epoch(1, 10)
    assert [step for step, _ in reports] == [1, 4, 7, 8, 9, 10]
    assert [values["tokens"] for _, values in reports] == [4 * 12 * step for step in (1, 4, 7, 8, 9, 10)]
    assert (trainer.step, trainer.samples_seen) == (10, 40)
    assert trainer.data_state == trainer.loader.state
    last = reports[-1][1]
    assert last["train/epoch"] == 1 and last["train/lr"] == 1e-2 and last["train/mfu"] > 0
    phases = [last[f"train/{phase}_time"] for phase in ("sums", "forward", "backward", "optimizer")]
    assert min(phases) > 0 and sum(phases) + last["train/data_time"] <= last["train/batch_time"]
    assert last["train/grad_norm"] > 0 and 0 < last["train/peak_memory_bytes"] <= peak_memory_bytes(torch.device("cpu"))


def test_logged_loss_is_the_mean_since_the_last_log_line() -> None:
    every: list[tuple[int, dict[str, Any]]] = []
    some: list[tuple[int, dict[str, Any]]] = []
    build_trainer(every, log_every=1).run_epoch(0, 7)
    build_trainer(some, log_every=3).run_epoch(0, 7)
    losses = [values["train/loss"] for _, values in every]
    expected = [losses[0], sum(losses[1:4]) / 3, sum(losses[4:7]) / 3]
    assert [values["train/loss"] for _, values in some] == pytest.approx(expected, abs=1e-6)


def test_losses_of_averaged_models_are_logged_without_affecting_training() -> None:
    plain: list[tuple[int, dict[str, Any]]] = []
    averaged: list[tuple[int, dict[str, Any]]] = []
    build_trainer(plain).run_epoch(0, 6)
    trainer = build_trainer(averaged, average_loss_every=2)
    trainer.averagers = ModelAverager(trainer.model, "poly_8_1,ema_0.99,none")
    trainer.run_epoch(0, 6)
    for (_, without), (_, with_averages) in zip(plain, averaged, strict=True):
        assert with_averages["train/loss"] == without["train/loss"]
    first = averaged[0][1]
    assert {"train/poly_8_1_loss", "train/ema_0.99_loss", "train/none_loss"} <= set(first)
    assert first["train/none_loss"] < first["train/loss"], "the update with this batch lowers its loss"
    assert trainer.model.training


def test_diverged_epoch_names_the_step_and_keeps_its_counts() -> None:
    trainer = build_trainer([], faults=FaultConfig(max_skipped_steps=0))
    trainer.run_epoch(0, 2)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(TrainingDiverged, match=r"training diverged at step 2 \(learning rate 0.01\): loss nan"):
        trainer.run_epoch(0, 5, first_step=0)
    assert (trainer.step, trainer.samples_seen) == (3, 12)


TIMES = re.compile("time|second|memory|mfu")


def saved(trainer: Trainer) -> dict[str, Any]:
    """Return a copy of the full state that the trainer resumes from."""
    parts = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    progress = {"step": trainer.step, "data_state": trainer.data_state, "trainer": trainer.state()}
    return {**copy.deepcopy(parts), **json.loads(json.dumps(progress))}


def restore(trainer: Trainer, found: dict[str, Any]) -> None:
    trainer.model.load_state_dict(found["model"])
    trainer.optimizer.load_state_dict(copy.deepcopy(found["optimizer"]))
    trainer.step, trainer.data_state = found["step"], found["data_state"]
    trainer.loader.rewind(found["data_state"])
    trainer.restore(found["trainer"])


def without_times(reports: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    return [(step, {name: v for name, v in values.items() if not TIMES.search(name)}) for step, values in reports]


def test_resuming_inside_an_epoch_logs_what_an_uninterrupted_run_logs() -> None:
    unbroken: list[tuple[int, dict[str, Any]]] = []
    broken: list[tuple[int, dict[str, Any]]] = []
    found = {}
    first = build_trainer(unbroken, average_loss_every=2)
    first.averagers = ModelAverager(first.model, "none")

    def after_step(decision: Decision) -> None:
        assert decision == Decision(stop=False, save=False, rollback=False)
        found[first.step] = saved(first)

    first.after_step = after_step
    first.run_epoch(0, 8)
    for step, state in found.items():
        second = build_trainer(broken, average_loss_every=2)
        second.averagers = ModelAverager(second.model, "none")
        restore(second, state)
        second.run_epoch(0, 8, first_step=0)
        assert without_times(broken) == [entry for entry in without_times(unbroken) if entry[0] > step]
        assert_equal(second.model.state_dict(), first.model.state_dict())
        assert second.state() == first.state()
        broken.clear()


def test_skipped_steps_are_counted_logged_and_excluded_from_the_mean() -> None:
    reports: list[tuple[int, dict[str, Any]]] = []
    plain: list[tuple[int, dict[str, Any]]] = []
    build_trainer(plain, log_every=1).run_epoch(0, 2)
    trainer = build_trainer(reports)
    good: dict[str, torch.Tensor] = {}

    def after_step(_decision: Decision) -> None:
        weight = trainer.model.get_parameter("output.weight")
        with torch.no_grad():
            if trainer.step == 2:
                good["weight"] = weight.clone()
                weight.fill_(math.inf)
            elif trainer.step == 3:
                assert weight.isinf().all(), "the weight is unchanged"
                weight.copy_(good["weight"])

    trainer.after_step = after_step
    trainer.run_epoch(0, 4)
    assert [values["train/skipped_steps"] for _, values in reports] == [0, 1]
    assert trainer.samples_seen == 16 and reports[-1][1]["train/tokens/synthetic_data"] == 16 * trainer_worker.SEQ_LEN
    window = trainer.state()["guard"]["recent"][-4:]
    assert window == [0, 0, 1, 0]
    assert plain[1][1]["train/loss"] * 0.5 < reports[1][1]["train/loss"] < plain[0][1]["train/loss"] * 1.5


def test_rollback_continues_after_the_data_that_led_to_the_spike() -> None:
    trainer = build_trainer([], faults=FaultConfig(rollback_loss_spikes=6.0), total_steps=60)
    kept: list[dict[str, Any]] = []
    steps = []

    def after_step(decision: Decision) -> None:
        steps.append(trainer.step)
        if trainer.step == 38 and not kept:
            kept.append(saved(trainer))
        if trainer.step == 40 and len(kept) == 1:
            with torch.no_grad():
                trainer.model.get_parameter("output.weight").mul_(100)  # the next loss is a spike
        if decision.rollback:
            behind = trainer.data_state
            assert behind is not None
            restore(trainer, kept[0])
            trainer.loader.rewind(behind)
            trainer.data_state = behind
            kept.append({})

    trainer.after_step = after_step
    trainer.run_epoch(0, 44)
    assert steps == [*range(1, 42), *range(39, 45)]
    assert (len(kept), trainer.step) == (2, 44)


def test_source_labels_are_short_and_unique() -> None:
    names = ["s3://bucket/sets/wiki/manifest.jsonl", "/data/books/shard-{000..010}.tar", "a/x.tar", "a/y.tar"]
    names += ["/other/wiki/manifest.jsonl", "synthetic data", "wiki"]
    expected = ["wiki", "books", "x", "y", "other-wiki", "synthetic_data", "wiki-2"]
    assert list(short_labels(names).values()) == expected


# ------------------------------------------------------------------------------------------------ metrics
def test_log_line_has_the_format_that_existing_tools_read(shared_dir: Any) -> None:
    reading = TrainLogEntry(
        epoch=1,
        samples=8,
        epoch_samples=512,
        loss=2.5664,
        grad_norm=1.5,
        lr=0.001657,
        data_s=0.02,
        batch_s=0.0776,
        tokens=33280,
        step_tokens=512,
        world_size=2,
        memory_bytes=2**30,
        remaining_s=3725.4,
        mfu=0.375,
    )
    line = reading.line()
    assert line == (
        "Train Epoch: 1 [  8/512 (2%)] Loss: 2.566 Data (t): 0.020 Batch (t): 0.078, 6597.94/s, 3298.97/s/gpu "
        "LR: 0.001657 Grad norm: 1.500 Tokens: 33280 Mem: 1.00 GiB MFU: 37.5% ETA: 1:02:05"
    )
    number = r"[\d.]+"
    pattern = re.compile(
        rf"Train Epoch: \d+ \[ *\d+/\d+ \(\d+%\)\] Loss: {number} Data \(t\): {number} Batch \(t\): {number}, "
        rf"{number}/s, {number}/s/gpu LR: {number} "
    )
    golden = (shared_dir / "compat/run/logs/upstream/out.log").read_text().splitlines()
    golden_lines = [text.split(" | INFO | ")[1] for text in golden if "Train Epoch" in text]
    assert len(golden_lines) == 19
    assert all(pattern.match(text) for text in [line, *golden_lines])


def test_means_exclude_skipped_and_missing_steps() -> None:
    means, yes, no = DeviceMeans(), torch.tensor(True), torch.tensor(False)
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value)}, yes)
    means.add({"loss": torch.tensor(math.nan)}, no)
    means.add({"rare": torch.tensor(5.0)}, yes)
    moved = DeviceMeans()
    moved.restore(json.loads(json.dumps(means.state())), torch.device("cpu"))
    assert means.pop() == moved.pop() == {"loss": 3.0, "rare": 5.0}
    assert means.pop() == {}
    means.add({"loss": torch.tensor(math.nan)}, no)
    assert math.isnan(means.pop()["loss"])


def test_model_flops_count_matrix_products_only() -> None:
    model = small_model()
    counted = sum(p.numel() for p in model.parameters()) - model.tok_embeddings.weight.numel()
    attention = 12 * 3 * 24 * trainer_worker.SEQ_LEN
    assert model_flops_per_token(model) == 6 * counted + attention
    tied = small_model(weight_tying=True)
    assert model_flops_per_token(tied) == model_flops_per_token(model)
    experts = {"moe_freq": 1, "moe_num_experts": 4}
    one, two = (model_flops_per_token(small_model(**experts, moe_top_k=k)) for k in (1, 2))
    assert two - one == 6 * 3 * 2 * 4 * 24 * 24, "each block's further expert has two matrices of 4 D x D"
    assert device_peak_flops(torch.device("cpu"), torch.float32) > 1e8  # type: ignore[operator]
