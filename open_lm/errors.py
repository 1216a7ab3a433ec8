"""Errors that a user can mend, and the one place that turns them into an exit code."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

# Where launchers tell a process which one of all it is; the first found counts.
RANK_NAMES = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # ask a run to save and stop: end of a job, a scheduler's early warning
HUNG = 124  # the exit code of a run that its watchdog ends
_FIRST_WORD_S = 2  # what the others leave the rank that has something to say
_LOST_CONTACT = ("DistBackendError", "DistNetworkError", "DistStoreError")


class UserError(Exception):
    """Something outside the program must change: a flag, a file, a service.

    The message names the file or flag, what was found, what was expected and what to do.
    """

    on_every_rank = False  # whether all ranks of a run raise the same, so that rank 0 alone has to say it


class ConfigError(UserError, ValueError):
    """Flags, configuration files or model names that cannot be used as given."""

    on_every_rank = True


class DataError(UserError, RuntimeError):
    """Documents, shards or manifests that are missing, broken or do not fit the model."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, broken or of another shape than the model."""


class BrokenCheckpoint(CheckpointError):
    """A checkpoint whose files are cut short, changed or unreadable: an earlier one may serve."""


class StorageError(UserError, OSError):
    """A local or remote path that cannot be reached, read or written."""


def join_problems(problems: Sequence[str], heading: str = "") -> str:
    """One message from several problems: a single one stands alone, several become a numbered list."""
    if len(problems) == 1:
        return f"{heading}: {problems[0]}" if heading else problems[0]
    lines = [f"{heading or 'There are problems'} ({len(problems)}):"]
    indented = (problem.replace("\n", "\n   ") for problem in problems)  # a problem may be such a list itself
    lines += [f"  {number}. {problem}" for number, problem in enumerate(indented, start=1)]
    return "\n".join(lines)


def run_cli(main: Callable[[list[str]], object], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main(argv)` and return its exit code: 0, 2 for a UserError, 130 for an interrupt.

    Any other exception keeps its traceback: it is a defect of ours, not of the user's. Of several ranks each prints its
    own and returns 1, because leaving in any other way may wait for ranks that do not answer.
    What every rank of a run raises is printed by rank 0 alone; the others stay a moment, because a launcher ends all
    ranks with the first, be it before rank 0 has spoken. So does a rank that has only lost contact with one that ended.
    """
    rank = next((os.environ[name] for name in RANK_NAMES if name in os.environ), None)
    try:
        main(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        if rank in (None, "0") or not error.on_every_rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_FIRST_WORD_S)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if rank is None:
            raise
        if _has_lost_contact(error):
            time.sleep(_FIRST_WORD_S)
        print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0


def _has_lost_contact(error: Exception) -> bool:
    """Whether an error says no more than that another rank has ended, as the backends of torch put it."""
    return type(error).__name__ in _LOST_CONTACT or "gloo/transport" in str(error)


def end_process(code: int) -> NoReturn:
    """Run what is registered for the exit and leave at once, without tearing down the interpreter.

    For processes of a process group: a communication thread that asks for the interpreter's lock while that goes down
    is ended by force, and now and then takes the finished process with it ("terminate called without an active
    exception"), which a launcher takes for a failed run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
