"""Learning-rate schedules."""

from __future__ import annotations

import pytest
import torch

from open_lm.config.sections import OptimConfig
from open_lm.errors import ConfigError
from open_lm.optim.schedules import build_scheduler, const_lr, const_lr_cooldown, cosine_lr, decayed_value, wsd_lr


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    return torch.optim.SGD(groups, lr=1.0)


def test_cosine_equals_the_golden_run(optimizer: torch.optim.Optimizer) -> None:
    """The rates are those of the golden run's log lines: lr 0.003, warmup 8, 128 steps."""
    schedule = cosine_lr(optimizer, 0.003, 8, 128, 0.0, 0.0)
    logged = {0: "0.000375", 8: "0.003000", 16: "0.002967", 63: "0.001696", 64: "0.001657", 127: "0.000001"}
    assert {step: f"{schedule(step):5f}" for step in logged} == logged
    assert [group["lr"] for group in optimizer.param_groups] == [schedule(127)] * 2


def test_cosine_ends_at_its_minimum_or_at_force_min_lr(optimizer: torch.optim.Optimizer) -> None:
    assert cosine_lr(optimizer, 1.0, 2, 10, 0.1, 0.0)(10) == pytest.approx(0.1)
    limited = cosine_lr(optimizer, 1.0, 10, 20, 0.0, 0.3)
    assert limited(0) == pytest.approx(0.1), "force_min_lr does not apply to the warmup"
    assert min(limited(step) for step in range(10, 21)) == 0.3


def test_const_is_constant_after_the_warmup(optimizer: torch.optim.Optimizer) -> None:
    schedule = const_lr(optimizer, 2.0, 4)
    assert [schedule(step) for step in (0, 1, 3, 4, 1000)] == [0.5, 1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(("power", "middle"), [(1.0, 0.55), (2.0, 0.325)])
def test_cooldown_is_a_polynomial(optimizer: torch.optim.Optimizer, power: float, middle: float) -> None:
    schedule = const_lr_cooldown(optimizer, 1.0, 2, 20, 10, power, 0.1)
    assert [schedule(step) for step in (1, 9, 10)] == [1.0, 1.0, 1.0]
    assert schedule(15) == pytest.approx(middle)
    assert schedule(20) == pytest.approx(0.1)
    assert const_lr_cooldown(optimizer, 1.0, 2, 20, 10, power, 0.1, force_min_lr=0.5)(20) == 0.5


@pytest.mark.parametrize(("shape", "quarter"), [("1-sqrt", 0.55), ("linear", 0.775), ("cosine", 0.868198)])
def test_wsd_is_stable_then_decays(optimizer: torch.optim.Optimizer, shape: str, quarter: float) -> None:
    schedule = wsd_lr(optimizer, 1.0, 4, 100, 20, shape, 0.1)
    assert [schedule(step) for step in (0, 3, 4, 79, 80)] == [0.25, 1.0, 1.0, 1.0, 1.0]
    assert schedule(85) == pytest.approx(quarter)
    assert schedule(100) == schedule(1000) == pytest.approx(0.1)
    rates = [schedule(step) for step in range(80, 101)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 21
    assert wsd_lr(optimizer, 1.0, 4, 100, 20, shape, 0.1, force_min_lr=0.5)(100) == 0.5


def test_wsd_edge_cases(optimizer: torch.optim.Optimizer) -> None:
    assert wsd_lr(optimizer, 1.0, 0, 10, 0)(9) == 1.0, "no decay"
    assert [wsd_lr(optimizer, 1.0, 0, 10, 10, "linear")(step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0], "all decay"
    late = wsd_lr(optimizer, 1.0, 9, 10, 5, "linear")
    assert [late(step) for step in (8, 9)] == [1.0, pytest.approx(0.2)], "the warmup takes precedence"
    with pytest.raises(ConfigError, match="--lr-decay-shape: found 'step', expected one of 1-sqrt, linear, cosine"):
        decayed_value(1.0, 0.0, 0.5, "step")


def test_wsd_does_not_depend_on_the_length_of_the_run_before_the_decay(optimizer: torch.optim.Optimizer) -> None:
    short, long = wsd_lr(optimizer, 1.0, 5, 50, 10), wsd_lr(optimizer, 1.0, 5, 500, 100)
    assert [short(step) for step in range(41)] == [long(step) for step in range(41)]
    assert short(41) < long(41)


def test_a_warmup_longer_than_the_run(optimizer: torch.optim.Optimizer) -> None:
    schedule = cosine_lr(optimizer, 1.0, 100, 100, 0.0, 0.0)
    assert schedule(50) == pytest.approx(0.51)
    assert cosine_lr(optimizer, 1.0, 100, 50, 0.0, 0.0)(100) == 0.0


def test_flags_select_the_schedule(optimizer: torch.optim.Optimizer) -> None:
    def rates(steps: tuple[int, ...], cooldown_start: int | None = None, **flags: object) -> list[float]:
        schedule = build_scheduler(OptimConfig(lr=1.0, warmup=10, **flags), optimizer, 100, cooldown_start)  # type: ignore[arg-type]
        return [round(schedule(step), 6) for step in steps]

    assert rates((0, 55, 100)) == [0.1, 0.5, 0.0]
    assert rates((0, 55, 100), lr_scheduler="const") == [0.1, 1.0, 1.0]
    assert rates((0, 80, 90), 80, lr_scheduler="const-cooldown", epochs_cooldown=1) == [0.1, 1.0, 0.5]
    assert rates((0, 80, 90, 100), lr_scheduler="wsd") == [0.1, 1.0, 0.292893, 0.0]
    wsd = {"lr_scheduler": "wsd", "lr_decay_fraction": 0.5, "lr_decay_shape": "linear", "lr_cooldown_end": 0.2}
    assert rates((50, 75, 100), **wsd) == [1.0, 0.6, 0.2]
    assert rates((50, 75, 100), **wsd, force_min_lr=0.3) == [1.0, 0.6, 0.3]
    assert rates((0, 99), skip_scheduler=True) == [1.0, 1.0]
    with pytest.raises(ConfigError, match="--epochs-cooldown"):
        rates((0,), lr_scheduler="const-cooldown")
    with pytest.raises(
        ConfigError, match="--lr-scheduler: found 'linear', expected one of cosine, const, const-cooldown, wsd"
    ):
        rates((0,), lr_scheduler="linear")
