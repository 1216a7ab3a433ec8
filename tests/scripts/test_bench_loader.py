"""The loader's benchmark in small: it measures, compares on the same tokens, and says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_loader.py"


def test_ours_and_a_peer_are_measured_and_a_missing_peer_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--sequences", "64", "--batch-size", "4", "--seconds", "0.01"]
    command += ["--rounds", "1", "--workers", "1", "--peer-python", str(tmp_path / "none")]
    command += ["--only", "ours, npy", "ours, txt", "webdataset npy", "litdata"]
    env = {**os.environ, "OPEN_LM_SHARED": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "MISSING litdata: " in done.stdout and "make install-bench" in done.stdout
    lines = done.stdout.splitlines()
    assert any("0.1 million tokens of random ids" in line and "page cache warm" in line for line in lines)
    rows = [line for line in lines if line.startswith(("ours", "webdataset"))]
    assert [row[:28].rstrip() for row in rows] == ["ours, npy", "ours, txt", "webdataset npy"]
    for row in rows:
        workers, median, least, greatest, ratio = row[28:].split()[:5]
        assert workers == "1" and float(median) == float(least) == float(greatest) and float(ratio) > 0
    assert rows[0].endswith("1.00 x")
