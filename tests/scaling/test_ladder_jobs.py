"""Jobs of ladders: training, evaluation on tasks, the target, diverged runs, and scripts for schedulers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizer_helpers import write_tokenizer

from open_lm.errors import ConfigError, DataError
from open_lm.scaling import command
from open_lm.scaling.jobs import EVALUATE, TRAIN, jobs_of
from open_lm.scaling.ladder_files import read_ladder
from open_lm.scaling.number_types import target
from open_lm.scaling.runs import read_runs

ROOT = Path(__file__).resolve().parents[2]
TASKS = """icl_tasks:
- label: letters
  dataset_uri: ${data_dir}/letters.jsonl
  num_fewshot: [0]
  icl_task_type: multiple_choice
"""


@pytest.fixture(scope="module")
def small_ladder(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that plans a ladder of one run, its target and the evaluation of both."""
    data = shared_dir / "compat" / "run" / "data"
    tasks = tmp_path_factory.mktemp("tasks")
    (tasks / "tasks.yaml").write_text(TASKS, encoding="utf-8")
    example = {"query": "a b c", "choices": ["d", "7"], "gold": 0}
    (tasks / "letters.jsonl").write_text(json.dumps(example) + "\n", encoding="utf-8")
    write_tokenizer(tasks / "tokenizer.json")

    def plan(folder: Path, **evaluation: Any) -> Path:
        folder.mkdir(exist_ok=True)
        evaluate = {
            "eval-yaml": [str(tasks / "tasks.yaml")], "data_dir": str(tasks), "device": "cpu", "precision": "fp32",
            "tokenizer": str(tasks / "tokenizer.json"), **evaluation,
        }  # fmt: skip
        base = {
            "dataset_manifest": [str(data / "manifest.jsonl")], "val_data": [str(data / "00000007.tar")],
            "val_max_batches": 2, "val_iter_ci": 20, "workers": 0, "checkpoint_format": "sharded", "report": "none",
            "evaluate": evaluate,
        }  # fmt: skip
        (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
        command.main([
            "plan", str(folder / "ladder"), "--sizes", "3e4", "--run-tokens", "8e3", "--vocab-size", "264",
            "--seq-len", "64", "--global-batch-size", "32", "--target", "8e4:4096", "--train-target",
            "--base", str(folder / "base.yaml"),
        ])  # fmt: skip
        return folder / "ladder"

    return plan


# Commands of Slurm: sbatch runs the job at once, and prints a number.
SLURM = {
    "sbatch": """#!/bin/bash
set -eu
for word in "$@"; do case $word in --job-name=*) export SLURM_JOB_NAME=${word#*=};; esac; done
while [[ ${1-} == --* && $1 != --wrap ]]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_JOB_ID=7 SLURM_NODELIST=localhost
if [ "$1" = --wrap ]; then bash -c "$2" >&2; else bash "$@" >&2; fi
echo 7
""",
    "srun": """#!/bin/sh
shift
exec "$@"
""",
}


def run_script(script: Path, tools: Path) -> None:
    """Run a script of jobs with the programs in a folder."""
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["sh", str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.processes
def test_slurm_jobs_train_and_evaluate(small_ladder: Callable[..., Path], tmp_path: Path) -> None:
    ladder = small_ladder(tmp_path)
    for name, text in SLURM.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    command.main(["run", str(ladder), "--launcher", "slurm"])
    run_script(ladder / "jobs.sh", tmp_path)
    table = tmp_path / "runs.json"
    command.main(["collect", str(table), str(ladder)])
    (run,) = read_runs([str(table)])
    assert run.facts["name"] == "d=32_l=2_h=4_t8000" and set(run.accuracy) == {"letters"}


@pytest.mark.processes
def test_jobs_of_hosts_train_on_this_machine(small_ladder: Callable[..., Path], tmp_path: Path) -> None:
    ladder = small_ladder(tmp_path)
    (tmp_path / "hosts.txt").write_text("localhost slots=1\n", encoding="utf-8")
    command.main(["run", str(ladder), "--launcher", "hosts", "--hosts", str(tmp_path / "hosts.txt")])
    script = ladder / "jobs.sh"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert [line.split()[6] for line in lines if line.startswith("open-lm")] == ["train", "evaluate"]
    script.write_text("\n".join(line for line in lines if " evaluate " not in line), encoding="utf-8")
    run_script(script, tmp_path)
    training, evaluation = jobs_of(read_ladder(str(ladder)), read_ladder(str(ladder)).runs)[:2]
    assert training.is_finished() and not evaluation.is_finished()


def test_the_target_is_trained_last_and_evaluated(
    small_ladder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ladder = small_ladder(tmp_path)
    command.main(["run", str(ladder), "--target", "--estimate"])
    output = capsys.readouterr().out
    assert re.search(r"d=48_l=2_h=4_target +\d+\.\d minutes\nestimate: ", output)
    assert "[1/2] d=48_l=2_h=4_target: " in output and "[2/2] d=48_l=2_h=4_target_evaluate: " in output
    command.main(["run", str(ladder), "--target"])
    assert "1 of 1 runs are finished\n1 of 1 runs are evaluated" in capsys.readouterr().out
    table = tmp_path / "runs.json"
    command.main(["collect", str(table), str(ladder)])
    assert "d=32_l=2_h=4_t8000: not trained yet" in capsys.readouterr().err
    (run,) = read_runs([str(table)])
    assert (run.params, run.tokens) == target(str(ladder)) == (81_072, 4096)
    assert run.facts["started"] <= run.facts["ended"] and set(run.accuracy) == {"letters"}


def test_tasks_are_evaluated_after_each_run_or_at_the_end(small_ladder: Callable[..., Path], tmp_path: Path) -> None:
    for when, expected in (("run", [TRAIN, EVALUATE] * 2), ("end", [TRAIN] * 2 + [EVALUATE] * 2)):
        ladder = read_ladder(str(small_ladder(tmp_path / when, when=when)))
        assert [job.command for job in jobs_of(ladder, ladder.runs)] == expected
    for evaluation, message in (
        ({"when": "never"}, "evaluate, when: found 'never', expected run .* or end"),
        ({"output": "x"}, "evaluate: found output, which `run` decides"),
        ({"eval-yaml": ["missing.yaml"]}, "evaluate, eval_yaml: found no file missing.yaml"),
        ({"precison": "fp32"}, "evaluate: .*--precison"),
    ):
        with pytest.raises(ConfigError, match=message):
            small_ladder(tmp_path / "rejected", **evaluation)


def test_a_diverged_run_is_listed_and_left_out(
    small_ladder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ladder = small_ladder(tmp_path, when="end")
    _, planned = read_ladder(str(ladder)).runs
    config = yaml.safe_load(Path(planned.config).read_text(encoding="utf-8")) | {"lr": 1e30, "max_skipped_steps": 0}
    Path(planned.config).write_text(yaml.safe_dump({**config, "grad_clip_norm": None}), encoding="utf-8")
    command.main(["run", str(ladder), "--target"])
    assert "warning: d=48_l=2_h=4_target failed: training diverged at step" in capsys.readouterr().out
    command.main(["run", str(ladder), "--target"])
    output = capsys.readouterr().out
    assert "warning: d=48_l=2_h=4_target diverged, and is left out" in output and "[1/" not in output
    with pytest.raises(DataError, match="diverged, so it has no final loss"):
        command.main(["collect", str(tmp_path / "runs.json"), str(ladder)])
