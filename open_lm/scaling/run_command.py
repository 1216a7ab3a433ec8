"""`run`: train and evaluate the runs of a ladder that are missing, here or as jobs of a scheduler."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from open_lm import storage
from open_lm.config.registry import LAUNCHERS
from open_lm.errors import ConfigError, UserError
from open_lm.scaling.jobs import EVALUATE, TRAIN, Job, has_diverged, is_trained, jobs_of
from open_lm.scaling.ladder_files import Ladder, PlannedRun, read_ladder
from open_lm.system.names import user_path

JOBS = "jobs.sh"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `run`."""
    parser.add_argument("ladder", type=user_path, metavar="FOLDER", help="folder that `plan` wrote")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", nargs="+", metavar="RUN", help="names of runs (default: all but the target)")
    chosen.add_argument("--target", action="store_true", help="the run of the target; see `plan --train-target`")
    text = "first measure the speed of each size on this machine, and print the minutes of all missing runs"
    parser.add_argument("--estimate", action="store_true", help=text)
    add_launch_flags(parser)


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select how runs are started; see `check_launch_flags`."""
    add = parser.add_argument
    add(
        "--launcher",
        choices=tuple(LAUNCHERS),
        default="local",
        help=f"{LAUNCHERS.summary()} (default: %(default)s)",
    )
    add("--nproc-per-node", type=int, default=1, metavar="N", help="processes per machine (default: %(default)s)")
    add("--hosts", type=user_path, metavar="FILE", help="with --launcher hosts: the file of `open-lm launch --hosts`")
    add("--dry-run", action="store_true", help="print the commands, and start nothing")


def run(args: argparse.Namespace) -> None:
    """Train and evaluate the missing runs.

    Raises:
        ConfigError: an unknown run, or flags that do not fit the launcher.
        UserError: a run failed.
    """
    check_launch_flags(args)
    ladder = read_ladder(args.ladder)
    if args.estimate:
        print(estimate_text([planned for planned in ladder.runs if not is_trained(planned)]), flush=True)
    jobs = jobs_of(ladder, _chosen(ladder, args))
    missing = [job for job in jobs if not job.is_finished()]
    for command, what in ((TRAIN, "runs are finished"), (EVALUATE, "runs are evaluated")):
        chosen = [job for job in jobs if job.command == command]
        if chosen:
            number = sum(job not in missing for job in chosen)
            print(f"{number} of {len(chosen)} {what}", flush=True)
    launch: Callable[[Sequence[Job], argparse.Namespace], None] = LAUNCHERS.get(args.launcher)
    launch(without_diverged(missing), args)


def _chosen(ladder: Ladder, args: argparse.Namespace) -> list[PlannedRun]:
    """Return the runs of --only, the target with --target, or else all runs but the target."""
    if args.target and not ladder.target:
        raise ConfigError(f"--target: {args.ladder} has no run of its target; write it with `plan --train-target`")
    if args.target:
        return ladder.target
    unknown = sorted(set(args.only or ()) - {planned.name for planned in ladder.runs})
    if unknown:
        raise ConfigError(f"--only: found {', '.join(unknown)}, expected names of runs in {args.ladder}")
    return [
        planned for planned in ladder.runs if (planned.name in args.only if args.only else not planned.is_target)
    ]  # fmt: skip


def without_diverged(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs without those of diverged runs and their branches. Warn about each diverged run."""
    diverged = {job.run.name for job in jobs if has_diverged(job.run.folder)}
    for name in sorted(diverged):
        print(f"warning: {name} diverged, and is left out with its branches; plan its size with a lower --lr")
    return [job for job in jobs if not diverged & {job.run.name, job.run.trunk}]


def estimate_text(runs: Sequence[PlannedRun]) -> str:
    """Return a table of the minutes that runs take on this machine."""
    from open_lm.scaling.speed import estimate_seconds

    seconds = estimate_seconds(runs)
    lines = [f"{planned.name:<24} {seconds[planned.name] / 60:>6.1f} minutes" for planned in runs]
    total = sum(seconds.values()) / 60
    return "\n".join([*lines, f"estimate: {total:.1f} minutes of training, without starts and validation"])


def check_launch_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError if the flags of `add_launch_flags` do not fit together."""
    if args.nproc_per_node < 1:
        raise ConfigError(f"--nproc-per-node: found {args.nproc_per_node}, expected at least 1")
    if (args.launcher == "hosts") != (args.hosts is not None):
        raise ConfigError("--launcher hosts and --hosts FILE belong together: pass both or neither")


@LAUNCHERS.register("local", help="one after the other on this machine")
def run_locally(missing: Sequence[Job], args: argparse.Namespace) -> None:
    """Run the jobs sequentially. Raise UserError if one fails; a second `run` continues there."""
    done_flops, done_s, diverged = 0.0, 0.0, set[str]()
    for number, job in enumerate(missing, start=1):
        if diverged & {job.run.name, job.run.trunk}:
            print(f"[{number}/{len(missing)}] {job.name}: left out, because its run or trunk diverged", flush=True)
            continue
        print(
            f"[{number}/{len(missing)}] {job.name}: {shlex.join(['python', *job.words(args.nproc_per_node)])}",
            flush=True,
        )
        if args.dry_run:
            continue
        start = time.monotonic()
        outcome = run_job(job, args.nproc_per_node)
        if has_diverged(job.run.folder):
            print(f"warning: {job.name} {outcome}", flush=True)
            diverged.add(job.run.name)
        elif not job.is_finished():
            raise UserError(
                f"{job.name} {outcome} ({len(missing) - number + 1} jobs are missing); see {job.run.folder}/out.log, "
                "then start the same command again, which continues there"
            )
        done_flops, done_s = done_flops + job.cost_flops, done_s + time.monotonic() - start
        rest_flops = sum(item.cost_flops for item in missing[number:])
        if done_flops and rest_flops:
            minutes = rest_flops * done_s / done_flops / 60
            print(f"about {minutes:.0f} minutes remain, at {done_flops / done_s:.3g} FLOP/s", flush=True)


def run_job(job: Job, processes: int) -> str:
    """Run a job and describe how it ended if it is not finished. A job of one process runs in this process."""
    if processes > 1:
        code = subprocess.run([sys.executable, *job.words(processes)], check=False).returncode
        return f"ended with exit code {code}"
    try:
        importlib.import_module(job.module).main(list(job.flags))
    except UserError as error:
        return f"failed: {error}"
    return "stopped before its end"


def _write_jobs(args: argparse.Namespace, lines: Sequence[str], advice: str) -> None:
    """Write a script of commands into the folder of the ladder, or print it."""
    text = "\n".join(["#!/bin/sh", f"# {advice}", "set -eu", *lines, ""])
    if args.dry_run:
        print(text, end="")
        return
    path = Path(args.ladder) / JOBS
    storage.write_text(path, text)
    print(f"wrote {path}: {advice}")


@LAUNCHERS.register("slurm", help="a script that submits a job per run, with scripts/slurm.sbatch")
def write_slurm(missing: Sequence[Job], args: argparse.Namespace) -> None:
    """Write the script. Branches depend on the job of their trunk, evaluations on that of their run."""
    lines, variables = [], {job.name: f"job_{index}" for index, job in enumerate(missing)}
    for job in missing:
        ranks = args.nproc_per_node if job.command == TRAIN else 1  # torchrun starts the ranks of an evaluation
        words = ["sbatch", "--parsable", "--nodes=1", f"--ntasks-per-node={ranks}"]
        words += [f"--gpus-per-node={args.nproc_per_node}", f"--job-name={job.name}"]
        depends = f'--dependency=afterok:"${variables[job.needs]}" ' if job.needs in variables else ""
        program = ["scripts/slurm.sbatch", *job.flags]
        if job.command == EVALUATE:
            program = ["--wrap", f'"${{PYTHON:-python}}" {shlex.join(job.words(args.nproc_per_node))}']
        lines.append(f"{variables[job.name]}=$({shlex.join(words)} {depends}{shlex.join(program)})")
    _write_jobs(args, lines, "run it in the checkout, on a machine that can submit jobs; it submits one job per run")


@LAUNCHERS.register("ray", help="a script that submits one Ray job per run")
def write_ray(missing: Sequence[Job], args: argparse.Namespace) -> None:
    """Write the script. Jobs wait for each other, so that branches find their trunk."""
    submit = ["ray", "job", "submit", "--entrypoint-num-gpus", str(args.nproc_per_node), "--"]
    submit += ["env", "-C", os.getcwd(), "python"]  # a job of Ray starts in another folder
    lines = [shlex.join([*submit, *job.words(args.nproc_per_node)]) for job in missing]
    _write_jobs(
        args, lines, "run it where RAY_ADDRESS is the cluster, whose machines share this folder; it waits for each job"
    )


@LAUNCHERS.register("hosts", help="a script that trains one run after the other on all hosts of --hosts")
def write_hosts(missing: Sequence[Job], args: argparse.Namespace) -> None:
    """Write the script for `open-lm launch`."""
    start = ["open-lm", "launch", "--hosts", args.hosts, "--nproc-per-node", str(args.nproc_per_node)]
    lines = [shlex.join([*start, job.command, *job.flags]) for job in missing]
    _write_jobs(args, lines, "run it on a machine that reaches all hosts")
