"""Run `fault_worker` ranks under the package's torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(folder: Path, fault: str, *flags: str) -> subprocess.Popen[str]:
    """Start two ranks of `fault_worker FAULT`, which write their results to `folder`."""
    command = [sys.executable, "-m", "open_lm.utils.torchrun", "--standalone", "--nproc-per-node", "2", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    return subprocess.Popen(
        [*command, "-m", "fault_worker", fault, str(folder)],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, fault: str, *flags: str) -> tuple[int, str]:
    """Run `launch` to its end, and return (exit code, stderr)."""
    with launch(folder, fault, *flags) as process:
        stderr = process.communicate(timeout=300)[1]
    return process.returncode, stderr
