"""`run`: train the runs of a ladder that are missing, on this machine or as jobs of a scheduler."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from open_lm import storage
from open_lm.config.registry import LAUNCHERS
from open_lm.errors import ConfigError, UserError
from open_lm.scaling.ladder_files import PlannedRun, read_ladder
from open_lm.system.names import user_path

JOBS = "jobs.sh"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `run`."""
    parser.add_argument("ladder", type=user_path, metavar="FOLDER", help="folder that `plan` wrote")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="names of runs (default: all that are missing)")
    add_launch_flags(parser)


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how runs are started; see `check_launch_flags`."""
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
    """Train what is missing.

    Raises:
        ConfigError: an unknown run, or flags that do not fit the launcher.
        UserError: a run failed.
    """
    check_launch_flags(args)
    _, runs = read_ladder(args.ladder)
    unknown = sorted(set(args.only or ()) - {planned.name for planned in runs})
    if unknown:
        raise ConfigError(f"--only: found {', '.join(unknown)}, expected names of runs in {args.ladder}")
    chosen = [planned for planned in runs if not args.only or planned.name in args.only]
    missing = [planned for planned in chosen if not is_finished(planned)]
    print(f"{len(chosen) - len(missing)} of {len(chosen)} runs are finished", flush=True)
    launch: Callable[[Sequence[PlannedRun], argparse.Namespace], None] = LAUNCHERS.get(args.launcher)
    launch(missing, args)


def check_launch_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError if the flags of `add_launch_flags` do not fit together."""
    if args.nproc_per_node < 1:
        raise ConfigError(f"--nproc-per-node: found {args.nproc_per_node}, expected at least 1")
    if (args.launcher == "hosts") != (args.hosts is not None):
        raise ConfigError("--launcher hosts and --hosts FILE belong together: pass both or neither")


def is_finished(planned: PlannedRun) -> bool:
    """Return whether a run has trained on all its tokens and ended by itself, after its last validation."""
    if not Path(planned.folder).is_dir():
        return False
    from open_lm.report.collect import collect_run
    from open_lm.report.records import FINISHED

    return collect_run(planned.folder).summary.state == FINISHED


def command_of(planned: PlannedRun, processes: int) -> list[str]:
    """Return the command that trains a run, or continues it."""
    start = [sys.executable, "-m", "open_lm.main"]
    if processes > 1:
        start = [sys.executable, "-m", "open_lm.utils.torchrun", "--nproc-per-node", str(processes)]
        start += ["-m", "open_lm.main"]
    return [*start, "--config", planned.config]


@LAUNCHERS.register("local", help="one after the other on this machine")
def run_locally(missing: Sequence[PlannedRun], args: argparse.Namespace) -> None:
    """Run the commands one after the other. Raise UserError if one fails; a second `run` continues there."""
    for number, planned in enumerate(missing, start=1):
        command = command_of(planned, args.nproc_per_node)
        print(f"[{number}/{len(missing)}] {planned.name}: {shlex.join(command)}", flush=True)
        if args.dry_run:
            continue
        code = subprocess.run(command, check=False).returncode
        if code != 0 or not is_finished(planned):
            state = f"ended with exit code {code}" if code else "stopped before its last step"
            raise UserError(
                f"{planned.name} {state} ({len(missing) - number + 1} runs are missing); see {planned.folder}/out.log, "
                "then start the same command again, which continues there"
            )


def _write_jobs(args: argparse.Namespace, lines: Sequence[str], advice: str) -> None:
    """Write a script of commands into the folder of the ladder, or print it."""
    text = "\n".join(["#!/bin/sh", f"# {advice}", "set -eu", *lines, ""])
    if args.dry_run:
        print(text, end="")
        return
    path = Path(args.ladder) / JOBS
    storage.write_text(path, text)
    print(f"wrote {path}: {advice}")


@LAUNCHERS.register("slurm", help="a script that submits a job of scripts/slurm.sbatch per run")
def write_slurm(missing: Sequence[PlannedRun], args: argparse.Namespace) -> None:
    """Write the script. Branches depend on the job of their trunk."""
    lines, jobs = [], {planned.name: f"job_{index}" for index, planned in enumerate(missing)}
    for planned in missing:
        words = ["sbatch", "--parsable", "--nodes=1", f"--ntasks-per-node={args.nproc_per_node}"]
        words += [f"--gpus-per-node={args.nproc_per_node}", f"--job-name={planned.name}"]
        depends = f'--dependency=afterok:"${jobs[planned.trunk]}" ' if planned.trunk in jobs else ""
        lines.append(
            f"{jobs[planned.name]}=$({shlex.join(words)} {depends}scripts/slurm.sbatch --config "
            f"{shlex.quote(planned.config)})"
        )
    _write_jobs(args, lines, "run it in the checkout, on a machine that can submit jobs; it submits one job per run")


@LAUNCHERS.register("ray", help="a script that submits one Ray job per run")
def write_ray(missing: Sequence[PlannedRun], args: argparse.Namespace) -> None:
    """Write the script. Jobs wait for each other, so that branches find their trunk."""
    lines = [
        shlex.join([
            "ray", "job", "submit", "--entrypoint-num-gpus", str(args.nproc_per_node), "--",
            *["python", *command_of(planned, args.nproc_per_node)[1:]],
        ])
        for planned in missing
    ]  # fmt: skip
    _write_jobs(args, lines, "run it where RAY_ADDRESS is the cluster; it waits for each job")


@LAUNCHERS.register("hosts", help="a script that trains one run after the other on all hosts of --hosts")
def write_hosts(missing: Sequence[PlannedRun], args: argparse.Namespace) -> None:
    """Write the script for `open-lm launch`."""
    start = ["open-lm", "launch", "--hosts", args.hosts, "--nproc-per-node", str(args.nproc_per_node), "train"]
    lines = [shlex.join([*start, "--config", planned.config]) for planned in missing]
    _write_jobs(args, lines, "run it on a machine that reaches all hosts")
