"""Durations of steps and phases."""

from __future__ import annotations

import itertools

import pytest
import torch

from open_lm.monitor import timing
from open_lm.monitor.timing import PhaseClock, Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by one second at each call."""
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("clock")
def test_phases_last_until_the_next_one_and_are_averaged_over_steps() -> None:
    phases = PhaseClock(CPU)
    for _ in range(2):
        for name in ("forward", "backward", "forward", "backward", "optimizer"):  # two micro-batches
            phases.enter(name)
        phases.end_step()
    # One call of the clock ends a phase and another starts the next.
    assert phases.pop() == {"forward": 2.0, "backward": 2.0, "optimizer": 1.0}
    assert phases.pop() == {}


@pytest.mark.usefixtures("clock")
def test_time_between_steps_belongs_to_no_phase() -> None:
    phases = PhaseClock(CPU)
    phases.enter("forward")
    phases.end_step()
    timing.time.perf_counter()
    phases.enter("forward")
    phases.end_step()
    assert phases.pop() == {"forward": 1.0}


@pytest.mark.usefixtures("clock")
def test_stopwatch_averages_data_and_step_times() -> None:
    stopwatch = Stopwatch()  # starts at 0
    stopwatch.record_step(0.5)
    stopwatch.record_step(1.5)
    assert stopwatch.pop() == (1.0, 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_phases_on_cuda_are_device_times_and_do_not_synchronize() -> None:
    device = torch.device("cuda")
    phases = PhaseClock(device)
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            phases.enter("forward")
            for _ in range(20):
                matrix @ matrix
            phases.enter("backward")
            phases.end_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    means = phases.pop()
    assert means["forward"] > means["backward"] >= 0
