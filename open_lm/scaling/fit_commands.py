"""`collect`, `fit`, `predict` and `report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from open_lm import storage
from open_lm.config.registry import SCALING_LAWS
from open_lm.errors import ConfigError
from open_lm.scaling.number_types import positive, target
from open_lm.scaling.settings import COMBINED, DEFAULT_LOSS, PAPER_TASKS, POINTS, Settings
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path

if TYPE_CHECKING:
    from open_lm.scaling.error_law import ErrorFits
    from open_lm.scaling.fitting import Prediction, ScalingFit
    from open_lm.scaling.measured import Comparison


# ---------------------------------------------------------------------------------------------- collect
def add_collect(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `collect`."""
    add = parser.add_argument
    add("output", type=user_path, metavar="RUNS.json", help="table to write")
    add(
        "sources",
        nargs="+",
        type=user_path,
        metavar="SOURCE",
        help="run folder, folder of a ladder, export of W&B (JSON), or table of runs",
    )
    add("--train", metavar="NAME", help="name of the training set of these runs (default: by their settings)")


def run_collect(args: argparse.Namespace) -> None:
    """Write a table of runs."""
    from open_lm.scaling.collect import collect
    from open_lm.scaling.runs import write_runs

    runs, skipped = collect(args.sources, args.train)
    warn(f"left out: {text}" for text in skipped)
    write_runs(args.output, runs)
    print(f"wrote {args.output}: {len(runs)} runs{f', {len(skipped)} left out' if skipped else ''}")


# ---------------------------------------------------------------------------------------------- fit
def add_fit(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fit`."""
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUNS.json", help="tables of runs")
    add("--train", metavar="NAME", help="training set, if the table has several")
    add("--loss", metavar="NAME", help=f"validation set of the loss (default: the only one, or {DEFAULT_LOSS})")
    laws = "; ".join(f"{name}: {entry.help}" for name, entry in SCALING_LAWS.entries().items())
    combined = "the average of all laws and ways to fit them, by their error on held-out sizes"
    text = f"{COMBINED}: {combined}; {laws} (default: %(default)s)"
    add("--law", choices=(COMBINED, *SCALING_LAWS), default=COMBINED, help=text)
    add(
        "--points",
        choices=POINTS,
        default="all",
        help="runs to fit: all up to --max-flops, or those of Gadre et al. 2024 (default: %(default)s)",
    )
    add("--max-flops", type=positive, metavar="C", help="with --points all: largest compute 6 N D of a run to fit")
    add("--error-tasks", metavar="TASKS", help="comma-separated tasks of the error (default: 17 tasks of the paper)")
    add("--per-task", action="store_true", help="also fit and predict the error of each task")
    add("--predict", nargs="+", type=target, default=[], metavar="N:D", help="parameters and tokens of targets")
    add("--resamples", type=int, default=1000, metavar="R", help="resamples of intervals (default: %(default)s)")
    add("--level", type=float, default=0.9, help="share of an interval (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the resamples (default: %(default)s)")
    add("--output", type=user_path, metavar="FIT.json", help="write the fit, for `predict` and `report`")
    add("--json", action="store_true", help="print JSON")


def run_fit(args: argparse.Namespace) -> None:
    """Fit laws and print coefficients and predictions."""
    if not 0 < args.level < 1:
        raise ConfigError(f"--level: found {args.level}, expected a number between 0 and 1, such as 0.9")
    if args.resamples < 20:
        raise ConfigError(f"--resamples: found {args.resamples}, expected at least 20")
    if args.max_flops is not None and args.points != "all":
        raise ConfigError(f"--max-flops has no effect with --points {args.points}; remove one of the two flags")
    if args.seed < 0:
        raise ConfigError(f"--seed: found {args.seed}, expected at least 0")
    from open_lm.scaling.error_fit import fit_tasks
    from open_lm.scaling.fit_file import write_fit
    from open_lm.scaling.fitting import fit_runs, fit_values, select_groups
    from open_lm.scaling.report_text import fit_text
    from open_lm.scaling.runs import read_runs

    runs = read_runs(args.runs)
    tasks = PAPER_TASKS if args.error_tasks is None else tuple(name.strip() for name in args.error_tasks.split(","))
    names = {name for run in runs for name in run.losses}
    settings = Settings(
        loss=args.loss or (names.pop() if len(names) == 1 else DEFAULT_LOSS),
        train=args.train,
        law=args.law,
        points=args.points,
        max_flops=args.max_flops,
        error_tasks=tasks,
        resamples=args.resamples,
        level=args.level,
        seed=args.seed,
    )
    check_tasks(args.error_tasks, tasks, {task for run in runs for task in run.accuracy})
    fit = fit_runs(runs, settings, args.predict)
    predictions = [fit.predict(*point) for point in args.predict]
    if args.output:
        write_fit(args.output, fit)
    _warn_of(fit, predictions)
    values = fit_values(fit, predictions)
    if args.per_task:
        groups = [selection.error for selection in select_groups(runs, settings, args.predict)]
        values["tasks"] = _task_values(fit_tasks(groups, settings.loss), predictions)
    print(to_json(values, indent=1) if args.json else fit_text(fit, predictions, values.get("tasks")))


def check_tasks(given: str | None, tasks: Sequence[str], known: set[str]) -> None:
    """Raise ConfigError if --error-tasks names a task that no run has."""
    unknown = [task or "an empty name" for task in tasks if task not in known]
    if given is not None and unknown:
        raise ConfigError(
            f"--error-tasks: found {', '.join(unknown)}, which no run has; expected some of "
            f"{', '.join(sorted(known)) or 'no tasks, because no run has an accuracy'}"
        )


def _task_values(laws: Mapping[str, ErrorFits], predictions: Sequence[Prediction]) -> dict[str, dict[str, object]]:
    """Return the law of each task and its predictions, by task."""
    return {
        task: {
            "coefficients": law.values(),
            "at_bounds": law.at_bounds(),
            "errors": [law.at(item.loss) for item in predictions],
        }
        for task, law in laws.items()
    }


# ---------------------------------------------------------------------------------------------- predict
def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `predict`."""
    add = parser.add_argument
    add("fit", type=user_path, metavar="FIT.json", help="file that `fit --output` wrote")
    add("targets", nargs="*", type=target, metavar="N:D", help="parameters and tokens (default: targets of the fit)")
    _add_measured(parser)
    add("--json", action="store_true", help="print JSON")


def _add_measured(parser: argparse.ArgumentParser) -> None:
    help_text = "table with trained targets, to compare with their predictions"
    parser.add_argument("--measured", type=user_path, metavar="RUNS.json", help=help_text)


def run_predict(args: argparse.Namespace) -> None:
    """Print predictions, and the further runs that would shrink the interval of the first target most."""
    from open_lm.scaling.fit_file import read_fit
    from open_lm.scaling.report_text import measured_table, prediction_table, value_table
    from open_lm.scaling.value import value_of_runs

    fit = read_fit(args.fit)
    targets = args.targets or fit.targets
    if not targets:
        raise ConfigError(f"found no target N:D, and {args.fit} has none; expected at least one, such as 1.4e9:28e9")
    predictions = [fit.predict(*point) for point in targets]
    values = value_of_runs(fit, targets[0])
    comparisons = _comparisons(fit, predictions, args.measured)
    _warn_of(fit, predictions)
    if args.json:
        content = {
            "created": fit.created,
            "predictions": [
                {**vars(item), "measured": measured and measured.values()}
                for item, measured in zip(predictions, comparisons, strict=True)
            ],
            "further_runs": [vars(item) for item in values],
        }
        print(to_json(content, indent=1))
        return
    lines = [*prediction_table(predictions, fit.settings.level), "", *value_table(values)]
    if args.measured:
        lines += ["", *measured_table([item for item in comparisons if item])]
    print("\n".join(lines))


def _comparisons(fit: ScalingFit, predictions: Sequence[Prediction], path: str | None) -> list[Comparison | None]:
    """Return the comparison of each prediction with its trained run, in a table or among the runs of the fit."""
    from open_lm.scaling.measured import compare, require_any
    from open_lm.scaling.runs import read_runs

    comparisons = compare(fit, predictions, read_runs([path]) if path else fit.table)
    if path:
        require_any(comparisons, predictions, path)
    return comparisons


# ---------------------------------------------------------------------------------------------- report
def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `report`."""
    add = parser.add_argument
    add("fit", type=user_path, metavar="FIT.json", help="file that `fit --output` wrote")
    add("output", type=user_path, metavar="PAGE.html", help="page to write")
    text = "parameters and tokens of targets (default: targets of the fit)"
    add("--predict", nargs="+", type=target, default=[], metavar="N:D", help=text)
    _add_measured(parser)


def run_report(args: argparse.Namespace) -> None:
    """Write the page."""
    from open_lm.scaling.fit_file import read_fit
    from open_lm.scaling.page import build_page
    from open_lm.scaling.value import value_of_runs

    fit = read_fit(args.fit)
    targets = args.predict or fit.targets
    predictions = [fit.predict(*point) for point in targets]
    values = value_of_runs(fit, targets[0]) if targets else []
    comparisons = _comparisons(fit, predictions, args.measured)
    storage.write_text(args.output, build_page(fit, predictions, values, comparisons))
    print(f"wrote {args.output}")


def _warn_of(fit: ScalingFit, predictions: Sequence[Prediction]) -> None:
    """Print what a user must know about a fit: bounds, far targets, excluded runs."""
    from open_lm.scaling.points import ABOVE_LIMIT
    from open_lm.scaling.report_text import far_targets

    excluded = [
        f"excluded: {run.label}: {reason}" for run, reason in fit.selection.excluded if reason != ABOVE_LIMIT
    ]  # fmt: skip
    warn([*fit.warnings, *far_targets(predictions), *excluded])


def warn(messages: Iterable[str]) -> None:
    """Print warnings to stderr."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr, flush=True)
