"""Launch files of the pipeline, with fakes of the pipeline, Slurm and torchrun; the Dockerfile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
# Writes its arguments and the variables of a task to a file, then waits for SIGUSR1 if STOP is set.
RECORDER = f"""#!{sys.executable}
import json, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(130))
names = [name for name in os.environ if name.startswith("SLURM_")]
with open(os.environ["RECORD"], "w") as file:
    json.dump({{"program": os.path.basename(sys.argv[0]), "arguments": sys.argv[1:], "variables": names}}, file)
print("started", flush=True)
if "STOP" in os.environ:
    signal.pause()
"""
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0"}


def write_program(path: Path, text: str = RECORDER) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def environment(folder: Path, **variables: str) -> dict[str, str]:
    write_program(folder / "tools" / "scontrol", f'#!/bin/sh\necho "$@" > {folder}/asked\n')
    path = f"{folder / 'tools'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RECORD": str(folder / "record"), **variables}


@pytest.mark.processes
@pytest.mark.parametrize("stopped", [False, True])
def test_slurm_job_runs_the_pipeline_and_requeues_itself_after_a_stop(tmp_path: Path, stopped: bool) -> None:
    write_program(tmp_path / "scripts" / "e2e" / "pipeline.sh")
    env = environment(tmp_path, **SLURM, SLURM_LOCALID="0", **({"STOP": "1"} if stopped else {}))
    command = ["bash", str(LAUNCH / "e2e.sbatch"), "settings.yaml", "--work-dir", "work"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None and job.stdout.readline() == "started\n"
        if stopped:
            job.send_signal(signal.SIGUSR1)
        assert job.wait() == 0
    record = json.loads((tmp_path / "record").read_text())
    launcher = "srun --ntasks=16 --ntasks-per-node=8 --kill-on-bad-exit=1"
    assert record["arguments"] == ["settings.yaml", "--work-dir", "work", "--launcher", launcher]
    assert record["variables"] == ["SLURM_JOB_ID"]  # stages other than the training are not tasks of Slurm
    assert (tmp_path / "asked").exists() == stopped
    if stopped:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"


def sky_task(name: str) -> dict[str, object]:
    task = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    assert set(task) <= {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}  # of SkyPilot's tasks
    return task


def run_sky(folder: Path, name: str, program: str, **variables: str) -> list[str]:
    """Run the commands of a SkyPilot task on a node of two with 4 GPUs each; return the arguments of the program."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    write_program(folder / program)
    task = sky_task(name)
    settings = {str(key): str(value) for key, value in dict(task["envs"]).items()}  # type: ignore[call-overload]
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "4"}
    env = environment(folder, **{**settings, **node, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", **variables})
    subprocess.run(["bash", "-euc", str(task["run"])], cwd=folder, env=env, check=True, capture_output=True)
    return list(json.loads((folder / "record").read_text())["arguments"])


@pytest.mark.processes
def test_sky_runs_the_pipeline_with_a_rank_per_gpu(tmp_path: Path) -> None:
    words = run_sky(
        tmp_path, "sky_e2e.yaml", "scripts/e2e/pipeline.sh", BUCKET="s3://b/x", PIPELINE_FLAGS="--until plan"
    )
    assert words == ["scripts/e2e/lf_llm_269m.yaml", "--launcher", "torchrun --nproc-per-node 4", "--set",
                     "train.remote-sync=s3://b/x", "--until", "plan"]  # fmt: skip


@pytest.mark.processes
def test_sky_starts_torchrun_on_every_node(tmp_path: Path) -> None:
    words = run_sky(tmp_path, "sky_train.yaml", "tools/python", TRAIN_FLAGS="--model open_lm_1b --fsdp")
    text = " ".join(words)
    assert text.startswith("-m open_lm.utils.torchrun --nnodes 2 --node-rank 1 --nproc-per-node 4")
    assert "--rdzv-endpoint 10.0.0.1:29400 -m open_lm.main --name run --resume latest" in text
    assert text.endswith("--cache-dir cache --model open_lm_1b --fsdp")


@pytest.mark.processes
def test_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    result = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and not result.stdout, result.stdout


def test_dockerfile_has_both_targets_and_existing_sources() -> None:
    lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    targets = [line.split()[-1] for line in lines if line.startswith("FROM ")]
    assert {"cpu", "cuda"} <= set(targets)
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    required = [word.rstrip("\\") for line in lines if "--requirement" in line for word in line.split() if "/" in word]
    assert len(required) >= 2 * 7 and all((ROOT / name).exists() for name in (*copied, *required))


@pytest.mark.processes
@pytest.mark.parametrize("name", ["pipeline.sh", "ladder_tiny.sh", "posttrain_tiny.sh", "slimpajama.sh"])
def test_scripts_take_the_installed_environment_or_say_how_to_install_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "scripts" / "e2e"
    folder.mkdir(parents=True)
    for script in (name, "python.sh"):
        shutil.copy(ROOT / "scripts" / "e2e" / script, folder / script)
    variables = {"PATH": os.environ["PATH"]}
    write_program(tmp_path / "bin" / "python", "#!/bin/sh\nexit 1\n")
    command = ["bash", str(folder / name), str(tmp_path / "work")]
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, env=variables | {"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "python cannot import torch; run `make install`" in done.stderr
    recorder = f'#!/bin/sh\necho "$@" >> {tmp_path / "record"}; [ "$1" = -c ]\n'
    write_program(tmp_path / ".venv" / "bin" / "python", recorder)
    subprocess.run(command, env=variables | {"PATH": path}, capture_output=True, check=False)
    assert len((tmp_path / "record").read_text().splitlines()) >= 2  # the check of torch, and the first program
