"""scripts/benchmark_7B with a small model on two CPU ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_7B"
HELPERS = Path(__file__).resolve().parents[1] / "helpers"
ENV = {"PYTHON": sys.executable, "NPROC": "2", "TENSOR": "2", "OMP_NUM_THREADS": "1"}
FSDP = ["--fsdp", "--fsdp-amp"]
SCRIPTS = {
    "fsdp": FSDP,
    "zero2": [*FSDP, "--fsdp-zero2"],
    "hybrid": [*FSDP, "--fsdp-hybrid"],
    "offload": [*FSDP, "--fsdp-cpu-offload"],
    "gemini": [*FSDP, "--fsdp-cpu-offload"],
    "tensor": [*FSDP, "--tensor-parallel", "2"],
}
SIZES = ["--layers", "1", "--seq-length", "32", "--batch-size", "3", "--steps", "2", "--accum-freq", "2"]
SHORT = ["--seq-length", "16", "--steps", "1"]


def run_script(script: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(FOLDER / f"{script}.sh"), *flags], check=False, capture_output=True, text=True,
        env={**os.environ, **ENV, **env}, timeout=300,
    )  # fmt: skip


def check_result(
    result: dict[str, Any], flags: list[str], strategy: str, mesh: tuple[int, ...], batch: tuple[int, int, int]
) -> None:
    """Check a result. mesh: (replicate, shard, context, tensor); batch: (sequences, tokens of a sequence, steps)."""
    assert (result["strategy"], tuple(result["mesh"].values())) == (strategy, mesh)
    step = result["step_s"]
    assert (result["sequences_per_step"], result["sequence_tokens"], step["steps"]) == batch
    assert result["tokens_per_second"] == pytest.approx(batch[0] * batch[1] / step["median"])
    assert result["tokens_per_second_per_device"] == result["tokens_per_second"] / 2
    assert result["mfu"] == pytest.approx(result["tflops_per_device"] / result["peak_tflops"])
    assert 0 < step["min"] <= step["median"] <= step["max"]
    assert 0 < result["memory_bytes"]["min"] <= result["memory_bytes"]["max"]
    assert result["loss"]["last"] < result["loss"]["first"]
    assert set(flags) <= set(result["flags"])


def test_script_starts_the_ranks_and_prints_the_measurement() -> None:
    done = run_script("hybrid", "--shrink", *SIZES)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "destroy_process_group" not in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    check_result(result, [*SCRIPTS["hybrid"], "--accum-freq", "2"], "ZeRO-3, hybrid", (1, 2, 1, 1), (12, 32, 2))
    for word in ("tokens/s", "TFLOP/s", "MFU", "memory", "loss"):
        assert word in done.stdout


def test_every_strategy_is_measured(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    recomputation = ["--activation-checkpointing", "none"]
    cases: list[tuple[list[str], str, tuple[int, ...], int]] = [
        (SCRIPTS["fsdp"], "ZeRO-3", (1, 2, 1, 1), 4),
        (SCRIPTS["zero2"], "ZeRO-2", (1, 2, 1, 1), 4),
        ([*SCRIPTS["gemini"], *recomputation], "ZeRO-3, offload", (1, 2, 1, 1), 4),
        (SCRIPTS["tensor"], "ZeRO-3, tensor 2", (1, 1, 1, 2), 2),
    ]
    command_lines = [["--shrink", *SHORT, *flags] for flags, *_ in cases]
    done = torchrun(2, "benchmark_7b_worker", json.dumps(command_lines))
    results = json.loads(done.stdout.splitlines()[-1])
    for result, (flags, strategy, mesh, sequences) in zip(results, cases, strict=True):
        check_result(result, flags, strategy, mesh, (sequences, 16, 1))


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line_of_a_script(script: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    hosts = str(tmp_path / "hosts.txt")
    done = run_script(script, "--shrink", "--lr", "0.1", PYTHON=str(python), HOSTS=hosts)
    launcher, *words = done.stdout.splitlines()
    assert Path(launcher).resolve() == (FOLDER.parent / "launch.py").resolve()
    assert words[:4] == ["--nproc-per-node", "2", "--hosts", hosts]
    assert words[4:] == [str(FOLDER / "benchmark.py"), *SCRIPTS[script], "--shrink", "--lr", "0.1"]


def test_missing_hosts_file_is_an_error(tmp_path: Path) -> None:
    done = run_script("fsdp", HOSTS=str(tmp_path / "hosts.txt"))
    assert done.returncode == 2 and "hosts.txt" in done.stderr
