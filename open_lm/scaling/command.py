"""Predict the loss and error of large models from small ones.

fit       fit laws to a table of runs, and predict targets

The table is a JSON list with params, tokens, losses and accuracy of each run; see docs/scaling.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from open_lm.config.command_line import FlagParser
from open_lm.config.registry import SCALING_LAWS
from open_lm.errors import ConfigError
from open_lm.names import user_path
from open_lm.scaling.settings import COMBINED, PAPER_TASKS, POINTS, Settings
from open_lm.storage.strict_json import to_json

if TYPE_CHECKING:
    from open_lm.scaling.fitting import ScalingFit


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = FlagParser.of_program("open_lm.scaling", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_fit(commands.add_parser("fit", help="fit laws to a table of runs, and predict targets"))
    return parser


def add_fit(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fit`."""
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUNS.json", help="tables of runs")
    add("--train", metavar="NAME", help="training set, if the table has several")
    add("--loss", default="c4_val", metavar="NAME", help="validation set of the loss (default: %(default)s)")
    laws = "; ".join(f"{name}: {entry.help}" for name, entry in SCALING_LAWS.entries().items())
    combined = "the average of all laws and ways to fit them, by their error on held-out sizes"
    help_law = f"{COMBINED}: {combined}; {laws} (default: %(default)s)"
    add("--law", choices=(COMBINED, *SCALING_LAWS), default=COMBINED, help=help_law)
    add(
        "--points",
        choices=POINTS,
        default="all",
        help="runs to fit: all up to --max-flops, or those of Gadre et al. 2024 (default: %(default)s)",
    )
    add("--max-flops", type=positive, metavar="C", help="with --points all: largest compute 6 N D of a run to fit")
    add(
        "--error-max-flops",
        type=positive,
        metavar="C",
        help="the same for the law of the error (default: --max-flops)",
    )
    add("--error-tasks", metavar="TASKS", help="comma-separated tasks of the error (default: 17 tasks of the paper)")
    add("--predict", nargs="+", type=target, default=[], metavar="N:D", help="parameters and tokens of targets")
    add("--resamples", type=int, default=1000, metavar="R", help="resamples of intervals (default: %(default)s)")
    add("--level", type=float, default=0.9, help="share of an interval (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the resamples (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")


def positive(text: str) -> float:
    """Return a positive number. Raise argparse.ArgumentTypeError for another text."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive number such as 2e19")
    return value


def target(text: str) -> tuple[int, int]:
    """Return (parameters, tokens) of N:D. Raise argparse.ArgumentTypeError for another text."""
    params, sign, tokens = text.partition(":")
    try:
        values = round(float(params)), round(float(tokens))
    except (ValueError, OverflowError):
        values = (0, 0)
    if not sign or min(values) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected PARAMETERS:TOKENS such as 1.4e9:28e9")
    return values


def main(argv: list[str]) -> None:
    """Run a subcommand."""
    args = build_parser().parse_args(argv)
    commands: dict[str, Callable[[argparse.Namespace], None]] = {"fit": run_fit}
    commands[args.command](args)


def run_fit(args: argparse.Namespace) -> None:
    """Fit laws and print coefficients and predictions."""
    if not 0 < args.level < 1:
        raise ConfigError(f"--level: found {args.level}, expected a number between 0 and 1, such as 0.9")
    if args.resamples < 20:
        raise ConfigError(f"--resamples: found {args.resamples}, expected at least 20")
    from open_lm.scaling.fitting import fit_runs, fit_values
    from open_lm.scaling.report_text import far_targets, fit_text
    from open_lm.scaling.runs import read_runs

    tasks = tuple(name.strip() for name in args.error_tasks.split(",")) if args.error_tasks else PAPER_TASKS
    settings = Settings(
        loss=args.loss,
        train=args.train,
        law=args.law,
        points=args.points,
        max_flops=args.max_flops,
        error_max_flops=args.error_max_flops,
        error_tasks=tasks,
        resamples=args.resamples,
        level=args.level,
        seed=args.seed,
    )
    runs = read_runs(args.runs)
    fit = fit_runs(runs, settings, args.predict)
    predictions = [fit.predict(*point) for point in args.predict]
    warn([*fit.warnings, *far_targets(predictions), *_exclusions(fit)])
    print(to_json(fit_values(fit, predictions), indent=1) if args.json else fit_text(fit, predictions))


def _exclusions(fit: ScalingFit) -> list[str]:
    """Return the runs that are excluded although no flag excludes them."""
    return [f"excluded: {run.label}: {reason}" for run, reason in fit.selection.excluded if "FLOPs" not in reason]


def warn(messages: Sequence[str]) -> None:
    """Print warnings to stderr."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr, flush=True)
