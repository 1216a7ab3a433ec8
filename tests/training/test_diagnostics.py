"""Diagnostics of a training: traces of steps, slow ranks, memory snapshots, and advice when memory is exhausted."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from open_lm.config.command_line import parse_args
from open_lm.config.diagnostics_section import DiagnosticsConfig, parse_steps
from open_lm.config.layout import MeshLayout
from open_lm.config.sections import Config
from open_lm.distributed.processes import Runtime
from open_lm.errors import ConfigError
from open_lm.monitor.timing import PhaseClock
from open_lm.training.diagnostics import Diagnostics
from open_lm.training.setup import check_device


def names_in(trace: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]


def test_each_traced_step_is_in_the_trace_and_the_table(tmp_path: Path) -> None:
    clock, size = PhaseClock(torch.device("cpu")), 8
    weight = torch.ones(size, size)
    with Diagnostics(DiagnosticsConfig(profile_steps="2:4"), Runtime(), str(tmp_path)) as diagnostics:
        for step in range(6):
            diagnostics.at_step(step, clock)
            clock.enter("forward")
            torch.mm(weight, weight)
            clock.end_step()
        diagnostics.at_step(6, clock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "profile_2-4_rank_0.json.gz", "profile_2-4_rank_0.txt",
    ]  # fmt: skip
    names = names_in(tmp_path / "profile_2-4_rank_0.json.gz")
    assert names.count("phase: forward") == names.count("aten::mm") == 2
    table = (tmp_path / "profile_2-4_rank_0.txt").read_text()
    assert table.startswith("Steps 2 to 3 on rank 0 (cpu)") and "aten::mm" in table


def test_a_run_that_ends_inside_the_traced_steps_leaves_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = PhaseClock(torch.device("cpu"))
    with Diagnostics(DiagnosticsConfig(profile_steps="0:9"), Runtime(), str(tmp_path)) as diagnostics:
        diagnostics.at_step(0, clock)
    assert list(tmp_path.iterdir()) == [] and "its trace is not written" in caplog.text


@pytest.mark.parametrize("text", ["3", "3:3", "4:3", "a:b", "1:2:3", "-1:2"])
def test_invalid_steps_are_reported(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--profile-steps: found .* expected A:B with A below B"):
        parse_steps(text)
    with pytest.raises(ConfigError, match="--profile-steps: found"):
        parse_args(["--train-data", "x", f"--profile-steps={text}"])
    with pytest.raises(ConfigError, match="--logs none writes none"):
        parse_args(["--train-data", "x", "--profile-steps", "1:2", "--logs", "none"])


def test_snapshots_are_reported_to_have_no_effect_on_cpu(caplog: pytest.LogCaptureFixture) -> None:
    config = Config.from_namespace(parse_args(["--train-data", "x", "--memory-snapshot"]))
    with caplog.at_level(logging.WARNING):
        check_device(config, {}, Runtime(), MeshLayout())
    assert "--memory-snapshot has no effect on CPU" in caplog.text
    with Diagnostics(DiagnosticsConfig(memory_snapshot=True), Runtime(), "unused") as diagnostics:
        assert diagnostics.write_snapshot("memory") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_snapshots_have_the_allocations(tmp_path: Path) -> None:
    import os
    import signal

    device: Any = torch.device("cuda", 0)
    clock = PhaseClock(device)
    with Diagnostics(DiagnosticsConfig(memory_snapshot=True), Runtime(device=device), str(tmp_path)) as diagnostics:
        kept = torch.ones(1 << 20, device=device)
        os.kill(os.getpid(), signal.SIGUSR2)
        diagnostics.at_step(7, clock)
        assert kept.is_cuda
    (path,) = tmp_path.iterdir()
    assert path.name == "memory_step_7_rank_0.pickle" and path.stat().st_size > 1000
