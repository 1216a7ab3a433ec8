"""Errors that a user can mend, and the one place that turns them into an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Something outside the program must change: a flag, a file, a service.

    The message names the file or flag, what was found, what was expected and what to do.
    """


class ConfigError(UserError, ValueError):
    """Flags, configuration files or model names that cannot be used as given."""


class DataError(UserError, RuntimeError):
    """Documents, shards or manifests that are missing, broken or do not fit the model."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, broken or of another shape than the model."""


class StorageError(UserError, OSError):
    """A local or remote path that cannot be reached, read or written."""


def join_problems(problems: Sequence[str], heading: str = "") -> str:
    """One message from several problems: a single one stands alone, several become a numbered list."""
    if len(problems) == 1:
        return f"{heading}: {problems[0]}" if heading else problems[0]
    lines = [f"{heading or 'There are problems'} ({len(problems)}):"]
    lines += [f"  {number}. {problem}" for number, problem in enumerate(problems, start=1)]
    return "\n".join(lines)


def run_cli(main: Callable[[list[str]], object], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main(argv)` and return its exit code: 0, 2 for a UserError, 130 for an interrupt.

    Any other exception keeps its traceback: it is a defect of ours, not of the user's.
    Under torchrun a ConfigError is the same on every rank, so that only rank 0 prints it.
    """
    try:
        main(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        if not (isinstance(error, ConfigError) and os.environ.get("RANK", "0") != "0"):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    return 0
