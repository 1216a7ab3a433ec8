"""Test ranks under Slurm's srun and Open MPI's mpirun; fakes of these commands start real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import losses, training, until

from open_lm.distributed.processes import _slurm_master

ROOT = Path(__file__).resolve().parents[2]

# Starts two ranks with the environment variables of srun or mpirun, and forwards SIGUSR1 like srun.
FAKE_LAUNCHER = """#!{python}
import os, signal, subprocess, sys
kind = os.path.basename(sys.argv[0])
command = [word for word in sys.argv[1:] if word != "--kill-on-bad-exit=1"]
ranks = []
signal.signal(signal.SIGUSR1, lambda *_: [rank.send_signal(signal.SIGUSR1) for rank in ranks])
for rank in range(2):
    if kind == "srun":
        names = dict(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS=2, SLURM_NTASKS_PER_NODE=2, SLURM_STEP_ID=0)
    else:
        names = dict(OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_LOCAL_RANK=rank, OMPI_COMM_WORLD_SIZE=2)
        names["OMPI_COMM_WORLD_LOCAL_SIZE"] = 2
    env = {{**os.environ, **{{name: str(value) for name, value in names.items()}}}}
    ranks.append(subprocess.Popen(command, env=env))
sys.exit(max(rank.wait() for rank in ranks))
"""

RANK = """
import torch
from open_lm.config.sections import ParallelConfig
from open_lm.distributed.processes import gather_objects, init_runtime, shutdown, sum_over_ranks
runtime = init_runtime(ParallelConfig())
total = sum_over_ranks(torch.tensor(runtime.rank + 1)).item()
values = gather_objects((runtime.rank, runtime.local_rank, runtime.world_size, runtime.local_world_size, total))
if runtime.is_master:
    print(values)
shutdown(runtime)
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Create a folder with srun, mpirun, and an scontrol that writes its arguments to a file."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("srun", "mpirun"):
        (folder / name).write_text(FAKE_LAUNCHER.format(python=sys.executable))
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def environment(tools: Path) -> dict[str, str]:
    """Return the environment of a Slurm job, with a free port as the job id."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        job = server.getsockname()[1]
    job_variables = {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NAME": "job",
        "SLURM_NODELIST": "localhost",
        "PYTHON": sys.executable,
    }
    return {**os.environ, **job_variables, "OMP_NUM_THREADS": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_ranks_connect_to_each_other(tools: Path, launcher: str) -> None:
    env = environment(tools)
    if launcher == "mpirun":
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": env["SLURM_JOB_ID"]}
    done = subprocess.run(
        [tools / launcher, sys.executable, "-c", RANK], env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([(0, 0, 2, 2, 3), (1, 1, 2, 2, 3)])


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-010,12],cpu1", "gpu003"),
        ("gpu-[7]", "gpu-7"),
        ("r[1-2]n[08-9].x,y", "r1n08.x"),
    ],
)
def test_the_first_slurm_node_is_the_master(nodes: str, first: str) -> None:
    job = {"SLURM_NODELIST": "other[1-9]", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"}
    job["SLURM_PROCID"] = "0"
    assert _slurm_master(job) == {"MASTER_ADDR": first, "MASTER_PORT": "23458"}
    assert _slurm_master({"SLURM_STEP_NODELIST": nodes}) == {}
    assert _slurm_master({"SLURM_JOB_ID": "1"}) == {}


@pytest.mark.processes
def test_a_slurm_job_saves_before_its_time_limit_and_is_requeued(tools: Path, tmp_path: Path) -> None:
    env = environment(tools)
    flags = training(tmp_path, 10**6)[2:]
    command = ["bash", str(ROOT / "scripts/slurm.sbatch"), *flags]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        until(process.stdout, "Train Epoch")
        process.send_signal(signal.SIGUSR1)
        rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0, rest
    assert (tmp_path / "asked").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"
    steps = max(losses(tmp_path / "job"))
    (saved,) = (tmp_path / "job/checkpoints").glob("step_*/checkpoint.json")
    assert json.loads(saved.read_text())["extra"]["progress"]["step"] == steps
