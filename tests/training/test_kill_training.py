"""Killed and restarted trainings equal uninterrupted ones, by scripts/kill_training.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/kill_training.py"


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
def test_killed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    ways = ("rank", "checkpoint", "upload")
    command = [sys.executable, str(SCRIPT), "--kills", str(len(ways)), "--steps", "96", "--ways", *ways, "--", "--fsdp"]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    counted = json.loads(result.stdout.splitlines()[-1])
    assert counted["kills"] == len(ways) and counted["finished"] >= 1 and counted["differing"] == 0
