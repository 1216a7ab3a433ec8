"""Diagnostics of a training: traces of steps, slow ranks, memory snapshots, and advice when memory is exhausted."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import write_source
from run_helpers import tiny_flags, tokens, train_rows

from open_lm.config.command_line import parse_args
from open_lm.config.diagnostics_section import DiagnosticsConfig, parse_steps
from open_lm.config.layout import MeshLayout, resolve_layout
from open_lm.config.sections import Config
from open_lm.distributed.processes import ALLOCATOR_NAMES, Runtime
from open_lm.errors import ConfigError
from open_lm.monitor.metric_names import metric
from open_lm.monitor.timing import PhaseClock
from open_lm.planner.memory import peak
from open_lm.planner.setup import TrainingSetup
from open_lm.planner.shapes import shape_of
from open_lm.training import out_of_memory
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


def trace(folder: Path, steps: str, positions: list[int], total_steps: int = 100) -> list[str]:
    """Call `at_step` with each position; return the names of the tables."""
    clock = PhaseClock(torch.device("cpu"))
    with Diagnostics(DiagnosticsConfig(profile_steps=steps), Runtime(), str(folder)) as diagnostics:
        diagnostics.limit_to(total_steps)
        for step in positions:
            diagnostics.at_step(step, clock)
    return sorted(path.name for path in folder.glob("*.txt"))


def test_a_run_that_is_stopped_inside_the_traced_steps_leaves_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert trace(tmp_path, "0:9", [0]) == []
    assert list(tmp_path.iterdir()) == [] and "its trace is not written" in caplog.text


def test_a_trace_ends_with_the_run_continues_after_an_epoch_and_starts_again_after_a_rollback(tmp_path: Path) -> None:
    names = {name: tmp_path / name for name in ("short", "epochs", "rollback")}
    for folder in names.values():
        folder.mkdir()
    assert trace(names["short"], "1:9", [0, 1, 2], total_steps=2) == ["profile_1-2_rank_0.txt"]
    assert trace(names["epochs"], "1:3", [0, 1, 2, 2, 3]) == ["profile_1-3_rank_0.txt"]
    assert trace(names["rollback"], "5:7", [4, 5, 6, 2, 3, 4, 5, 6, 7]) == ["profile_5-7_rank_0.txt"]


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
    device: Any = torch.device("cuda", 0)
    clock = PhaseClock(device)
    with Diagnostics(DiagnosticsConfig(memory_snapshot=True), Runtime(device=device), str(tmp_path)) as diagnostics:
        kept = torch.ones(1 << 20, device=device)
        os.kill(os.getpid(), signal.SIGUSR2)
        diagnostics.at_step(7, clock)
        assert kept.is_cuda
    (path,) = tmp_path.iterdir()
    assert path.name == "memory_step_7_rank_0.pickle" and path.stat().st_size > 1000


# ---------------------------------------------------------------------------------------------- exhausted memory
LIMITED = """
import resource, sys
import open_lm.training.run
from open_lm.errors import run_cli
from open_lm.main import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (800 << 20),) * 2)
sys.exit(run_cli(main, sys.argv[1:]))
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the memory limits of Linux")
def test_exhausted_memory_is_an_error_with_settings_that_need_less(tmp_path: Path) -> None:
    model = {"hidden_dim": 96, "n_layers": 4, "n_heads": 4, "seq_len": 512, "vocab_size": 256, "weight_tying": False}
    (tmp_path / "model.json").write_text(json.dumps({**model, "post_embed_norm": False}))
    flags = (
        f"--model {tmp_path}/model.json --dataset-type synthetic --train-num-samples 2097152 --epochs 1 "
        "--global-batch-size 2048 --precision fp32 --workers 0 --warmup 0 --name run --logs"
    ).split()
    command = [sys.executable, "-c", LIMITED, *flags, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2, result.stderr
    assert "error: the memory of rank 0 is exhausted at step 0 (step): " in result.stderr
    assert "can't allocate memory" in result.stderr and "Traceback" not in result.stderr
    assert "The planner predicts " in result.stderr and "\n  --accum-freq " in result.stderr


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("--model open_lm_1b --global-batch-size 64", 1),
        ("--model open_lm_7b --global-batch-size 256 --fsdp --fsdp-amp --activation-checkpointing 2", 8),
        ("--model open_lm_7b --global-batch-size 64", 8),
        ("--model open_lm_7b --global-batch-size 256 --fsdp --fsdp-amp --accum-freq 16", 8),
    ],
)
def test_advised_settings_keep_the_batch_and_fit(flags: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = 80 << 30
    monkeypatch.setattr(out_of_memory, "_capacity", lambda runtime: capacity)
    base = ["--train-data", "x", "--precision", "amp_bfloat16"]
    config = Config.from_namespace(parse_args([*base, *flags.split()]))
    layout = resolve_layout(config.parallel, world_size, world_size)
    lines = out_of_memory.advice(config, layout, Runtime(world_size=world_size, local_world_size=world_size))
    advised = [re.fullmatch(r"  (.+): ([\d.]+) GiB, about (\d+% slower|equally fast)", line) for line in lines[2:-1]]
    assert 1 <= len(advised) <= 4 and all(advised)
    for match in advised:
        assert match is not None
        added, _, removed = match[1].partition(" without ")
        kept = re.sub("|".join(removed.split()) + r"( \d+)?", "", flags) if removed else flags
        changed = Config.from_namespace(parse_args([*base, *kept.split(), *added.split()]))
        sharded = resolve_layout(changed.parallel, world_size, world_size)
        batch = config.data.global_batch_size // (sharded.data_size * changed.optim.accum_freq)
        setup = TrainingSetup(shape_of(changed.model), changed, sharded, batch)
        assert peak(setup).total < capacity and float(match[2]) < 80


def test_other_errors_are_not_explained() -> None:
    assert not out_of_memory.is_out_of_memory(RuntimeError("shapes do not match"))
    assert out_of_memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    config = Config.from_namespace(parse_args(["--train-data", "x"]))
    explained = out_of_memory.explained_out_of_memory(config, MeshLayout(), Runtime(), lambda name: None)
    with pytest.raises(ZeroDivisionError), explained:
        _ = 1 // 0


@pytest.mark.parametrize(
    ("name", "setting", "is_advised"),
    [("PYTORCH_ALLOC_CONF", "expandable_segments:True", False), ("PYTORCH_CUDA_ALLOC_CONF", "backend:native", True)],
)
def test_growing_segments_are_advised_only_if_they_are_off(
    name: str, setting: str, is_advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ALLOCATOR_NAMES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, setting)
    statistics = {"allocated_bytes.all.current": 2**30, "allocated_bytes.all.peak": 2**30}
    statistics["reserved_bytes.all.current"] = 3 * 2**30
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: statistics)
    monkeypatch.setattr(out_of_memory, "_capacity", lambda runtime: 4 * 2**30)
    usage = out_of_memory._usage(Runtime(device=torch.device("cuda", 0)))
    assert "the other 2.00 GiB" in usage
    assert (f"{name} replaces the default expandable_segments:True" in usage) == is_advised


# ---------------------------------------------------------------------------------------------- whole runs
@pytest.mark.processes
def test_new_and_resumed_runs_on_two_ranks_write_their_records(
    tmp_path: Path, ranks: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    data = write_source(tmp_path / "data", [20, 20])
    flags = [*tiny_flags(tmp_path, tmp_path / "logs"), "--dataset-manifest", data, "--name", "run"]
    flags += ["--train-num-samples", tokens(4), "--resume", "latest", "--energy", "device"]
    for epochs, steps in ((1, "2:4"), (2, "5:6")):
        ranks(2, "open_lm.main", *flags, "--epochs", str(epochs), "--profile-steps", steps)
    run = tmp_path / "logs/run"
    traces = {path.name for path in (run / "diagnostics").iterdir()}
    assert traces == {f"profile_{s}_rank_{r}.{e}" for s in ("2-4", "5-6") for r in (0, 1) for e in ("json.gz", "txt")}
    names = names_in(run / "diagnostics/profile_2-4_rank_1.json.gz")
    assert names.count("phase: backward") == 2 and any("gloo:all_reduce" in name for name in names)
    first, second = json.loads((run / "environment.json").read_text())["starts"]
    assert (first["step"], second["step"], first["world_size"], first["nodes"]) == (0, 4, 2, 1)
    assert first["devices"] == [{"name": "cpu", "memory_bytes": None, "ranks": 2}]
    assert [start["progress"]["tokens"] for start in (first, second)] == [int(tokens(4))] * 2
    assert first["progress"]["flops"] > 0 and first["data"]["fingerprint"] == second["data"]["fingerprint"]
    rows = train_rows(run)
    joules = sum(start["progress"]["energy_joules"] for start in (first, second))
    assert rows[3]["energy/kwh"] < rows[-1]["energy/kwh"] <= joules / 3.6e6 + 1e-9
    assert rows[-1]["perf/slowest_rank"] in (0, 1)
    unknown = [name for row in rows for name in row if name not in ("step", "time") and _is_other(name)]
    assert not unknown, f"open_lm/monitor/metric_names.py does not describe {set(unknown)}"
    assert "Seconds per step of each rank, over 4 steps" in (run / "out.log").read_text()
    assert "<html" in (run / "report.html").read_text()[:200].lower()


def _is_other(name: str) -> bool:
    entry = metric(name)
    return entry is None or "{value}" in entry.name
