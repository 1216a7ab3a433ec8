"""Settings that contradict the length of the run are reported with the way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config
from open_lm.main import main
from open_lm.optim.schedules import build_scheduler
from open_lm.training.run_length import run_length_problems


def problems(argv: str, total_steps: int, cooldown_start: int | None = None) -> list[str]:
    config = Config.from_namespace(parse_args(argv.split()))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return run_length_problems(
        config, build_scheduler(config.optim, optimizer, total_steps, cooldown_start), total_steps
    )


@pytest.mark.parametrize("scheduler", ["cosine", "const", "wsd", "const-cooldown --epochs-cooldown 1"])
def test_warmup_longer_than_the_run_is_reported_for_every_schedule(scheduler: str) -> None:
    flags = f"--lr 1 --lr-scheduler {scheduler}"
    (default,) = problems(flags, 5000, 4000)
    assert "--warmup 10000: the run has only 5000 steps" in default and "rises to 0.5 of --lr 1" in default
    assert "lower --warmup, for example to 100" in default
    (readme,) = problems(f"{flags} --warmup 2000", 20, 16)
    assert "rises to 0.01 of --lr 1" in readme and "for example to 1," in readme
    assert problems(f"{flags} --warmup 20", 20, 16) and problems(f"{flags} --warmup 2", 20, 16) == []
    assert problems(f"{flags} --skip-scheduler", 20, 16) == []


@pytest.mark.parametrize(
    ("scheduler", "shorten"),
    [("wsd", "--lr-decay-fraction"), ("const-cooldown --epochs-cooldown 4", "--epochs-cooldown")],
)
def test_decay_that_starts_before_the_warmup_ends_is_reported(scheduler: str, shorten: str) -> None:
    flags = f"--lr 1 --lr-scheduler {scheduler}"
    (found,) = problems(f"{flags} --warmup 95", 100, 80)
    rate = "0.134" if scheduler == "wsd" else "0.25"
    assert f"it falls from 1 to {rate} in one step (of 100); lower --warmup, lower {shorten}, or" in found
    assert problems(f"{flags} --warmup 80", 100, 80) == []


def test_decay_without_a_step_is_reported() -> None:
    (found,) = problems("--lr-scheduler wsd --lr-decay-fraction 0.001 --warmup 2", 100)
    assert "--lr-decay-fraction 0.001: of 100 steps this leaves none" in found
    assert problems("--lr-scheduler wsd --lr-decay-fraction 0 --warmup 2", 100) == []
    assert problems("--lr-scheduler wsd --lr-decay-fraction 0.001 --lr-cooldown-end 5e-4 --warmup 2", 100) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--save-every-n-steps 101", "--save-every-n-steps 101 is longer than the run, which has 100 steps"),
        ("--save-milestone-every 200", "--save-milestone-every 200 is longer than the run"),
        ("--averagers ema_0.9,poly_8_101", "--averagers poly_8_101: a period of 101 is longer than the run"),
    ],
)
def test_periods_longer_than_the_run_are_reported(flags: str, message: str) -> None:
    (found,) = problems(f"{flags} --warmup 2", 100)
    assert found.startswith(message)
    assert problems(f"{flags} --warmup 2", 500) == []


def test_run_logs_that_its_warmup_is_too_long(tmp_path: Path) -> None:
    flags = "--model open_lm_test_tiny --dataset-type synthetic --train-num-samples 512 --epochs 1 --workers 0"
    main([*flags.split(), "--global-batch-size", "8", "--logs", str(tmp_path), "--name", "run"])
    warning = r"WARNING \| --warmup 10000: the run has only 4 steps, so the learning rate rises to 2e-07 of --lr 0.0005"
    assert re.search(warning, (tmp_path / "run/out.log").read_text())
