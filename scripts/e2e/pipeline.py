"""Pretrain and release a language model from end to end: one command, which continues where it was stopped.

    python scripts/e2e/pipeline.py scripts/e2e/debug.yaml --offline
    python scripts/e2e/pipeline.py scripts/e2e/lf_llm_269m.yaml --work-dir temp_data

The settings file is on top of all stages; docs/end_to_end.md describes its keys. Everything is below --work-dir.
Finished stages are skipped, unfinished ones resume. A setting that differs from that of a stage that has started is
an error: use another folder, or --restart STAGE, which deletes the results of that stage and of all later ones.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from pipeline_settings import read_settings
from pipeline_stages import PYTHON, ROOT, STAGES, Stage, Work
from pipeline_state import STOPPED_EXIT_CODE, Stamps, Stopped, StopSignals, changed_settings, locked, run_command

from open_lm.config.architecture import read_architecture
from open_lm.config.command_line import FlagParser
from open_lm.errors import ConfigError, DataError, join_problems, run_cli
from open_lm.storage import write_text
from open_lm.system.names import user_file


def stage_settings(stage: Stage, work: Work) -> dict[str, object]:
    """Return the settings that a stage depends on, as JSON values."""
    values: dict[str, object] = work.settings.values(stage.settings)
    return {**values, "offline": work.offline} if "offline" in stage.settings else values


def check_unchanged(stages: Sequence[Stage], stamps: Stamps, work: Work) -> None:
    """Raise ConfigError if a stage has started with other settings."""
    problems, first = [], ""
    for stage in stages:
        stamp = stamps.read(stage.name)
        changes = changed_settings(stamp["settings"], stage_settings(stage, work)) if stamp is not None else []
        if changes and stage.writes(work):  # a stage without files runs again
            problems.append(f"{stage.name}: {', '.join(changes)}")
            first = first or stage.name
    if problems:
        heading = f"--work-dir {work.folder}: these stages have started with other settings; use another folder, the "
        raise ConfigError(join_problems(problems, f"{heading}settings of before, or --restart {first}"))


def write_inputs(work: Work) -> None:
    """Write the files that stages get from the settings: the model and the prompts."""
    work.write_model()
    read_architecture(work.model)
    if work.settings.prompts:
        broken = [prompt for prompt in work.settings.prompts if "\n" in prompt or not prompt.strip()]
        if broken:
            raise ConfigError(f"prompts: found {broken[0]!r}, expected one line of text")
        write_text(work.prompts, "".join(f"{prompt}\n" for prompt in work.settings.prompts))


def restart(stages: Sequence[Stage], stamps: Stamps, work: Work) -> None:
    """Delete the stamps and the results of stages."""
    for stage in reversed(stages):
        stamps.remove(stage.name)
        for path in stage.writes(work):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def environment(work: Work) -> dict[str, str]:
    """Return the variables for the commands of stages. Downloads of the hub are kept in the work folder."""
    paths = [str(ROOT.absolute()), *filter(None, [os.environ.get("PYTHONPATH")])]
    values = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    hub = work.folder.absolute() / "hub"
    for name, path in {"HF_HUB_CACHE": hub, "HF_DATASETS_CACHE": hub / "datasets"}.items():
        values[name] = os.environ.get(name, str(path))
    return {**values, **({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if work.offline else {})}


def shown(command: Sequence[str]) -> str:
    """Return a command as a user types it."""
    return shlex.join(["python" if word == PYTHON else word for word in command])


def run_stage(stage: Stage, stamps: Stamps, work: Work, lock: IO[str], signals: StopSignals) -> str:
    """Run a stage unless it is finished; return what became of it.

    Raises:
        Stopped: a stop signal arrived.
        UserError: a command failed.
        DataError: the commands ended without the results of the stage.
    """
    stamp = stamps.read(stage.name)
    missing = [path for path in stage.results(work) if not path.exists()]
    unchanged = stamp is not None and not changed_settings(stamp["settings"], stage_settings(stage, work))
    if stamp is not None and stamp["finished"] and unchanged and not missing:
        return f"finished before ({stamp['seconds']:.0f} s)"
    reason = stage.skip(work)
    if reason:
        return f"skipped: {reason}"
    stamps.begin(stage.name, stage_settings(stage, work))
    start, cpu_start, finished = time.monotonic(), cpu_seconds(), False
    try:
        for command in stage.commands(work):
            print(f"  $ {shown(command)}", flush=True)
            run_command(command, stamps.folder / f"{stage.name}.log", lock, signals, environment(work))
        missing = [path for path in stage.results(work) if not path.exists()]
        if missing:
            log = stamps.folder / f"{stage.name}.log"
            raise DataError(f"{stage.name}: the commands ended without {missing[0]}; their output is in {log}")
        finished = True
    finally:
        seconds, used = time.monotonic() - start, cpu_seconds() - cpu_start
        stamps.end(stage.name, seconds, used, finished)
    return f"done in {seconds:.0f} s ({used:.0f} s of CPU)"


def run_stages(
    stages: Sequence[Stage], stamps: Stamps, work: Work, lock: IO[str], signals: StopSignals
) -> dict[str, str]:
    """Run the stages in order, and return what became of each."""
    outcomes = {}
    for number, stage in enumerate(stages, start=1):
        print(f"[{number}/{len(stages)}] {stage.name}: {stage.help}", flush=True)
        outcomes[stage.name] = run_stage(stage, stamps, work, lock, signals)
        print(f"  {outcomes[stage.name]}", flush=True)
        signals.check()
    return outcomes


def cpu_seconds() -> float:
    """Return the CPU time of all commands that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def print_summary(outcomes: Mapping[str, str], work: Work) -> None:
    """Print what became of each stage, and where the results are."""
    width = max(map(len, STAGES))
    print("\nStages:")
    for name, outcome in outcomes.items():
        print(f"  {name:<{width}}  {outcome}")
    print("Results:")
    for stage in STAGES.values():
        for path in stage.results(work):
            if path.exists():
                print(f"  {stage.name:<{width}}  {path}")


def print_commands(stages: Sequence[Stage], work: Work) -> None:
    """Print the commands of all stages without running them."""
    for number, stage in enumerate(stages, start=1):
        reason = stage.skip(work)
        print(f"[{number}/{len(stages)}] {stage.name}: {stage.help}" + (f" (skipped: {reason})" if reason else ""))
        for command in [] if reason else stage.commands(work):
            print(f"  $ {shown(command)}")


def build_parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n")
    epilog += "\nstages:\n" + "\n".join(f"  {stage.name:<12} {stage.help}" for stage in STAGES.values())
    style = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(
        prog="pipeline.py", description=description, epilog=epilog, formatter_class=style, allow_abbrev=False
    )
    add = parser.add_argument
    add("settings", type=user_file, help="YAML file with the settings")
    add("--work-dir", type=user_file, default=Path("temp_data"), help="folder for everything (default: %(default)s)")
    add("--offline", action="store_true", help="use text, a tokenizer and tasks from the Python installation")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, such as train.lr=0.001")
    add("--launcher", help="command that starts the ranks, instead of that of the settings; empty: one process")
    add("--until", choices=STAGES, metavar="STAGE", help="stop after this stage")
    add("--restart", choices=STAGES, metavar="STAGE", help="delete the results of this stage and of all later ones")
    add("--dry-run", action="store_true", help="print the commands, run and write nothing")
    return parser


def main(argv: list[str]) -> None:
    """Run the stages.

    Raises:
        SystemExit: with 130 after a stop signal.
    """
    args = build_parser().parse_args(argv)
    settings = read_settings(args.settings, args.set, args.launcher)
    work = Work(args.work_dir, settings, args.offline)
    names = list(STAGES)
    stages = [STAGES[name] for name in names[: names.index(args.until) + 1 if args.until else None]]
    stamps = Stamps(work.folder / "stages")
    if args.dry_run:
        check_unchanged(list(STAGES.values()), stamps, work)
        with TemporaryDirectory() as folder:
            write_inputs(replace(work, folder=Path(folder)))  # to check them
        print_commands(stages, work)
        return
    with locked(work.folder) as lock:
        if args.restart:
            restart([STAGES[name] for name in names[names.index(args.restart) :]], stamps, work)
        check_unchanged(list(STAGES.values()), stamps, work)
        write_inputs(work)
        stamps.folder.mkdir(exist_ok=True)
        try:
            with StopSignals() as signals:
                outcomes = run_stages(stages, stamps, work, lock, signals)
        except Stopped:
            print("stopped; start the same command again to continue", flush=True)
            raise SystemExit(STOPPED_EXIT_CODE) from None
        print_summary(outcomes, work)


if __name__ == "__main__":
    sys.exit(run_cli(main))
