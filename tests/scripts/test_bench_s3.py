"""The benchmark of reading from S3 in small: its own server, the bare client and ours, on the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_s3.py"


def test_ours_is_measured_beside_a_bare_client_and_the_server_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--shards", "4", "--sequences-in-shard", "32", "--rounds", "1"]
    command += ["--workers", "1", "--work-dir", str(tmp_path), "--line-mb", "50"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    first, _, *rows = done.stdout.splitlines()
    assert first.startswith("4 shards of 0.2 MB from the server lean (50 MB/s at most), 4 connections, ")
    assert [row[:20].rstrip() for row in rows] == ["only downloaded", "ours, 1 workers"]
    for row in rows:
        median, least, greatest, share, processor_s = map(float, row[20:].split())
        assert median == least == greatest <= 50 and share > 0 and processor_s > 0
    assert rows[0].split()[-2] == "1.00"
