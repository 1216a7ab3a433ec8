"""Define the errors that a user can fix, and map errors to exit codes."""

from __future__ import annotations

import atexit
import io
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

from open_lm.system.names import ESCAPE_ERRORS

# Environment variables that hold the rank under different launchers; the first one set is used.
RANK_NAMES = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
# Ask a run to save and stop: end of a job, early warning of a scheduler, Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WATCHDOG_EXIT_CODE = 124  # exit code of a run that the watchdog ends
CLOSED_OUTPUT_EXIT_CODE = 128 + signal.SIGPIPE  # a command stopped because the reader of its output had ended
_EXIT_DELAY_S = 2  # delay of ranks without a message of their own, so that the rank with the cause can print it
# Distributions whose modules have other names.
_DISTRIBUTIONS = {"composer": "llm-foundry", "llmfoundry": "llm-foundry", "yaml": "pyyaml"}
_COMBINED_EXTRAS = ("all", "dev", "eval")  # named only for packages that no other extra has
_NO_TEMPORARY_FOLDER = "No usable temporary directory found"  # message of the tempfile module
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
    """Return one message for several problems: a single problem unchanged, several as a numbered list."""
    if len(problems) == 1:
        return f"{heading}: {problems[0]}" if heading else problems[0]
    lines = [f"{heading or 'There are problems'} ({len(problems)}):"]
    indented = (problem.replace("\n", "\n   ") for problem in problems)  # a problem may itself be a list of problems
    lines += [f"  {number}. {problem}" for number, problem in enumerate(indented, start=1)]
    return "\n".join(lines)


def missing_package(module: str) -> str | None:
    """Return the message for an optional package that is not installed; None if this distribution does not require it.

    The extra to install comes from the metadata of the installed distribution, the first one that has the package.
    """
    from importlib import metadata

    package = _normalized(_DISTRIBUTIONS.get(module.partition(".")[0], module.partition(".")[0]))
    extras: list[str] = []
    required = False
    with suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires("open_lm") or ():
            name = re.match(r"[\w.-]+", requirement)
            if name is not None and _normalized(name.group()) == package:
                required = True
                extras += re.findall(r"extra == ['\"]([\w-]+)['\"]", requirement)
    if not required:
        return None
    extras.sort(key=lambda extra: extra in _COMBINED_EXTRAS)
    target = f'"open_lm[{extras[0]}]"' if extras else package
    return f"the package {package} is not installed; install it with: pip install {target}"


def _normalized(name: str) -> str:
    """Return the form of a distribution's name in which names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def run_cli(main: Callable[[list[str]], object], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main(argv)` and return its exit code: 0, 2 for a UserError, 130 for an interrupt.

    A missing optional package or temporary folder is a UserError too. If the reader of the output has ended (`| head`),
    the command ends silently: with 0 if it was finished, else like a command that SIGPIPE ends.

    Any other exception is a bug. A single process lets it propagate with its traceback. A rank of a distributed run
    prints its traceback and returns 1, because a normal interpreter exit may wait for ranks that do not respond.
    Errors that every rank raises are printed only by rank 0. The other ranks wait before they exit, because a launcher
    stops all ranks when the first one exits, possibly before rank 0 has printed the error. A rank that only lost the
    connection to an exited rank waits for the same reason.
    """
    rank = next((os.environ[name] for name in RANK_NAMES if name in os.environ), None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE_ERRORS)
    try:
        main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        if not _close_unread_output():  # the connection to another program
            raise
        return CLOSED_OUTPUT_EXIT_CODE
    except Exception as error:
        problem = _user_error(error)
        if problem is not None:
            if rank in (None, "0") or not problem.on_every_rank:
                print(f"error: {problem}", file=sys.stderr, flush=True)
            else:
                time.sleep(_EXIT_DELAY_S)
            return 2
        if rank is None:
            raise
        if _is_lost_connection(error):
            time.sleep(_EXIT_DELAY_S)
        print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    finally:
        _close_unread_output()
    return 0


def _user_error(error: Exception) -> UserError | None:
    """Return an error that the user can fix, also for errors of Python that have such a cause; None for others."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        message = missing_package(error.name)
        return None if message is None else ConfigError(message)
    if isinstance(error, FileNotFoundError) and (error.strerror or "").startswith(_NO_TEMPORARY_FOLDER):
        return StorageError(
            f"no temporary folder can be written ({error.strerror}): free disk space, or set TMPDIR to a folder that "
            "exists, is writable and has free space"
        )
    return None


def _close_unread_output() -> bool:
    """Discard the output that is still buffered for a reader that has ended; return whether there is such a reader.

    Python would report it at exit as an exception and change the exit code to 120.
    """
    is_unread = [_is_unread(stream) for stream in (sys.stdout, sys.stderr)]
    return any(is_unread)


def _is_unread(stream: TextIO) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        stream.flush()
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):  # not a file, closed, or no console
        return False
    poll = select.poll()
    poll.register(number, 0)  # POLLERR is always reported: no process reads the other end of the pipe
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
    return True


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
