"""The name of the running program in its usage line and help."""

from __future__ import annotations

_command: str | None = None


def program_name(default: str) -> str:
    """Return the name under which the program was started: `open-lm NAME` if the console command runs it."""
    return default if _command is None else _command


def set_program_name(name: str | None) -> None:
    """Set the name of the program that the console command is about to run; None: its own name."""
    global _command  # noqa: PLW0603 (a process runs one program)
    _command = name
