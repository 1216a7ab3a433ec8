"""scripts/benchmark_7B: every strategy through its own script, with a small model on two CPU ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_7B"
ENV = {"PYTHON": sys.executable, "NPROC": "2", "TENSOR": "2", "OMP_NUM_THREADS": "1"}


def benchmark(script: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(FOLDER / f"{script}.sh"), *flags], check=False, capture_output=True, text=True,
        env={**os.environ, **ENV, **env},
    )  # fmt: skip


SIZES = ["--layers", "1", "--seq-length", "32", "--batch-size", "3", "--steps", "2", "--accum-freq", "2"]


@pytest.mark.parametrize(
    ("script", "flags", "strategy", "mesh", "batch"),
    [
        ("fsdp", [], "ZeRO-3", (1, 2, 1, 1), (4, 64, 4)),
        ("zero2", [], "ZeRO-2", (1, 2, 1, 1), (4, 64, 4)),
        ("hybrid", SIZES, "ZeRO-3, hybrid", (1, 2, 1, 1), (12, 32, 2)),
        ("gemini", ["--activation-checkpointing", "none"], "ZeRO-3, offload", (1, 2, 1, 1), (4, 64, 4)),
        ("tensor", [], "ZeRO-3, tensor 2", (1, 1, 1, 2), (2, 64, 4)),
    ],
)
def test_every_strategy_is_measured(
    script: str, flags: list[str], strategy: str, mesh: tuple[int, ...], batch: tuple[int, int, int]
) -> None:
    done = benchmark(script, "--shrink", *flags)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "destroy_process_group" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (found["strategy"], tuple(found["mesh"].values())) == (strategy, mesh)
    step = found["step_s"]
    assert (found["sequences_per_step"], found["sequence_tokens"], step["steps"]) == batch
    assert found["tokens_per_second"] == pytest.approx(batch[0] * batch[1] / step["median"])
    assert found["tokens_per_second_per_device"] == found["tokens_per_second"] / 2
    assert found["mfu"] == pytest.approx(found["tflops_per_device"] / found["peak_tflops"])
    assert 0 < step["min"] <= step["median"] <= step["max"]
    assert 0 < found["memory_bytes"]["min"] <= found["memory_bytes"]["max"]
    assert found["loss"]["last"] < found["loss"]["first"]
    assert set(flags) <= set(found["flags"]) | set(SIZES)
    for word in ("tokens/s", "TFLOP/s", "MFU", "memory", "loss"):
        assert word in done.stdout


def test_a_missing_hosts_file_is_told(tmp_path: Path) -> None:
    done = benchmark("fsdp", HOSTS=str(tmp_path / "hosts.txt"))
    assert done.returncode == 2 and "hosts.txt" in done.stderr
