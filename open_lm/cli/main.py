"""The console command `open-lm`: run a subcommand like `python -m` runs its module.

Imports nothing that is slow, so that `open-lm --help` answers at once.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from open_lm.cli.commands import COMMANDS, GROUPS
from open_lm.errors import ConfigError, run_cli
from open_lm.system.program import set_program_name

PROGRAM = "open-lm"
_INDENT = 20


def help_text() -> str:
    """Return the help: usage, and the commands by group."""
    lines = [f"usage: {PROGRAM} [-h] [--version] COMMAND …", "", "Train, evaluate and release language models."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {item.name:{_INDENT}}{item.help}" for item in commands)]
    lines += [
        "",
        f"`{PROGRAM} COMMAND --help` lists the flags of a command. `python -m open_lm` is the same as `{PROGRAM}`.",
    ]
    return "\n".join(lines)


def run_command(name: str, argv: Sequence[str]) -> None:
    """Run a subcommand like `python -m MODULE argv…`, which mostly exits with SystemExit.

    Raises:
        ConfigError: there is no such command.
    """
    if name not in COMMANDS:
        raise ConfigError(_unknown(name))
    set_program_name(f"{PROGRAM} {name}")
    sys.argv = [sys.argv[0], *argv]
    runpy.run_module(COMMANDS[name].full_module, run_name="__main__", alter_sys=True)


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    similar = get_close_matches(name, COMMANDS, n=2)
    hint = f"did you mean {' or '.join(similar)}? " if similar else ""
    kind = "flag" if name.startswith("-") else "command"
    return f"unknown {kind} {name!r}; {hint}see {PROGRAM} --help"


def _main(argv: list[str]) -> None:
    if not argv:
        print(help_text(), file=sys.stderr)
        raise ConfigError("expected a command")
    if argv[0] in ("-h", "--help"):
        print(help_text())
    elif argv[0] == "--version":
        import open_lm

        print(f"open_lm {open_lm.__version__}")
    else:
        run_command(argv[0], argv[1:])


def main() -> None:
    """Run the command line of this process and exit with its code."""
    sys.exit(run_cli(_main))
