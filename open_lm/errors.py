"""Define the errors that a user can fix, and map errors to exit codes."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

# Environment variables that hold the rank under different launchers; the first one set is used.
RANK_NAMES = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
)  # ask a run to save and stop: end of a job, early warning of a scheduler
WATCHDOG_EXIT_CODE = 124  # exit code of a run that the watchdog ends
_EXIT_DELAY_S = 2  # delay of ranks without a message of their own, so that the rank with the cause can print it
_LOST_CONNECTION_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")


class UserError(Exception):
    """An error that the user can fix by changing a flag, a file or a service.

    The message names the file or flag, what was found, what was expected and what to do.
    """

    on_every_rank = False  # whether all ranks of a run raise the same error, so that only rank 0 prints it


class ConfigError(UserError, ValueError):
    """Invalid flags, configuration files or model names."""

    on_every_rank = True


class DataError(UserError, RuntimeError):
    """Documents, shards or manifests that are missing, corrupt or do not match the model."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, corrupt or does not match the model."""


class BrokenCheckpoint(CheckpointError):
    """A checkpoint with truncated, modified or unreadable files. An earlier checkpoint may be usable."""


class StorageError(UserError, OSError):
    """A local or remote path that is unreachable or cannot be read or written."""


def join_problems(problems: Sequence[str], heading: str = "") -> str:
    """Return one message for several problems: a single problem as it is, several as a numbered list."""
    if len(problems) == 1:
        return f"{heading}: {problems[0]}" if heading else problems[0]
    lines = [f"{heading or 'There are problems'} ({len(problems)}):"]
    indented = (problem.replace("\n", "\n   ") for problem in problems)  # a problem may itself be a list of problems
    lines += [f"  {number}. {problem}" for number, problem in enumerate(indented, start=1)]
    return "\n".join(lines)


def run_cli(main: Callable[[list[str]], object], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main(argv)` and return its exit code: 0, 2 for a UserError, 130 for an interrupt.

    Any other exception is a bug. A single process lets it propagate with its traceback. A rank of a distributed run
    prints its traceback and returns 1, because a normal interpreter exit may wait for ranks that do not respond.
    Errors that every rank raises are printed only by rank 0. The other ranks wait before they exit, because a launcher
    stops all ranks when the first one exits, possibly before rank 0 has printed the error. A rank that only lost the
    connection to an exited rank waits for the same reason.
    """
    rank = next((os.environ[name] for name in RANK_NAMES if name in os.environ), None)
    try:
        main(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        if rank in (None, "0") or not error.on_every_rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_EXIT_DELAY_S)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if rank is None:
            raise
        if _is_lost_connection(error):
            time.sleep(_EXIT_DELAY_S)
        print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0


def _is_lost_connection(error: Exception) -> bool:
    """Return whether an error of a torch backend only reports that another rank has exited."""
    return type(error).__name__ in _LOST_CONNECTION_ERRORS or "gloo/transport" in str(error)


def end_process(code: int) -> NoReturn:
    """Run the registered exit functions and exit immediately, without finalizing the interpreter.

    For processes of a process group. During finalization, a communication thread that acquires the GIL is terminated,
    which sometimes aborts the finished process ("terminate called without an active exception"). A launcher then
    reports a failed run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
