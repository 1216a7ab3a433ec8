"""Bad steps are skipped, counted and logged; too many end the run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import fault_helpers
import pytest
import torch

from open_lm.config.sections import FaultConfig
from open_lm.distributed.processes import Runtime
from open_lm.training.guard import MAX_SPIKES, SPIKE_MIN_LOSSES, Guard, TrainingDiverged


def steps(guard: Guard, losses: list[float], norm: float = 1.0, first: int = 0) -> list[tuple[bool, bool]]:
    """Return (skipped, rollback) of each step."""
    found = []
    for step, loss in enumerate(losses, start=first):
        skipped = bool(guard.should_skip(torch.tensor(loss), torch.tensor(norm)))
        found.append((skipped, guard.handle_outcome(guard.report().tolist(), step, 0.1)))
    return found


def level(number: int) -> list[float]:
    """Return losses with mean 3 and standard deviation 0.1."""
    return [3.1 if index % 2 else 2.9 for index in range(number)]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_non_finite_step_is_skipped_and_logged(loss: float, norm: float, caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(FaultConfig(), Runtime())
    with caplog.at_level(logging.WARNING):
        assert steps(guard, [loss], norm, first=7) == [(True, False)]
    assert "step 7 is not finite and was skipped" in caplog.text
    assert not guard.accepted and guard.counts() == {"skipped_steps": 1, "spikes": 0}
    assert steps(guard, [2.0]) == [(False, False)] and guard.accepted


def test_more_skipped_steps_than_allowed_end_the_run() -> None:
    guard = Guard(FaultConfig(max_skipped_steps=2), Runtime())
    for _ in range(3):
        steps(guard, [math.nan, math.nan, *[2.0] * 98])
    with pytest.raises(
        TrainingDiverged, match=r"step 12 \(learning rate 0.1\): loss nan, .*3 of the last 100"
    ) as error:
        steps(guard, [math.nan, 2.0, math.nan, math.nan], first=9)
    assert error.value.on_every_rank
    with pytest.raises(TrainingDiverged, match="--max-skipped-steps is 0"):
        steps(Guard(FaultConfig(max_skipped_steps=0), Runtime()), [math.nan])


def test_overflows_of_a_scaler_are_skipped_but_not_counted() -> None:
    guard = Guard(FaultConfig(max_skipped_steps=0), Runtime(), scaled=True)
    assert steps(guard, [2.0], norm=math.inf) == [(True, False)]
    assert guard.counts()["skipped_steps"] == 0
    with pytest.raises(TrainingDiverged):
        steps(guard, [math.inf])


@pytest.mark.parametrize("rollback", [False, True])
def test_spikes_are_detected_relative_to_accepted_losses(rollback: bool) -> None:
    flag = "rollback_loss_spikes" if rollback else "skip_loss_spikes"
    guard = Guard(FaultConfig(max_skipped_steps=0, **{flag: 4.0}), Runtime())
    assert steps(guard, [*level(SPIKE_MIN_LOSSES - 2), 9.0, 2.0]) == [(False, False)] * SPIKE_MIN_LOSSES, (
        "too few losses to detect a spike"
    )
    guard = Guard(FaultConfig(max_skipped_steps=0, **{flag: 4.0}), Runtime())
    steps(guard, level(SPIKE_MIN_LOSSES))
    assert steps(guard, [3.39, 3.6, 0.1, 9.0]) == [(False, False), (True, rollback), (False, False), (True, rollback)]
    assert guard.counts() == {"skipped_steps": 0, "spikes": 2}


def test_loss_that_stays_high_ends_the_run() -> None:
    guard = Guard(FaultConfig(skip_loss_spikes=4.0), Runtime())
    steps(guard, level(128))
    steps(guard, [5.0] * MAX_SPIKES)
    with pytest.raises(TrainingDiverged, match="51 of the last 100 steps were spikes"):
        steps(guard, [5.0])


def test_state_survives_json() -> None:
    cfg = FaultConfig(max_skipped_steps=5, skip_loss_spikes=3.0)
    first, second = Guard(cfg, Runtime()), Guard(cfg, Runtime())
    steps(first, [*level(60), math.nan, 9.0])
    second.restore(json.loads(json.dumps(first.state())))
    rest = [3.05, math.nan, 3.35, 2.7, 3.25]
    assert steps(first, rest) == steps(second, rest)
    assert first.state() == second.state() and first.counts() == {"skipped_steps": 2, "spikes": 2}


@pytest.mark.processes
def test_all_ranks_skip_and_stop_together(tmp_path: Path) -> None:
    """A NaN loss on rank 1 only, replicated and sharded; a signal to rank 1; the clock of rank 0."""
    code, output = fault_helpers.run(tmp_path, "agree")
    assert code == 0, output
    first, second = (json.loads((tmp_path / f"agree_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["skip"] == {layout: [True, True, True] for layout in ("plain", "fsdp", "hybrid")}
    assert first["stop"] == [5, 6, -3, -5]
    assert first["state"]["samples_per_source"] == {"synthetic data": 20}
