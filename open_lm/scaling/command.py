"""Predict the loss and error of large models from small ones.

plan      choose a ladder of runs, and write their settings
run       train the runs of a ladder that are missing
collect   collect run folders and exports into a table of runs
fit       fit laws to a table of runs, and predict targets
predict   predict further targets with a fit, and rank further runs
report    show a fit as one HTML page
sweep     train a grid of learning rates or other settings over widths, and find the best
coordinate-check   show whether the sizes of activations depend on the width, with and without muP

A table is a JSON list with params, tokens, losses and accuracy of each run; see docs/scaling.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from open_lm.config.command_line import FlagParser
from open_lm.scaling import coordinate_command, fit_commands, plan_command, run_command, sweep_command

_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "plan": ("choose a ladder of runs, and write their settings", plan_command.add_flags, plan_command.run),
    "run": ("train the runs of a ladder that are missing", run_command.add_flags, run_command.run),
    "collect": ("collect run folders into a table", fit_commands.add_collect, fit_commands.run_collect),
    "fit": ("fit laws to a table of runs, and predict targets", fit_commands.add_fit, fit_commands.run_fit),
    "predict": ("predict targets with a fit", fit_commands.add_predict, fit_commands.run_predict),
    "report": ("show a fit as one HTML page", fit_commands.add_report, fit_commands.run_report),
    "sweep": ("find the best value of a setting for models or widths", sweep_command.add_flags, sweep_command.run),
    "coordinate-check": (
        "show whether activations depend on the width, with and without muP",
        coordinate_command.add_flags,
        coordinate_command.run,
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = FlagParser.of_program("open_lm.scaling", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_flags, _) in _COMMANDS.items():
        add_flags(commands.add_parser(name, help=text, description=text))
    return parser


def main(argv: list[str]) -> None:
    """Run a subcommand."""
    args = build_parser().parse_args(argv)
    _COMMANDS[args.command][2](args)
