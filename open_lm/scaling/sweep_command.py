"""`sweep`: train models of one or several widths with a grid of settings, and find the best value for each model."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.config.registry import LAUNCHERS
from open_lm.errors import ConfigError, UserError
from open_lm.scaling.jobs import Job, training_job
from open_lm.scaling.ladder_files import read_base
from open_lm.scaling.run_command import add_launch_flags, check_launch_flags, run_job
from open_lm.scaling.sweep import (
    MUP,
    STANDARD,
    SweepRun,
    choose_models,
    parse_grid,
    planned_run,
    read_sweep,
    write_sweep,
)
from open_lm.scaling.sweep_fit import (
    DIVERGED,
    FINISHED,
    MISSING,
    Minimum,
    Result,
    find_minima,
    find_shifts,
    result_of,
    shift_text,
)
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path

RESULTS, PAGE = "results.json", "sweep.html"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sweep`."""
    add = parser.add_argument
    add("ladder", type=user_path, metavar="FOLDER", help="folder to write; one that has a sweep is continued")
    add(
        "--vary",
        nargs="+",
        metavar="KEY=LOW:HIGH:N",
        help="numeric flags of open_lm.main with their values, evenly spaced in the logarithm, or KEY=VALUE,VALUE. The "
        "minimum over the first one is fitted; runs that differ only in seed are repetitions",
    )
    add_model_flags(parser)
    add(
        "--parametrization",
        nargs="+",
        choices=(STANDARD, MUP),
        default=[],
        help="with or without --mup, or both (default: standard)",
    )
    add("--json", action="store_true", help="print JSON")
    add_launch_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select the models and the settings of all runs."""
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL", help="model configurations (default: that of --base)")
    add("--widths", nargs="+", type=int, metavar="D", help="scale the model to these widths")
    add("--mup-base-width", type=int, metavar="D", help="width at which both are equal (default: the smallest)")
    add("--base", type=user_path, metavar="FILE", help="YAML or JSON file with settings of all runs, such as data")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of all runs")


def run(args: argparse.Namespace) -> None:
    """Train the missing runs, then write and print the results."""
    check_launch_flags(args)
    folder = args.ladder
    runs = _write(args) if args.vary else _read(args)
    missing = [item for item in runs if result_of(item, planned_run(folder, item).folder).state == MISSING]
    if not args.json:
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are done", flush=True)
    if args.launcher == "local" and not args.dry_run:
        _train(folder, missing, args)
    elif missing:
        launch: Callable[[Sequence[Job], argparse.Namespace], None] = LAUNCHERS.get(args.launcher)
        with redirect_stdout(sys.stderr if args.json else sys.stdout):
            launch([training_job(planned_run(folder, item)) for item in missing], args)
    results = [result_of(item, planned_run(folder, item).folder) for item in runs]
    if all(result.state == MISSING for result in results):
        return
    content = results_content(results)
    storage.write_text(Path(folder) / RESULTS, to_json(content, indent=1) + "\n")
    from open_lm.scaling.sweep_page import build_page

    storage.write_text(Path(folder) / PAGE, build_page(results))
    print(to_json(content, indent=1) if args.json else f"{sweep_text(results)}\nwrote {Path(folder) / PAGE}")


def _read(args: argparse.Namespace) -> list[SweepRun]:
    """Return the runs of an existing sweep. Raise ConfigError for flags that would change it."""
    names = ("models", "widths", "parametrization", "mup_base_width", "base", "set")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if given:
        raise ConfigError(
            f"sweep: found {', '.join(given)} without --vary; start a sweep with --vary, or continue one without them"
        )
    return read_sweep(args.ladder)


def _write(args: argparse.Namespace) -> list[SweepRun]:
    """Write the sweep that the flags describe."""
    if args.mup_base_width is not None and MUP not in args.parametrization:
        raise ConfigError(f"--mup-base-width {args.mup_base_width} has no effect without --parametrization {MUP}")
    grid = parse_grid(args.vary)
    base = read_base(args.base, args.set)
    models = choose_models(args.models, args.widths, base)
    base.pop("model", None)
    parametrizations = dict.fromkeys(args.parametrization or [STANDARD], args.mup_base_width)
    return write_sweep(args.ladder, models, grid, base, parametrizations)


def _train(folder: str, missing: Sequence[SweepRun], args: argparse.Namespace) -> None:
    """Train runs sequentially. Raise UserError if one ends without a result; a diverged run is a result."""
    for number, item in enumerate(missing, start=1):
        planned = planned_run(folder, item)
        with redirect_stdout(io.StringIO()):
            outcome = run_job(training_job(planned), args.nproc_per_node)
        result = result_of(item, planned.folder)
        if result.state == MISSING:
            raise UserError(
                f"{item.name} {outcome} ({len(missing) - number + 1} runs are missing); see {planned.folder}/out.log, "
                "then start the same command again, which continues there"
            )
        if not args.json:
            ending = f"loss {result.loss:.4f}" if result.state == FINISHED else result.state
            print(f"[{number}/{len(missing)}] {item.name}: {ending}", flush=True)


def results_content(results: Sequence[Result]) -> dict[str, Any]:
    """Return the content of results.json."""
    minima = find_minima(results)
    return {
        "axis": next(iter(results[0].run.settings)),
        "runs": [
            {**asdict(result.run), "state": result.state, "loss": result.loss if math.isfinite(result.loss) else None}
            for result in results
        ],
        "minima": [_values(minimum) for minimum in minima],
        "shifts": [asdict(shift) for shift in find_shifts(minima)],
    }


def _values(minimum: Minimum) -> dict[str, Any]:
    values = {key: value for key, value in asdict(minimum).items() if key != "points"}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def sweep_text(results: Sequence[Result]) -> str:
    """Return the tables of minima and shifts."""
    axis, minima = next(iter(results[0].run.settings)), find_minima(results)
    lines = [
        f"{'model':<20} {'width':>6} {'parametrization':<16} {'best ' + axis:>12} {'interval':>23} {'loss':>8}  note"
    ]
    for item in minima:
        ends = "" if item.interval is None else f"{item.interval[0]:.3g} to {item.interval[1]:.3g}"
        lines.append(
            f"{item.model:<20} {item.width:>6} {item.parametrization:<16} {item.best:>12.3g} {ends:>23} "
            f"{item.loss:>8.4f}  {_note(item)}".rstrip()
        )
    lines += [shift_text(shift, axis) for shift in find_shifts(minima)]
    states = [result.state for result in results]
    if states.count(MISSING):
        lines.append(f"{states.count(MISSING)} of {len(states)} runs are missing")
    if states.count(DIVERGED):
        lines.append(f"{states.count(DIVERGED)} runs diverged")
    return "\n".join(lines)


def _note(item: Minimum) -> str:
    settings = [f"{key}={value:g}" for key, value in item.settings.items()]
    diverged = [f"diverged: {', '.join(f'{value:g}' for value in item.diverged)}"] if item.diverged else []
    return "; ".join([*settings, *([item.note] if item.note else []), *diverged])
